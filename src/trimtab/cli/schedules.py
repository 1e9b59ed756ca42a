"""trimtab schedules."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown

__all__ = ["command"]


def command(
    name: Annotated[str | None, typer.Argument(help="A schedule: prints its page, with formula, source and arguments.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """What can change while training: which layers learn, ranks, learning rates, averages; or the page of one schedule."""
    from trimtab import schedules
    from trimtab.report.pages import schedule_page

    if name is not None:
        Console().print(Markdown(schedule_page(schedules.entry(name))))
    elif as_json:
        for record in schedules.table():
            print(json.dumps(record))
    else:
        print(schedules.table())
