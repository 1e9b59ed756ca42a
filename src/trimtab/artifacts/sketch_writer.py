"""The folder that a sketch is written to, shard by shard: each one in one step, so that an interrupted run goes on behind it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.artifacts.sketch_plan import Plan, Shard
from trimtab.compat.safetensors_file import dtype_name, write_file
from trimtab.compat.sketch_folder import CODES, FORMAT, MANIFEST, TABLE, VERSION, is_sketch, read_manifest, read_shard, seal, sha256
from trimtab.compat.sketched import SketchedWeight
from trimtab.core.errors import CheckpointMismatch, Unsupported
from trimtab.training.files import new_file, write_text

__all__ = ["SketchWriter", "write_shard", "write_tensors"]


class SketchWriter:
    """Opens ``folder`` for the sketch that ``plan`` and ``settings`` describe, or takes up one that was begun there.

    Raises:
        Unsupported: the folder holds something else, or a sketch of another source or with other settings.
        CheckpointMismatch: what was begun is damaged.
    """

    def __init__(self, folder: Path, plan: Plan, settings: Mapping[str, Any]):
        self.folder, self.plan = folder, plan
        source = {
            "name": plan.source.name,
            "class": type(plan.model).__name__,
            "dtype": _name(plan.dtype),
            "fingerprint": plan.source.fingerprint(),
        }
        shards: dict[str, str | None] = {shard.file: None for shard in plan.shards}
        self.manifest: dict[str, Any] = {
            "format": FORMAT, "version": VERSION, "settings": dict(settings), "source": source, "shards": shards, "tensors": {},
        }  # fmt: skip
        if is_sketch(folder):
            self._take_up()
        elif folder.exists() and (not folder.is_dir() or any(not _is_draft(path) for path in folder.iterdir())):
            raise Unsupported(f"{folder} exists and is no sketch; choose another folder, or empty it")

    def _take_up(self) -> None:
        """Go on with the sketch that is there."""
        earlier = read_manifest(self.folder, unfinished=True)
        differing = [
            f"{key} = {earlier[part].get(key)!r} there, {value!r} now"
            for part in ("settings", "source")
            for key, value in self.manifest[part].items()
            if key != "name" and earlier[part].get(key) != value
        ]
        if differing or earlier["shards"].keys() != self.manifest["shards"].keys():
            raise Unsupported(
                f"{self.folder} holds another sketch ({', '.join(differing) or 'cut into other shards'}); choose another folder"
            )
        for name, digest in earlier["shards"].items():
            file = self.folder / name
            if digest is not None and (not file.is_file() or sha256(file) != digest):
                raise CheckpointMismatch(f"{file} is damaged or gone, though {MANIFEST} calls it finished; empty {self.folder}")
        self.manifest = earlier

    def begin(self) -> None:
        """Make the folder, with the source's other files."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write_manifest()  # first, so that whoever comes after a kill knows what was begun here
        for path in self.plan.source.others():
            (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
            with new_file(self.folder / path) as stage:
                shutil.copyfile(self.plan.source.folder / path, stage)

    def finished(self, shard: Shard) -> bool:
        """Whether ``shard`` is there."""
        return self.manifest["shards"][shard.file] is not None

    def add(self, shard: Shard, tensors: Mapping[str, Tensor], facts: Mapping[str, Mapping[str, Any]]) -> None:
        """Write one shard.

        Args:
            tensors: by the source's names; sketched ones as ``SketchedWeight``.
            facts: of sketched tensors, for the manifest.
        """
        digest = write_shard(self.folder / shard.file, tensors)
        for key, value in tensors.items():
            entry = {"file": shard.file, "shape": list(value.shape), "dtype": _name(self.plan.source.dtype(key))}
            if isinstance(value, SketchedWeight):
                entry |= {"bits": value.bits, "groups": value.sketch_table.shape[1], "transposed": value.transposed, **facts[key]}
            self.manifest["tensors"][key] = entry
        self.manifest["shards"][shard.file] = digest
        self._write_manifest()

    def read(self, file: str) -> dict[str, Tensor]:
        """The tensors of a shard that is there."""
        return read_shard(self.folder, self.manifest, file)

    def _write_manifest(self) -> None:
        sealed = {**self.manifest, "seal": seal(self.manifest)}
        write_text(self.folder / MANIFEST, json.dumps(sealed, indent=1) + "\n")


def _is_draft(path: Path) -> bool:
    """Whether a killed writer left it, before the sketch had its manifest."""
    return path.name.startswith(f".{MANIFEST}.") and path.name.endswith(".part")


def write_shard(file: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors, sketched or not, to one safetensors file in one step; returns its SHA-256."""
    flat: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if isinstance(value, SketchedWeight):
            flat[key + CODES], flat[key + TABLE] = value.sketch_codes, value.sketch_table
        else:
            flat[key] = value
    write_tensors(file, flat)
    return sha256(file)


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write ``tensors`` to one safetensors file in one step; the same bytes whenever they are the same."""
    listed = ((key, dtype_name(value.dtype), tuple(value.shape)) for key, value in tensors.items())
    write_file(file, listed, tensors.__getitem__, metadata={"format": "pt"})


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
