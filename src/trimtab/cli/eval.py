"""trimtab eval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["command"]


def command(
    run: Annotated[str, typer.Argument(help="The folder of a run or of a model that it was merged into, or a configuration.")],
    on: Annotated[str, typer.Option("--on", help="A split of the run's data, or a file with the same columns.")] = "test",
    text: Annotated[list[str] | None, typer.Option("--text", help="A text to predict instead; may be repeated.")] = None,
    like: Annotated[str | None, typer.Option("--like", help="For a merged model: the run whose data and settings count.")] = None,
    predictions: Annotated[Path | None, typer.Option("--predictions", help="Write one JSON line an example here.")] = None,
) -> None:
    """Evaluate a saved adapter on its base, or a merged model, or predict."""
    from rich.console import Console

    from trimtab.core.folders import apart
    from trimtab.training import evaluate
    from trimtab.training.files import write_text

    if predictions is not None:
        apart(predictions, [on, run])
    console = Console()
    result = evaluate(run, on=on, inputs=text, like=like, console=console)
    if text:
        for line, entry in zip(text, result.predictions, strict=True):
            shown = "  ".join(f"{value:.3f}" if isinstance(value, float) else str(value) for value in entry.values())
            console.print(f"{shown}  {line}", markup=False, highlight=False, soft_wrap=True)
    if predictions is not None:
        write_text(predictions, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in result.predictions))
