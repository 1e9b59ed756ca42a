"""trimtab project."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["command"]


def command(
    adapter: Annotated[Path, typer.Argument(help="A saved adapter, of any format that trimtab reads.")],
    target: Annotated[str, typer.Option("--target", help="The new base: a model folder with the same shapes.")],
    out: Annotated[Path, typer.Option("--out", help="The folder to write; it must not exist.")],
    source: Annotated[
        str | None, typer.Option("--source", help="The old base; needed where the method's update depends on its weights.")
    ] = None,
    energy: Annotated[
        float, typer.Option("--energy", help="Share of the target weight's squared singular values whose vectors are kept.")
    ] = 0.99,
    rank: Annotated[int | None, typer.Option("--rank", help="Of the LoRA, where the method's update is dense.")] = None,
    max_error: Annotated[float | None, typer.Option("--max-error", help="Or the relative error that its rank may make.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="Of the new adapter; default: the old one's.")] = None,
    heads: Annotated[str, typer.Option("--heads", help="A head of the adapter's own: average or first keep it, drop.")] = "average",
) -> None:
    """Move an adapter to a base of equal shape without data, through the subspaces of its weights; a base line for transfer."""
    from trimtab.artifacts.project import project

    more = {"energy": energy, "rank": rank, "max_error": max_error, "name": name, "heads": heads}
    print(project(adapter, out, target=target, source=source, **more))
    print(f"wrote {out}")
