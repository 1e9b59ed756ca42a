"""trimtab convert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["command"]


def command(
    source: Annotated[
        Path, typer.Argument(help="A saved adapter of trimtab, peft, adapters, torchtune, MLX, kohya, LyCORIS or diffusers.")
    ],
    out: Annotated[Path, typer.Option("--out", help="The folder to write; it must not exist.")],
    to: Annotated[str, typer.Option("--to", help="trimtab, peft or diffusers.")] = "trimtab",
    base: Annotated[
        str | None, typer.Option("--base", help="The model it is for; needed where the file does not tell its layers.")
    ] = None,
    rank: Annotated[int | None, typer.Option("--rank", help="Store the best LoRA of this rank, whatever the method.")] = None,
    max_error: Annotated[
        float | None, typer.Option("--max-error", help="Store a LoRA of the smallest rank with at most this relative error.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Of the new adapter; default: the old one's.")] = None,
    alpha: Annotated[float | None, typer.Option("--alpha", help="torchtune: the scale's numerator, if no config tells it.")] = None,
    permute: Annotated[
        bool | None,
        typer.Option("--permute/--no-permute", help="torchtune: rows of q and k in pairs; default: by the model's type."),
    ] = None,
    part: Annotated[str | None, typer.Option("--part", help="kohya: which model's tensors, as lora_unet.")] = None,
    scale: Annotated[float | None, typer.Option("--scale", help="MLX: of the update, if its config leaves it open.")] = None,
    head: Annotated[
        bool | None, typer.Option("--head/--no-head", help="adapters: whether to take the prediction head along; default: yes.")
    ] = None,
    base_name: Annotated[
        str | None, typer.Option("--base-name", help="--to peft: the base's name for its config, if the model has none.")
    ] = None,
    component: Annotated[
        str | None, typer.Option("--component", help="--to diffusers: unet, transformer, ...; default: by the model's class.")
    ] = None,
) -> None:
    """Write a saved adapter in another format; strict: every tensor is used, or the command says which are not."""
    from trimtab.artifacts.convert import convert

    options = {"alpha": alpha, "permute": permute, "part": part, "scale": scale, "head": head}
    given = {key: value for key, value in options.items() if value is not None}
    writing = {key: value for key, value in {"base_name": base_name, "component": component}.items() if value is not None}
    print(convert(source, out, to=to, base=base, rank=rank, max_error=max_error, name=name, writing=writing, **given))
    print(f"wrote {out}")
