"""trimtab expand-base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["command"]


def command(
    sketch: Annotated[Path, typer.Argument(help="A folder that trimtab compress-base wrote.")],
    out: Annotated[Path, typer.Option("--out", help="The folder to write; it must not exist.")],
) -> None:
    """Write the dense model that a sketch stands for, as a folder that transformers loads."""
    from trimtab.artifacts.expand_base import expand_base

    print(f"wrote {expand_base(sketch, out)}")
