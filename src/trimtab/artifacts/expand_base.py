"""expand_base and save_base: a sketch as the dense checkpoint that it stands for, and a changed model as a sketch again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.artifacts.sketch_writer import write_shard, write_tensors
from trimtab.compat.sketch_folder import MANIFEST, read_manifest, read_shard, seal
from trimtab.compat.sketched import SketchedWeight
from trimtab.core.errors import CheckpointMismatch, Unsupported
from trimtab.core.folders import apart
from trimtab.training.files import new_directory, write_text

__all__ = ["expand_base", "save_base"]


def expand_base(sketch: str | Path, out: str | Path) -> Path:
    """Write the dense checkpoint that the folder ``sketch`` stands for to the new folder ``out``, which transformers loads.

    Exact: a weight is looked up in its table; tensors get the dtypes of the source back. One shard at a time is in memory.

    Raises:
        CheckpointMismatch: ``sketch`` is no sketch, damaged or not finished. Unsupported: ``out`` exists already.
    """
    folder, out = Path(sketch), _new(apart(out, [sketch]))
    manifest = read_manifest(folder)
    names = list(manifest["shards"])
    whole = len(names) == 1
    index: dict[str, str] = {}
    size = 0
    with new_directory(out) as stage:
        _copy_others(folder, stage, names)
        for number, name in enumerate(names, 1):
            stored = read_shard(folder, manifest, name)
            tensors = {key: _dense(value, manifest["tensors"][key]["dtype"]) for key, value in stored.items()}
            file = "model.safetensors" if whole else f"model-{number:05d}-of-{len(names):05d}.safetensors"
            write_tensors(stage / file, tensors)
            index.update(dict.fromkeys(tensors, file))
            size += sum(value.nbytes for value in tensors.values())
        if not whole:
            content = {"metadata": {"total_size": size}, "weight_map": dict(sorted(index.items()))}
            write_text(stage / "model.safetensors.index.json", json.dumps(content, indent=1) + "\n")
    return out


def save_base(model: nn.Module, sketch: str | Path, out: str | Path) -> Path:
    """Write ``model``, which was loaded from the folder ``sketch``, to the new folder ``out`` as a sketch again.

    What an adapter was merged into (``into="requantised"``) is stored as it now is: learned tables beside the same codes, changed
    dense tensors in their old dtype. What the model has no parameter for stays as in ``sketch``.

    Raises:
        CheckpointMismatch: ``sketch`` is no sketch, or the model has a weight dense that it sketches. Unsupported: ``out`` exists.
    """
    folder, out = Path(sketch), _new(apart(out, [sketch]))
    manifest = read_manifest(folder)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    stored = dict(model.state_dict(keep_vars=True))
    with new_directory(out) as stage:
        _copy_others(folder, stage, list(manifest["shards"]))
        for name in manifest["shards"]:
            tensors = read_shard(folder, manifest, name)
            for key, old in tensors.items():
                new = next((stored[each] for each in (key, prefix + key, key.removeprefix(prefix)) if each in stored), old)
                tensors[key] = _again(key, new, old)
            manifest["shards"][name] = write_shard(stage / name, tensors)
        write_text(stage / MANIFEST, json.dumps({**manifest, "seal": seal(manifest)}, indent=1) + "\n")
    return out


def _again(key: str, new: Tensor, old: Tensor) -> Tensor:
    """``new`` as it is stored in the place of ``old``."""
    if isinstance(new, SketchedWeight) is not isinstance(old, SketchedWeight) or new.shape != old.shape:
        kinds = f"a {type(old).__name__} in the sketch and a {type(new).__name__} in the model"
        raise CheckpointMismatch(f"{key} is {kinds}: the model cannot be saved as this sketch; save it dense")
    if isinstance(new, SketchedWeight):
        return new.made_of(new.sketch_codes.cpu(), new.sketch_table.to("cpu", old.dtype))
    return new.detach().to("cpu", old.dtype)


def _dense(value: Tensor, dtype: str) -> Tensor:
    dense = value.dequantize() if isinstance(value, SketchedWeight) else value
    return dense.to(getattr(torch, dtype)).contiguous()


def _new(out: str | Path) -> Path:
    if Path(out).exists():
        raise Unsupported(f"{out} exists already; choose another folder")
    return Path(out)


def _copy_others(folder: Path, stage: Path, shards: list[str]) -> None:
    """What is no part of the sketch itself: configuration, tokenizer."""
    for path in _files(folder):
        if path.name != MANIFEST and path.name not in shards:
            target = stage / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def _files(folder: Path) -> Iterator[Any]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith("."))
