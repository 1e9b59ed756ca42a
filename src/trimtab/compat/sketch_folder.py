"""A folder that holds a transformers model as its sketch: what ``trimtab compress-base`` writes and every loader reads.

Beside the files of the source (configuration, tokenizer) it has::

    sketch.json                          what the folder is; sealed, rewritten whenever a shard is finished
    sketch-00001-of-00003.safetensors    tensors under the source's names; a sketched one as NAME:codes and NAME:table

There is no ``model.safetensors``, so that a reader which knows nothing of sketches fails instead of starting from random weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.compat.safetensors_file import read_header, read_tensor
from trimtab.compat.sketched import SketchedWeight
from trimtab.core.errors import CheckpointMismatch, raise_all
from trimtab.core.reading import inside, read_json

__all__ = [
    "CODES", "FORMAT", "MANIFEST", "TABLE", "VERSION", "is_sketch", "load_sketch", "read_all", "read_manifest", "read_shard",
    "seal", "sha256", "shapes_of_sketch",
]  # fmt: skip

VERSION = 1
MANIFEST = "sketch.json"
FORMAT = "trimtab sketch"
CODES, TABLE = ":codes", ":table"
_KEYS = ("settings", "source", "shards", "tensors", "seal")


def is_sketch(folder: str | Path) -> bool:
    """Whether ``folder`` calls itself a sketch, finished or not."""
    return (Path(folder) / MANIFEST).is_file()


def sha256(file: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def seal(manifest: dict[str, Any]) -> str:
    """SHA-256 of the manifest's content, so that an edit is noticed."""
    content = {key: value for key, value in manifest.items() if key != "seal"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path, *, unfinished: bool = False) -> dict[str, Any]:
    """What ``sketch.json`` says, checked.

    Args:
        unfinished: take one whose shards are not all there.

    Raises:
        CheckpointMismatch: there is none, it is damaged or of a later version, or shards are missing.
    """
    file = Path(folder) / MANIFEST
    if not file.is_file():
        found = sorted(p.name for p in Path(folder).iterdir())[:5] if Path(folder).is_dir() else ["no such folder"]
        raise CheckpointMismatch(f"{folder} is no sketch: there is no {MANIFEST} (found: {', '.join(found) or 'nothing'})")
    manifest = read_json(file, finite=False)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointMismatch(f"{file} is not the {MANIFEST} of a trimtab sketch")
    if not isinstance(manifest.get("version"), int) or manifest["version"] > VERSION:
        raise CheckpointMismatch(f"{file} has version {manifest.get('version')!r}; this trimtab reads up to {VERSION}: upgrade it")
    missing = [key for key in _KEYS if key not in manifest]
    if missing:
        raise CheckpointMismatch(f"{file} is damaged: it lacks {', '.join(missing)}")
    if manifest["seal"] != seal(manifest):
        raise CheckpointMismatch(f"{file} was changed after it was written: its seal does not fit its content")
    odd = [key for key, entry in manifest["tensors"].items() if not _is_entry(entry)] if _tables(manifest) else ["it"]
    if odd:
        raise CheckpointMismatch(f"{file} is damaged: it says of {odd[0]} what no tensor of a sketch has")
    waiting = [name for name, digest in manifest["shards"].items() if digest is None]
    if waiting and not unfinished:
        raise CheckpointMismatch(
            f"{folder} is not finished: {len(waiting)} of {len(manifest['shards'])} shards are missing, from {waiting[0]} on; "
            "run the same trimtab compress-base again, it goes on where it was interrupted"
        )
    return manifest


def _tables(manifest: dict[str, Any]) -> bool:
    """Whether the manifest's own entries are of the right kinds."""
    shards, source = manifest["shards"], manifest["source"]
    named = isinstance(shards, dict) and all(digest is None or isinstance(digest, str) for digest in shards.values())
    dtype = getattr(torch, str(source.get("dtype")), None) if isinstance(source, dict) else None
    return named and isinstance(dtype, torch.dtype) and isinstance(manifest["tensors"], dict)


def _is_entry(entry: Any) -> bool:
    """Whether a value of the manifest can be the entry of a tensor."""
    if not isinstance(entry, dict) or not isinstance(entry.get("file"), str) or not isinstance(entry.get("shape"), list):
        return False
    if not all(type(size) is int and 0 <= size < 1 << 48 for size in entry["shape"]):
        return False
    if "bits" not in entry:
        return True
    counts = all(type(entry.get(key)) is int and 0 < entry[key] < 1 << 32 for key in ("bits", "groups"))
    return counts and entry["bits"] <= 8 and isinstance(entry.get("transposed"), bool) and len(entry["shape"]) == 2


def read_shard(folder: Path, manifest: dict[str, Any], name: str) -> dict[str, Tensor]:
    """The tensors of one shard by the source's names; sketched ones as ``SketchedWeight``.

    Raises:
        CheckpointMismatch: the file is missing, damaged, or holds other tensors than the manifest says.
    """
    file = inside(Path(folder), name, Path(folder) / MANIFEST)
    if not file.is_file():
        raise CheckpointMismatch(f"{folder} is damaged: its {MANIFEST} names {name}, which is not there")
    if sha256(file) != manifest["shards"][name]:
        raise CheckpointMismatch(f"{file} is damaged or was changed: its SHA-256 is not {MANIFEST}'s; restore it from a copy")
    header = read_header(file)
    stored = {key: read_tensor(header, key) for key in header.entries}
    found: dict[str, Tensor] = {}
    for key, entry in manifest["tensors"].items():
        if entry["file"] != name:
            continue
        parts = [key + CODES, key + TABLE] if "bits" in entry else [key]
        if any(part not in stored for part in parts):
            raise CheckpointMismatch(f"{file} is damaged: it lacks {' or '.join(parts)}")
        tensors = [stored.pop(part) for part in parts]
        found[key] = SketchedWeight(*tensors, transposed=entry["transposed"]) if "bits" in entry else tensors[0]
        if list(found[key].shape) != entry["shape"]:
            raise CheckpointMismatch(f"{key} in {file} is {list(found[key].shape)}, and {MANIFEST} says {entry['shape']}")
    if stored:
        raise CheckpointMismatch(f"{file} has tensors that {MANIFEST} does not name: {', '.join(sorted(stored)[:3])}")
    return found


def read_all(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The manifest, and every tensor by the source's names.

    Raises:
        CheckpointMismatch: all that is wrong with the shards, together.
    """
    manifest = read_manifest(folder)
    tensors: dict[str, Tensor] = {}
    problems = []
    for name in manifest["shards"]:
        try:
            tensors.update(read_shard(folder, manifest, name))
        except CheckpointMismatch as error:
            problems.append(error)
    raise_all(problems)
    return manifest, tensors


def load_sketch(load: Callable[..., nn.Module], folder: str | Path, **options: Any) -> nn.Module:
    """``load(folder, **options)`` for a folder that holds a sketch: the model with its sketched weights, frozen.

    The model computes in the dtype of the source unless ``dtype=`` says otherwise; no dense weight of a sketched layer is made.

    Args:
        load: ``from_pretrained`` of a transformers model or auto class.
        options: of ``from_pretrained``.

    Raises:
        CheckpointMismatch: the folder is damaged, not finished, or the model has none of the sketched weights.
    """
    from transformers import AutoConfig

    folder = Path(folder)
    manifest, tensors = read_all(folder)
    dtype = options.pop("dtype", "auto")  # before the configuration takes it for one of its own
    given = options.pop("config", None)
    if given is None:
        options = {"trust_remote_code": False} | options
        given, options = AutoConfig.from_pretrained(folder, return_unused_kwargs=True, **options)
    if dtype == "auto":
        dtype = getattr(torch, manifest["source"]["dtype"])
    model = _class(load.__self__, given).from_pretrained(None, config=given, state_dict=tensors, dtype=dtype, **options)
    model.config.name_or_path = str(folder)
    weights = [value for value in model.parameters() if isinstance(value, SketchedWeight)]
    if not weights:
        held = manifest["source"]["class"]
        raise CheckpointMismatch(f"{folder} holds a {held}; {type(model).__name__} has none of the weights that are sketched there")
    for weight in weights:
        weight.requires_grad_(False)
    return model


def shapes_of_sketch(model: nn.Module, folder: str | Path, dtype: torch.dtype) -> nn.Module:
    """Give ``model``, on the meta device, sketched weights of the layout that ``folder`` has, without values. Returns ``model``."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    known = dict(model.named_parameters())
    for key, entry in read_manifest(Path(folder))["tensors"].items():
        name = next((each for each in (key, prefix + key, key.removeprefix(prefix)) if each in known), None)
        if name is None or "bits" not in entry:
            continue
        out, fan_in = entry["shape"][::-1] if entry["transposed"] else entry["shape"]
        size = fan_in // entry["groups"] * entry["bits"] // 8
        codes = torch.empty(out, entry["groups"], size, dtype=torch.uint8, device="meta")
        table = torch.empty(out, entry["groups"], 1 << entry["bits"], dtype=dtype, device="meta")
        weight = nn.Parameter(SketchedWeight(codes, table, transposed=entry["transposed"]), requires_grad=False)
        path, _, last = name.rpartition(".")
        model.get_submodule(path)._parameters[last] = weight
    return model


def _class(cls: Any, config: Any) -> Any:
    """The model class that an auto class stands for; any other class itself."""
    mapping = getattr(cls, "_model_mapping", None)
    if mapping is None:
        return cls
    if type(config) not in mapping:
        raise ValueError(f"{cls.__name__} has no model for a {type(config).__name__}")
    found = mapping[type(config)]
    if not isinstance(found, (list, tuple)):
        return found
    return next((each for each in found if each.__name__ in (config.architectures or ())), found[0])
