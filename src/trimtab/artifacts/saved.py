"""Saved adapters opened for work: on their base's modules, or on a model of shapes alone where no base is given."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.artifacts.base import Base, check, sample_of, values_in
from trimtab.artifacts.skeleton import skeleton
from trimtab.core.adapter_folder import adapter_in
from trimtab.core.checkpoint import fill, formats, read_manifest, read_saved, rebuild
from trimtab.core.contracts import Adapter
from trimtab.core.errors import Unsupported
from trimtab.core.recognition import check_options, recognise
from trimtab.core.state import Group

__all__ = ["Saved", "detect", "open_saved"]


@dataclass
class Saved:
    """One adapter, read whole.

    Attributes:
        source: where it was read.
        format: ``"trimtab"`` or another format's name.
        group: its adapters, in evaluation mode, and its name.
        base: the sample of its base's weights that it carries, empty where its format has none.
        mark: a hash of its files' content.
        notes: what it remembers of its model (see ``core.notes``).
    """

    source: str
    format: str
    group: Group
    base: dict[str, Any]
    mark: str
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def adapters(self) -> list[Adapter]:
        """One a place."""
        return self.group.adapters


def detect(path: Path) -> str:
    """The name of the format of what is at ``path``.

    Raises:
        CheckpointMismatch: nothing that is known.
    """
    return recognise(path, formats)


def class_of(path: Path) -> str | None:
    """The class of the base that an adapter was saved from, where its format says it."""
    return read_manifest(path)["base"]["class"] if detect(path) == "trimtab" else None


def places_of(path: Path) -> list[dict[str, Any]]:
    """The places of a saved adapter, as a manifest lists them, read without a base.

    Raises:
        Unsupported: its format does not tell the shapes.
    """
    kind = detect(path)
    return read_manifest(path)["places"] if kind == "trimtab" else formats()[kind].places(path)


def open_saved(path: str | os.PathLike, base: Base | None = None, **options: Any) -> Saved:
    """Read the adapter at ``path``, of any known format.

    Args:
        base: its base; None: shapes come from the adapter itself.
        options: what the format's reader takes besides (``alpha`` for torchtune's files, ...).

    Raises:
        CheckpointMismatch: damaged, foreign, or another base's. NoMatch, ShapeMismatch: it does not fit the base.
        Unsupported: its format needs the base.
    """
    path = adapter_in(Path(path))
    kind = detect(path)
    notes: dict[str, Any] = {}
    check_options(kind, None if kind == "trimtab" else formats()[kind], options, path)
    if kind == "trimtab":
        manifest, tensors = read_saved(path)
        name, sample, mark, notes = manifest["name"], manifest["base"], manifest["seal"], manifest.get("model", {})
        root, view = (skeleton(manifest["places"], sample["class"]) if base is None else base.root), None
        if "cut" in manifest:
            if base is None:
                raise Unsupported(f"{path} was trained on a cut base, whose sizes the whole one knows; say which base: base=...")
            from trimtab.schedules.restoration import widened

            manifest, tensors, view = widened(root, manifest, tensors)
        adapters = rebuild(root, manifest)
        if base is not None:
            check(base, sample, str(path), adapters=adapters, view=view)
        if view is not None:  # what is made of it is for the whole base
            sample = sample_of(base, adapters)
    else:
        name, adapters, tensors = _read(path, kind, base, options)
        sample = {"class": "unknown", "samples": {}} if base is None else sample_of(base, adapters)
        mark = _mark(path, options)
    for adapter in adapters:
        if adapter.site.is_meta:
            adapter.site.device = torch.device("cpu")  # the base's modules may have no values, the adapter has
    fill(adapters, tensors, str(path))
    for adapter in adapters:
        adapter.eval().requires_grad_(False)
    return Saved(str(path), kind, Group(name, adapters, trainable=False), sample, mark, notes)


def _read(path: Path, kind: str, base: Base | None, options: dict[str, Any]) -> tuple[str, list[Adapter], dict[str, Tensor]]:
    """What the reader of a format finds; on a base of shapes alone once more with values, where a start is computed from them."""
    format = formats()[kind]
    root = skeleton(format.places(path), "unknown") if base is None else base.root
    found = format.read(root, path, **options)
    places = {f"{a.site.path}.{a.site.slot}": a.site for a in found[1]}
    empty = [places[key.rpartition(".")[0]] for key, value in found[2].items() if value.is_meta]
    if not empty:
        return found
    if base is None:
        raise Unsupported(f"{path} starts from the base's weights at {empty[0].name}; say which base it is for: base=...")
    with values_in(base, empty):
        return format.read(root, path, **options)


def _mark(path: Path, options: dict[str, Any]) -> str:
    """A hash of the content of a file, or of all files of a folder."""
    total = hashlib.sha256(json.dumps(options, sort_keys=True, default=str).encode())
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.is_file():
            with open(file, "rb") as stream:
                total.update(file.name.encode() + hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()
