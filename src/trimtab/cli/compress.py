"""trimtab compress."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["command"]


def command(
    source: Annotated[Path, typer.Argument(help="A run's folder, an adapter's folder, or a full checkpoint.")],
    out: Annotated[Path, typer.Option("--out", help="The file to write, such as math.tern.")],
    density: Annotated[
        str, typer.Option("--density", help="Share of the entries kept, 0.2 or 20%; several with commas are tried on --on.")
    ] = "20%",
    alpha: Annotated[
        str, typer.Option("--alpha", help="Scale in standard deviations, or fit for least squared error; several with commas.")
    ] = "fit",
    scope: Annotated[str, typer.Option("--scope", help="What is ranked together: global, tensor or factor.")] = "global",
    coding: Annotated[str, typer.Option("--coding", help="entropy, rice, trits or masks.")] = "entropy",
    reference: Annotated[str, typer.Option("--reference", help="auto, zero, or the adapter or checkpoint to count from.")] = "auto",
    keep: Annotated[list[str] | None, typer.Option("--keep", help="Pattern of tensors to keep as they are; repeatable.")] = None,
    rest: Annotated[str, typer.Option("--rest", help="How those are stored: raw, float16, bfloat16 or int8.")] = "raw",
    fit: Annotated[int, typer.Option("--fit", min=0, help="Fit a scale a row or column to so many training batches; 60.")] = 0,
    on: Annotated[str, typer.Option("--on", help="Split of the run's data that several settings are tried on.")] = "validation",
    tolerance: Annotated[float, typer.Option("--tolerance", help="Loss of the metric that a smaller density may cost.")] = 0.005,
) -> None:
    """An adapter, or the difference of two checkpoints, 8 to 50 times smaller: the signs of its largest entries."""
    import dataclasses
    import json

    from trimtab.artifacts.compress import compress
    from trimtab.core.errors import Unsupported
    from trimtab.core.table import Table
    from trimtab.training.files import write_text
    from trimtab.training.folder import ADAPTER, CONFIG
    from trimtab.training.scoring import scorer, training_losses

    settings = {
        "density": [part.strip() for part in density.split(",")], "alpha": [_alpha(part) for part in alpha.split(",")],
        "scope": scope, "coding": coding, "reference": reference, "keep": keep or [], "rest": rest, "tolerance": tolerance,
    }  # fmt: skip
    print(json.dumps({"source": str(source), "out": str(out), **settings, "fit": fit, "on": on}))
    run = source if (source / CONFIG).is_file() and (source / ADAPTER).is_dir() else None
    tried = len(settings["density"]) * len(settings["alpha"]) > 1
    if (tried or fit) and run is None:
        raise Unsupported(f"several settings are tried, and scales fitted, on a run's data, and {source} is no run's folder")
    model, score = scorer(run, on=on) if run is not None else (None, None)
    losses = training_losses(run, fit) if fit else None
    result = compress(source / ADAPTER if run else source, out, model=model, score=score, losses=losses, **settings)
    if result.trials:
        table = Table(("density", "alpha", "score"))
        for row in result.trials:
            table.add(row["density"] or "as it was", "fit" if row["alpha"] is None else row["alpha"], row["score"])
        print(table)
    print(result)
    record = {key: str(value) if isinstance(value, Path) else value for key, value in dataclasses.asdict(result).items()}
    write_text(out.with_name(f"{out.name}.json"), json.dumps({"settings": settings | {"fit": fit}, **record}, indent=1) + "\n")


def _alpha(text: str) -> float | None:
    from trimtab.core.errors import ShapeMismatch

    if text.strip() == "fit":
        return None
    try:
        return float(text)
    except ValueError:
        raise ShapeMismatch(f"alpha is a number or fit; found {text!r}") from None
