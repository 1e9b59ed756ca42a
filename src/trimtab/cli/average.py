"""trimtab average."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["command"]


def command(
    checkpoints: Annotated[list[Path], typer.Argument(help="A run trained with keep_adapters, or adapters' folders in order.")],
    out: Annotated[Path, typer.Option("--out", help="The adapter's folder to write.")],
    scheme: Annotated[
        str, typer.Option("--scheme", help="power, uniform, softmax, linear, exponential or geometric; several with commas.")
    ] = "power",
    by: Annotated[str, typer.Option("--by", help="What counts: loss, step or score.")] = "loss",
    strength: Annotated[str, typer.Option("--strength", help="How unequal the weights are; several with commas.")] = "0.7",
    last: Annotated[str, typer.Option("--last", help="The newest so many, or all; several with commas.")] = "all",
    stride: Annotated[int, typer.Option("--stride", help="Every so-manieth of them, counted back from the newest.")] = 1,
    best: Annotated[int | None, typer.Option("--best", help="Of those, the best by validation alone.")] = None,
    metric: Annotated[str | None, typer.Option("--metric", help="The recorded value that counts, such as eval_loss.")] = None,
    better: Annotated[str | None, typer.Option("--better", help="higher or lower, of a metric that says neither.")] = None,
    space: Annotated[str, typer.Option("--space", help="factors: what is saved; update: what it does to the weights.")] = "factors",
    rank: Annotated[int | None, typer.Option("--rank", help="Of the result, with --space update.")] = None,
    on: Annotated[str, typer.Option("--on", help="Split of the run's data that several settings are tried on.")] = "validation",
) -> None:
    """Checkpoints of one run averaged into one adapter, the better ones counting more."""
    import dataclasses
    import json

    from trimtab.artifacts.average import average
    from trimtab.core.errors import Unsupported
    from trimtab.core.table import Table
    from trimtab.training.files import write_text
    from trimtab.training.folder import CONFIG
    from trimtab.training.scoring import scorer

    settings = {
        "scheme": scheme.split(","), "by": by, "strength": _numbers(strength, float), "last": _numbers(last, int), "stride": stride,
        "best": best, "metric": metric, "better": better, "space": space, "rank": rank,
    }  # fmt: skip
    print(json.dumps({"checkpoints": [str(path) for path in checkpoints], "out": str(out), **settings, "on": on}))
    run = checkpoints[0] if len(checkpoints) == 1 and (checkpoints[0] / CONFIG).is_file() else None
    tried = len(settings["scheme"]) * len(settings["strength"]) * len(settings["last"]) > 1
    if tried and run is None:
        raise Unsupported("several settings are tried on a run's data: give the run's folder")
    model, score = scorer(run, on=on) if run is not None else (None, None)
    result = average(checkpoints[0] if len(checkpoints) == 1 else checkpoints, out, model=model, score=score, **settings)
    if result.trials:
        table = Table(("scheme", "strength", "last", "score"))
        for row in result.trials:
            table.add(row["scheme"], "" if row["strength"] is None else row["strength"], row["last"] or "all", row["score"])
        print(table)
    print(result)
    record = dataclasses.asdict(result) | {"path": str(result.path), "used": [str(folder) for folder in result.used]}
    write_text(out / "average.json", json.dumps(record, indent=1) + "\n")


def _numbers(text: str, kind: type) -> list:
    """``"0.5,0.7"`` as numbers; ``all`` is None."""
    from trimtab.core.errors import ShapeMismatch

    try:
        return [None if part.strip() == "all" else kind(part) for part in text.split(",")]
    except ValueError:
        raise ShapeMismatch(f"numbers with commas between them are needed, found {text!r}") from None
