"""trimtab expand."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["command"]


def command(
    packed: Annotated[Path, typer.Argument(help="A file that trimtab compress wrote.")],
    out: Annotated[Path, typer.Option("--out", help="The folder to write: an adapter's, or a checkpoint's.")],
    base: Annotated[
        str | None, typer.Option("--base", help="The base, where starts are made from its weights: a run's folder, or a model's.")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option("--reference", help="What the update was counted from, if that was a folder or file.")
    ] = None,
) -> None:
    """A compressed adapter as a folder again, or a checkpoint from its reference and a compressed difference."""
    import json

    import transformers

    from trimtab.artifacts.expand import expand
    from trimtab.artifacts.packed import Packed
    from trimtab.training.folder import CONFIG
    from trimtab.training.models import load_pretrained
    from trimtab.training.scoring import scorer

    print(json.dumps({"packed": str(packed), "out": str(out), "base": base, "reference": str(reference) if reference else None}))
    model = None
    if base is not None and (Path(base) / CONFIG).is_file():
        model, _ = scorer(base)
    elif base is not None:
        opened = Packed(packed)
        cls = getattr(transformers, opened.header["manifest"]["base"]["class"], transformers.AutoModel)
        model = load_pretrained(cls.from_pretrained, base)
    print(f"wrote {expand(packed, out, model=model, reference=reference)}")
