"""trimtab plan."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["command"]


def command(
    model: Annotated[str, typer.Argument(help="all-minilm-l6-v2, a model folder, or a Hub id; its config alone is read.")],
    method: Annotated[str, typer.Argument(help="A method's name; see trimtab methods.")],
    settings: Annotated[list[str] | None, typer.Argument(help="Hyperparameters as key=value, such as rank=16.")] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Rows a step.")] = 8,
    length: Annotated[int, typer.Option("--length", min=1, help="Tokens a row.")] = 128,
    targets: Annotated[str | None, typer.Option("--targets", help="Where to act; the method's default if left out.")] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="Of the base's weights: float32, bfloat16, float16.")] = "float32",
    optimizer: Annotated[str, typer.Option("--optimizer", help="adamw, sgd, momentum or lion.")] = "adamw",
    memory: Annotated[str | None, typer.Option("--memory", help="What there is, such as 24GiB: does it fit?")] = None,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="With gradient checkpointing.")] = False,
    places: Annotated[bool, typer.Option("--places", help="Also print a line a place.")] = False,
) -> None:
    """Parameters, bytes and operations of a training step, without reading a weight."""
    import torch

    from trimtab.cli._sizes import parse_bytes
    from trimtab.core.errors import Unsupported, nearest
    from trimtab.core.registry import config_from_dict
    from trimtab.training.plan import plan
    from trimtab.training.strict import assignments

    values = assignments(settings or (), "rank=16")
    dtypes = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
    if dtype not in dtypes:
        raise Unsupported(f"unknown dtype {dtype!r}{nearest(dtype, dtypes)}")
    config = config_from_dict({"name": method, **values})
    found = plan(
        model, config, batch=batch, length=length, targets=targets, dtype=dtypes[dtype], optimizer=optimizer,
        memory=None if memory is None else parse_bytes(memory), checkpointing=checkpointing,
    )  # fmt: skip
    print(f"{config} on {model}, {batch} x {length} tokens, {dtype}")
    print(found)
    if places:
        print(found.places)
