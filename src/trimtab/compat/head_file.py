"""A trained head beside a checkpoint of which no class of transformers makes one model.

``trimtab_head.json`` says what the head is and where its tensors are (``trimtab_head.safetensors``). The checkpoint itself
stays a plain encoder, so that no class of transformers takes the head's tensors for its own and computes something else.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from trimtab.compat.safetensors_file import read_header, read_tensor
from trimtab.core.errors import CheckpointMismatch

__all__ = ["HEAD", "HEAD_TENSORS", "head_entry", "is_headed", "read_head"]

HEAD, HEAD_TENSORS = "trimtab_head.json", "trimtab_head.safetensors"
FORMAT, VERSION = "trimtab-head", 1


def head_entry(class_name: str, prefix: str, notes: dict[str, Any], tensors: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """The content of ``trimtab_head.json``.

    Args:
        class_name: of the model that was trained.
        prefix: under which the encoder stood in it.
        notes: what the adapter remembers of it: ``labels``, ``pooling`` and the like.
        tensors: the head's, as the model names them, with their shapes.
    """
    listed = {name: list(shape) for name, shape in tensors.items()}
    return {"format": FORMAT, "version": VERSION, "class": class_name, "prefix": prefix, "tensors": listed, **notes}


def is_headed(folder: Path) -> bool:
    """Whether a head stands beside the checkpoint in ``folder``."""
    return (Path(folder) / HEAD).is_file()


def read_head(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What ``trimtab_head.json`` says, and the head's tensors.

    Raises:
        CheckpointMismatch: there is none, it is damaged, or it is of a later version.
    """
    file = Path(folder) / HEAD
    try:
        entry = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointMismatch(f"{folder} has no {HEAD}: it is no merged classifier of trimtab's") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointMismatch(f"{file} is damaged: {error}") from None
    if not isinstance(entry, dict) or entry.get("format") != FORMAT or not isinstance(entry.get("tensors"), dict):
        raise CheckpointMismatch(f"{file} is damaged: it is no {FORMAT}")
    if not isinstance(entry.get("version"), int) or entry["version"] > VERSION:
        raise CheckpointMismatch(f"{file} has version {entry.get('version')!r}; this trimtab reads up to {VERSION}: upgrade it")
    header = read_header(Path(folder) / HEAD_TENSORS)
    found = {name: list(e.shape) for name, e in header.entries.items()}
    if found != entry["tensors"]:
        raise CheckpointMismatch(f"{file} is damaged: it lists other tensors than {HEAD_TENSORS} holds")
    return entry, {name: read_tensor(header, name) for name in found}
