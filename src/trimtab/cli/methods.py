"""trimtab methods."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown

__all__ = ["command"]


def command(
    name: Annotated[str | None, typer.Argument(help="A method: prints its page, with formula, source and arguments.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Do not try the capabilities.")] = False,
    pages: Annotated[Path | None, typer.Option("--pages", help="Write a page a method, and an index, into this folder.")] = None,
) -> None:
    """All methods, and what each can do: found by trying it on small models; or the page of one method."""
    from trimtab.core import registry
    from trimtab.core.probe import methods
    from trimtab.report.pages import page
    from trimtab.report.pages import pages as all_pages

    if pages is not None:
        pages.mkdir(parents=True, exist_ok=True)
        for file, text in all_pages().items():
            (pages / file).write_text(text, "utf-8")
        print(f"wrote {len(all_pages())} pages to {pages}")
        return
    if name is not None:
        Console().print(Markdown(page(registry.entry(name))))
        return
    table = methods(probe=not quick)
    if as_json:
        for record in table:
            print(json.dumps(record))
    else:
        print(table)
