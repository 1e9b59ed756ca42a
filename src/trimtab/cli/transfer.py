"""trimtab transfer."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["command"]


def command(
    config: Annotated[str, typer.Argument(help="YAML file; see trimtab.distillation.TransferConfig for its keys.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, dots reach into sections: train.epochs=20.")] = None,
) -> None:
    """Move an adapter's task to another model, by made inputs and the first model's answers; resumes where it was interrupted."""
    from rich.console import Console

    from trimtab.distillation import transfer

    transfer(config, overrides=overrides or (), console=Console())
