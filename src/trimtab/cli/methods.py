"""trimtab methods."""

from __future__ import annotations

import json
from typing import Annotated

import typer

__all__ = ["command"]


def command(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Do not try the capabilities.")] = False,
) -> None:
    """All methods, and what each can do: found by trying it on small models."""
    from trimtab.core.probe import methods

    table = methods(probe=not quick)
    if as_json:
        for record in table:
            print(json.dumps(record))
    else:
        print(table)
