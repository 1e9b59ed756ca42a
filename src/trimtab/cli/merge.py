"""trimtab merge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["command"]


def command(
    adapter: Annotated[Path, typer.Argument(help="The folder of a saved adapter.")],
    base: Annotated[str, typer.Option("--base", help="all-minilm-l6-v2, a model folder, or a Hub id.")],
    out: Annotated[Path, typer.Option("--out", help="The folder to write; it must not exist.")],
    max_error: Annotated[
        float | None, typer.Option("--max-error", help="Refuse a larger relative output error at any place.")
    ] = None,
    untie: Annotated[bool, typer.Option("--untie", help="Give a tied tensor's other users the old values.")] = False,
    into: Annotated[
        str | None, typer.Option("--into", help="For a base that is a sketch: dequantised (dense) or requantised (a sketch again).")
    ] = None,
) -> None:
    """Write the base with the adapter merged into it, as a model folder that transformers loads."""
    import os
    import shutil

    import transformers

    import trimtab as tt
    from trimtab.compat.sketch_folder import is_sketch
    from trimtab.compat.sketched import dense_
    from trimtab.core.checkpoint import inspect
    from trimtab.core.errors import NotMergeable
    from trimtab.schedules.restoration import load
    from trimtab.training.models import load_pretrained, resolve

    if out.exists():
        raise NotMergeable(f"{out} exists already; choose another folder for the merged model")
    manifest = inspect(adapter)
    cls = getattr(transformers, manifest["base"]["class"], transformers.AutoModel)
    model = load_pretrained(cls.from_pretrained, base)
    name = load(model, adapter, mode="mask")  # units that the adapter's training cut out become zeros
    report = tt.merge(model, name, into=into, max_error=max_error, untie=untie, permanent=True)
    print(report)
    if is_sketch(resolve(base)) and into == "requantised":
        print(f"wrote {tt.save_base(model, resolve(base), out)}")
        return
    draft = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        dense_(model).save_pretrained(draft)
        load_pretrained(transformers.AutoTokenizer.from_pretrained, base).save_pretrained(draft)
        os.replace(draft, out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    print(f"wrote {out}")
