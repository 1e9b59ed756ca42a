"""Files of named tensors that other libraries wrote, safetensors or torch's, read whole: the one way of all foreign readers.

What is there is checked before any of it is used: a safetensors header to the byte, a zip of torch's by the checksums of its
entries, which ``torch.load`` does not ask for, every value for being finite. Tensors are read one by one, so that no more than
the result is held at once. Half-precision ones become float32.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.compat.safetensors_file import read_header, read_tensor
from trimtab.core.errors import CheckpointMismatch
from trimtab.core.reading import check_finite, regular_size

__all__ = ["PICKLES", "SUFFIXES", "keys_of", "only_file", "read_tensors"]

PICKLES = (".pt", ".pth", ".bin")
SUFFIXES = (".safetensors", *PICKLES)
_CHUNK = 1 << 20


def only_file(path: Path, names: Iterable[str] = ()) -> Path | None:
    """``path`` itself if it is a file of tensors, or the one such file of a folder: one of ``names``, else the only one."""
    if path.is_file():
        return path if path.suffix in SUFFIXES else None
    if not path.is_dir():
        return None
    named = [path / name for name in names if (path / name).is_file()]
    found = named[:1] or [p for p in sorted(path.iterdir()) if p.suffix in SUFFIXES and p.is_file()]
    return found[0] if len(found) == 1 else None


def keys_of(file: Path) -> list[str]:
    """The names of a file's tensors.

    Raises:
        CheckpointMismatch: it is damaged, so that nobody can tell whose it is.
    """
    return list(read_header(file).entries) if file.suffix == ".safetensors" else list(_load_torch(file))


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a file, half-precision ones as float32.

    Raises:
        CheckpointMismatch: damaged, no such file, or NaN and infinite values in it.
    """
    if file.suffix == ".safetensors":
        header = read_header(file)
        stored = {key: _wide(read_tensor(header, key)) for key in header.entries}
    else:
        raw = _load_torch(file)
        stored = {}
        shared: dict[int, Tensor] = {}  # a tensor under two names stays one
        for key in list(raw):
            value = raw.pop(key)
            stored[key] = shared.setdefault(id(value), _wide(value.detach()))
    check_finite(stored, str(file))
    return stored


def _wide(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() and value.dtype.itemsize < 4 else value


def _load_torch(file: Path) -> dict[str, Tensor]:
    """What ``torch.save`` wrote, if it is a dictionary of tensors; nothing but tensors is ever unpickled.

    Raises:
        CheckpointMismatch: damaged, or something else.
    """
    size = regular_size(file)
    with open(file, "rb") as stream:
        zipped = stream.read(2) == b"PK"
    if zipped:
        _check_zip(file, size)
    try:
        stored = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no error type of its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointMismatch(f"{file} cannot be read ({reason}); it ends at byte {size:,}: restore it from a copy") from None
    if not isinstance(stored, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in stored.items()):
        raise CheckpointMismatch(f"{file} is no file of named tensors alone")
    _check_tensors(stored, file, size)
    return stored


def _check_zip(file: Path, size: int) -> None:
    """Compare every entry with its checksum.

    Raises:
        CheckpointMismatch: one differs, or is not stored as it is, as torch stores them.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            odd = [e.filename for e in entries if e.compress_type != zipfile.ZIP_STORED or e.compress_size != e.file_size]
            if odd or sum(entry.file_size for entry in entries) > size or len({e.filename for e in entries}) < len(entries):
                what = f"{odd[0]!r} is compressed" if odd else "its entries overlap"
                raise CheckpointMismatch(f"{file} is no file that torch wrote: {what}; it is damaged, or made to do harm")
            for entry in entries:
                with archive.open(entry) as stream:
                    while stream.read(_CHUNK):
                        pass
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError, ValueError) as error:
        raise CheckpointMismatch(f"{file} cannot be read ({error}); it ends at byte {size:,}: restore it from a copy") from None


def _check_tensors(stored: dict[str, Any], file: Path, size: int) -> None:
    """Refuse tensors that are no plain arrays of numbers, or that claim more of them than the file holds."""
    total = 0
    for key, value in {id(value): (key, value) for key, value in stored.items()}.values():
        if type(value) not in (Tensor, torch.nn.Parameter) or value.layout is not torch.strided or value.is_quantized:
            raise CheckpointMismatch(f"{key} in {file} is a {type(value).__name__} of layout {value.layout}, and no plain tensor")
        if value.is_meta:
            raise CheckpointMismatch(f"{key} in {file} was saved on the meta device, without values")
        total += value.numel() * value.element_size()
    if total > 2 * size:
        raise CheckpointMismatch(f"{file} has {size:,} bytes, and its tensors claim {total:,}: it is damaged, or made to do harm")
