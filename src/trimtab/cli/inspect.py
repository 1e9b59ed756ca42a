"""trimtab inspect."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["command"]


def command(
    adapter: Annotated[Path, typer.Argument(help="The folder of a saved adapter, or a compressed one.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="Also list the tensors.")] = False,
) -> None:
    """What a saved adapter holds; checks its files against their hashes, and needs no model."""
    import math

    from trimtab.core.checkpoint import inspect
    from trimtab.core.table import Table

    manifest = inspect(adapter)
    size = sum(file.stat().st_size for file in (adapter.iterdir() if adapter.is_dir() else [adapter]) if file.is_file())
    count = sum(math.prod(entry["shape"]) for key, entry in manifest["tensors"].items() if key not in manifest["aliases"])
    base = manifest["base"]["class"]
    print(f"adapter {manifest['name']!r} for {base}: {len(manifest['places'])} places, {count:,} numbers, {size:,} bytes, intact")
    table = Table(("path", "tensor", "part", "role", "kind", "shape", "method"))
    for place in manifest["places"]:
        method = dict(place["method"])
        name = method.pop("name")
        settings = ", ".join(f"{key}={value!r}" for key, value in method.items())
        table.add(
            place["path"], place["tensor"], place.get("part", ""), place["role"] or "", place["kind"],
            "x".join(map(str, place["shape"])), f"{name}({settings})",
        )  # fmt: skip
    print(table)
    if tensors:
        listing = Table(("tensor", "shape", "dtype"))
        for key, entry in manifest["tensors"].items():
            listing.add(key, "x".join(map(str, entry["shape"])), entry["dtype"])
        print(listing)
