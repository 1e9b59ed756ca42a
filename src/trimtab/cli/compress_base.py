"""trimtab compress-base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["command"]


def command(
    model: Annotated[str, typer.Argument(help="all-minilm-l6-v2, a model folder with safetensors, or a Hub id.")],
    out: Annotated[Path, typer.Option("--out", help="The folder to write; one that was begun is gone on with.")],
    bits: Annotated[int, typer.Option("--bits", help="Of a code, 1 to 8.")] = 4,
    groups: Annotated[int, typer.Option("--groups", help="Tables a row.")] = 1,
    targets: Annotated[str | None, typer.Option("--targets", help="Which Linear layers; those in the blocks if left out.")] = None,
    embeddings: Annotated[bool, typer.Option("--embeddings", help="Also sketch the input embeddings.")] = False,
    dtype: Annotated[str, typer.Option("--dtype", help="Of tables and other matrices: auto, float32, bfloat16, float16.")] = "auto",
    calibrate: Annotated[str | None, typer.Option("--calibrate", help="Texts: a file, folder, packaged set or Hub id.")] = None,
    column: Annotated[str, typer.Option("--column", help="That holds the texts.")] = "text",
    samples: Annotated[int, typer.Option("--samples", help="How many of the texts.")] = 128,
    length: Annotated[int, typer.Option("--length", help="Tokens a text is cut to.")] = 2048,
    power: Annotated[float, typer.Option("--power", help="Of the columns' weights, with --calibrate.")] = 3.0,
    damping: Annotated[float, typer.Option("--damping", help="Of the second moments, with --calibrate.")] = 0.1,
    restarts: Annotated[int, typer.Option("--restarts", help="Starts of k-means.")] = 4,
    seed: Annotated[int, typer.Option("--seed", help="Of k-means and of the choice of texts.")] = 0,
    shard_size: Annotated[str, typer.Option("--shard-size", help="Dense bytes worked on at once.")] = "1GiB",
    device: Annotated[str, typer.Option("--device", help="That computes.")] = "cpu",
) -> None:
    """Turn a model into its sketch, whose tables SketchTune trains; resumes where an earlier process was interrupted."""
    from rich.console import Console

    from trimtab.artifacts.compress_base import BaseSketch, compress_base
    from trimtab.artifacts.texts import text_batches
    from trimtab.cli._sizes import parse_bytes

    sketch = BaseSketch(
        bits=bits, groups=groups, power=power, damping=damping, restarts=restarts, embeddings=embeddings, dtype=dtype, seed=seed
    )
    print(f"{sketch} of {model}")
    batches = None
    if calibrate is not None:
        batches = text_batches(model, calibrate, column=column, samples=samples, length=length, seed=seed)
    table = compress_base(
        model, out, sketch=sketch, targets=targets, calibration=batches, shard_bytes=parse_bytes(shard_size), device=device,
        console=Console(),
    )  # fmt: skip
    print(table)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    print(f"wrote {out}: {size:,} bytes of weights")
