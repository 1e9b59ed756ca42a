"""convert: a saved adapter in another format, exactly where that format has the method, else as a LoRA with its error."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from trimtab.artifacts.combine import check_size, merge_all, open_base
from trimtab.artifacts.rules import rule_entry
from trimtab.artifacts.saved import Saved, open_saved
from trimtab.artifacts.writing import write_adapters
from trimtab.core.errors import NotMergeable, Unsupported
from trimtab.core.folders import apart
from trimtab.core.table import Table

__all__ = ["convert"]


def convert(
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    to: str = "trimtab",
    base: str | os.PathLike | nn.Module | None = None,
    rank: int | None = None,
    max_error: float | None = None,
    name: str | None = None,
    writing: dict[str, Any] | None = None,
    **options: Any,
) -> Table:
    """Read the adapter at ``source`` (any format that ``tt.load`` reads) and write it to the folder ``out``.

    Args:
        to: ``"trimtab"``, ``"peft"`` or ``"diffusers"``.
        base: the model that it is for, a folder or a module. Needed where the source does not tell its layers' shapes (kohya's and
            torchtune's files), for convolutions and fused layers, and where a LoRA of it depends on the base's weights.
        rank: store the best LoRA of this rank, whatever the method.
        max_error: store a LoRA of the smallest rank whose relative error at every place is at most this.
        name: of the new adapter; None: the old one's.
        writing: options of the format that is written: ``base_name`` for peft's config, ``component`` for diffusers' names.
        options: of the source's format: ``alpha`` for torchtune's files, ``part`` for files with several models in them.

    Returns:
        A row a place: the method before and after, rank, and the relative error of the update, 0 where it is the method itself.

    Raises:
        Unsupported: the format cannot hold the method and neither ``rank`` nor ``max_error`` says how good a LoRA is good enough.
        CheckpointMismatch: damaged or foreign files; missing and unused tensors in a table of three columns.
        NotMergeable: ``out`` exists. NoMatch, ShapeMismatch: it does not fit the base.
    """
    out = apart(out, [source, base])
    if out.exists():
        raise NotMergeable(f"{out} exists already; choose another folder for the converted adapter")
    check_size(rank, max_error)
    model = open_base(base, [source])
    saved = open_saved(source, model, **options)
    name = name or saved.group.name
    made = {"by": "convert", "format": saved.format, "source": Path(source).name, "mark": saved.mark}
    report = Table(("path", "method", "becomes", "rank", "error"), title=f"{saved.format} -> {to}")
    if rank is None and max_error is None:
        _as_it_is(saved, out, writing or {}, to=to, name=name, model=model, made=made, report=report)
        return report
    adapters, merged = merge_all([saved], [1.0], rule_entry("linear"), {}, model, rank=rank, max_error=max_error, seed=0)
    before = {a.site.name: type(a.config).__name__ for a in saved.adapters}
    for row in merged:
        report.add(row["path"], before.get(row["path"], ""), row["method"], row["rank"], row["error"])
    made["errors"] = {row["path"]: row["error"] for row in report}
    more = {"made": made, "notes": saved.notes, **(writing or {})}
    write_adapters(adapters, out, name=name, base=saved.base, model=model, format=to, **more)
    return report


def _as_it_is(
    saved: Saved, out: Path, writing: dict[str, Any], *, to: str, name: str, model: Any, made: dict[str, Any], report: Table
) -> None:
    """The same method in the other format, exactly."""
    try:
        more = {"made": made, "notes": saved.notes, **writing}
        write_adapters(saved.adapters, out, name=name, base=saved.base, model=model, format=to, **more)
    except Unsupported as error:
        raise Unsupported(f"{error}\nOr store it as a LoRA: rank=... (--rank), or max_error=... (--max-error)") from None
    from trimtab.compat.peft_files import read_config

    kept = {"peft": lambda: read_config(out)["peft_type"], "diffusers": lambda: "LoRA"}.get(to, lambda: None)()
    for adapter in saved.adapters:
        method = type(adapter.config).__name__
        report.add(adapter.site.name, method, kept or method, getattr(adapter.config, "rank", ""), 0.0)
