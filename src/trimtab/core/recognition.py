"""What lies at a path: which format of a saved adapter, or in a sentence what it is instead."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trimtab.core.errors import CheckpointMismatch, Unsupported, nearest
from trimtab.core.folders import recover
from trimtab.core.reading import listed, regular_size

__all__ = ["MANIFEST", "check_options", "recognise"]

MANIFEST = "manifest.json"
#: files that are parts of an adapter's folder, and mean nothing alone
_PARTS = ("manifest.json", "adapter_config.json", "adapter_model", "adapter-", "adapters.safetensors", "head_config.json")
_HEAD = 16


def recognise(path: Path, formats: Callable[[], Mapping[str, Any]]) -> str:
    """The name of the format of what is at ``path``: ``"trimtab"`` or one of ``formats()``.

    Raises:
        CheckpointMismatch: nothing that is known, with a word on what it is; or damaged, so that it cannot be told.
    """
    path = Path(path)
    recover(path)
    if (path / MANIFEST).exists():
        return "trimtab"
    if not path.exists():
        raise CheckpointMismatch(f"{path} holds no trimtab adapter: it does not exist")
    if not path.is_dir():
        regular_size(path)
    known = formats()
    found = next((name for name, format in known.items() if format.test(path)), None)
    if found is not None:
        return found
    if path.is_dir():
        inside = listed(p.name for p in path.iterdir())
        several = sum(p.suffix in (".safetensors", ".bin", ".pt") for p in path.iterdir()) > 1
        hint = "; of several files of tensors, give the one that is meant" if several else ""
        raise CheckpointMismatch(f"{path} holds no trimtab adapter: there is no {MANIFEST} (found: {inside}){hint}")
    names = ", ".join(["trimtab", *known])
    raise CheckpointMismatch(f"{path} is a file of no known adapter format{_hint(path)}; known formats: {names}")


def _hint(path: Path) -> str:
    """A clause that says what a file is, as far as its name or first bytes tell."""
    if path.name.startswith(_PARTS):
        return f" alone: it is a part of an adapter of trimtab, peft, adapters or MLX; give its folder, {path.parent}"
    with open(path, "rb") as stream:
        head = stream.read(_HEAD)
    if not head:
        return " (it is empty)"
    if head.startswith(b"GGUF"):
        return " (it is a GGUF file; convert it with the tools of llama.cpp first)"
    if path.suffix == ".safetensors":
        return " (its tensors' names are those of no adapter that is read here)"
    return f" (it starts with {head!r})"


def check_options(kind: str, format: Any, options: Mapping[str, Any], path: Path, *, verb: str = "read") -> None:
    """Whether a format's reader, or its ``save``, takes ``options``.

    Raises:
        Unsupported: it does not know one of them.
    """
    if not options:
        return
    if format is None:
        raise Unsupported(f"{path} is trimtab's own; {', '.join(options)} cannot be said of it")
    common = ("root", "model", "path", "folder", "name", "trainable", "check_base")
    known = [name for name in inspect.signature(getattr(format, verb)).parameters if name not in common]
    strange = [key for key in options if key not in known]
    if strange:
        said = f"{path} is of the format {kind}, of which {', '.join(strange)} cannot be said"
        raise Unsupported(said + nearest(strange[0], known))
