"""trimtab audit contamination."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["command"]


def command(
    run: Annotated[str | None, typer.Argument(help="A run of instruction tuning, or its configuration; or give files.")] = None,
    train: Annotated[list[Path] | None, typer.Option("--train", help="A training file; may be repeated.")] = None,
    test: Annotated[list[Path] | None, typer.Option("--test", help="A test file; may be repeated.")] = None,
    column: Annotated[list[str] | None, typer.Option("--column", help="A column with text; may be repeated.")] = None,
    n: Annotated[int, typer.Option("--words", min=1, help="Words of a piece.")] = 8,
    share: Annotated[float, typer.Option("--share", help="Share of a test text's pieces that one training text must hold.")] = 0.8,
    out: Annotated[Path | None, typer.Option("--out", help="Write every match here, as JSON.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 if a test row is in the training rows exactly.")] = False,
) -> None:
    """Test questions that are among the training rows: word for word, with other numbers, or in long pieces."""
    from trimtab.audit.contamination import contamination, contamination_of_run
    from trimtab.core.folders import apart
    from trimtab.training.errors import ConfigError
    from trimtab.training.files import write_text

    if (run is None) == (not train or not test):
        raise ConfigError("give a run or a configuration, or else at least one --train and one --test file")
    if out is not None:
        apart(out, [run, *(train or []), *(test or [])])
    if run is not None:
        found = contamination_of_run(run, n=n, share=share)
    else:
        found = contamination(train, test, columns=column or ["instruction"], n=n, share=share)
    print(found.table())
    if out is not None:
        write_text(out, found.to_json())
    if strict and any(found.contaminated().values()):
        raise typer.Exit(1)
