"""trimtab train."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["command"]


def command(
    config: Annotated[str, typer.Argument(help="YAML file, such as examples/supersense.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, dots reach into sections: method.rank=16.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Train anew where the output folder holds a run.")] = False,
) -> None:
    """Train an adapter from a configuration; resumes where an earlier process was interrupted."""
    from rich.console import Console

    from trimtab.training import train

    train(config, overrides=overrides or (), overwrite=overwrite, console=Console())
