"""The base of saved adapters as a checkpoint folder: found by its id, with the modules and the heads that the adapters name."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import nn

from trimtab.artifacts.saved import places_of
from trimtab.artifacts.skeleton import skeleton
from trimtab.compat.pretrained import Pretrained
from trimtab.core.errors import CheckpointMismatch, Unsupported

__all__ = ["local_folder", "open_folder"]


def local_folder(base: str | os.PathLike) -> Path:
    """The folder of a model: a path, a packaged model's, or the Hub's (from the cache, else it is fetched).

    Raises:
        CheckpointMismatch: there is none.
    """
    from trimtab.training.models import resolve

    name = resolve(os.fspath(base))
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, ignore_patterns=["*.bin", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.pt", "*.pth"]))
    except (HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointMismatch(f"{name} is no model folder here, and cannot be had from the Hub: {reason}") from None


def open_folder(base: str | os.PathLike, classes: Sequence[str | None], adapters: Iterable[str | os.PathLike]) -> Pretrained:
    """The checkpoint as a base for these adapters; heads that they bring along are added to its modules.

    Raises:
        CheckpointMismatch: damaged or foreign files. Unsupported: a class that transformers does not have.
    """
    places = []
    for path in adapters:
        try:
            places += places_of(Path(path))
        except Unsupported:  # a format that does not tell shapes; the config's own class must do
            continue
    found = Pretrained(local_folder(base), classes, places)
    have = {path for path, _ in found.root.named_modules()}
    heads = [p for p in places if p["path"] not in have and p.get("method", {}).get("name") == "Unfreeze"]
    for path, module in skeleton(heads).named_modules() if heads else ():
        if path in {p["path"] for p in heads}:
            _put(found.root, path, module)
    return found


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    for step in filter(None, parent.split(".")):
        root = root._modules.setdefault(step, nn.Module())
    root._modules[name] = module
