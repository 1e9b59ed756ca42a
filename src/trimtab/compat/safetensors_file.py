"""safetensors files a tensor at a time: headers checked to the byte, tensors read one by one, files written as a stream.

A file is eight bytes (the header's length, little endian), a JSON header ``{name: {dtype, shape, data_offsets}}``, and the tensors'
bytes one after another without gaps. Nothing here holds more than one tensor.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from trimtab.core.errors import CheckpointMismatch
from trimtab.core.reading import LONGEST, parse_json, regular_size

__all__ = ["DTYPES", "Entry", "Header", "dtype_name", "read_header", "read_tensor", "write_file"]

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool, "C64": torch.complex64,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MOST_AXES = 64  # of a tensor in torch
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: where its bytes are, counted from the file's first."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """A file's header: its entries in the order of their bytes, and its metadata."""

    file: Path
    entries: dict[str, Entry]
    metadata: dict[str, str]


def dtype_name(dtype: torch.dtype) -> str:
    """The format's name of a torch dtype."""
    return _NAMES[dtype]


def read_header(file: Path) -> Header:
    """The header of ``file``, after checking every offset against the others and against the file's length.

    Raises:
        CheckpointMismatch: with the file's name, and the byte where what is there is not what should be.
    """
    file = Path(file)
    size = regular_size(file)
    try:
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            raw = stream.read(length) if 8 + length <= size and length <= LONGEST else b""
    except OSError as error:
        raise CheckpointMismatch(f"{file} cannot be read: {error.strerror}") from None
    if size < 8:
        raise CheckpointMismatch(f"{file} is no safetensors file: it ends at byte {size}, inside the header's length at byte 0")
    if length > LONGEST:
        raise CheckpointMismatch(
            f"{file} is no safetensors file: the header's length at byte 0 says {length:,} bytes; up to {LONGEST:,} are read"
        )
    if 8 + length > size:
        raise CheckpointMismatch(
            f"{file} is truncated: its header goes to byte {8 + length:,}, the file ends at byte {size:,}; copy it again"
        )
    content = parse_json(raw, f"the header of {file}", start=8)
    if not isinstance(content, dict):
        raise CheckpointMismatch(f"{file} is damaged: its header at byte 8 is no JSON object")
    metadata = content.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointMismatch(f"{file} is damaged: the metadata of its header (byte 8) are not texts by name")
    entries = sorted((_entry(file, name, value, 8 + length) for name, value in content.items()), key=lambda e: (e.begin, e.end))
    _check_bytes(file, entries, 8 + length, size)
    return Header(file, {entry.name: entry for entry in entries}, metadata)


def _entry(file: Path, name: str, value: Any, start: int) -> Entry:
    try:
        (begin, end), dtype, shape = value["data_offsets"], value["dtype"], value["shape"]
        numbers = [begin, end, *shape]
        whole = isinstance(dtype, str) and isinstance(shape, list) and len(shape) <= _MOST_AXES and begin <= end
        whole = whole and all(type(v) is int and 0 <= v < 1 << 63 for v in numbers)
        whole = whole and math.prod(max(v, 1) for v in shape) < 1 << 63
    except (TypeError, KeyError, ValueError):
        whole = False
    if not whole:
        said = repr(value)
        said = said if len(said) < 200 else f"{said[:200]}..."
        raise CheckpointMismatch(f"{file} is damaged: its header (byte 8) says of {name!r} what no tensor has: {said}")
    return Entry(name, dtype, tuple(shape), start + begin, start + end)


def _check_bytes(file: Path, entries: list[Entry], start: int, size: int) -> None:
    at = start
    for entry in entries:
        if entry.begin != at:
            raise CheckpointMismatch(
                f"{file} is damaged at byte {at:,}: {entry.name!r} should begin there, and its header says {entry.begin:,}"
            )
        width = DTYPES[entry.dtype].itemsize if entry.dtype in DTYPES else None
        if width is not None and entry.end - entry.begin != width * math.prod(entry.shape):
            raise CheckpointMismatch(
                f"{file} is damaged at byte {entry.begin:,}: {entry.name!r} is {entry.dtype} of shape {list(entry.shape)}, "
                f"{width * math.prod(entry.shape):,} bytes, and has {entry.end - entry.begin:,}"
            )
        if entry.end > size:
            raise CheckpointMismatch(
                f"{file} is truncated: {entry.name!r} goes from byte {entry.begin:,} to {entry.end:,}, the file ends at byte "
                f"{size:,}; copy it again"
            )
        at = entry.end
    if at != size:
        raise CheckpointMismatch(f"{file} is damaged: its tensors end at byte {at:,}, the file at byte {size:,}")


def read_tensor(header: Header, name: str) -> Tensor:
    """One tensor on the CPU, in memory of its own.

    Raises:
        CheckpointMismatch: it is not in the file, of a dtype that torch lacks, or the file changed since its header was read.
    """
    entry = header.entries.get(name)
    if entry is None:
        raise CheckpointMismatch(f"{header.file} holds no tensor {name!r}")
    if entry.dtype not in DTYPES:
        raise CheckpointMismatch(f"{name!r} in {header.file} is of the dtype {entry.dtype}, which is not known here")
    raw = torch.empty(entry.end - entry.begin, dtype=torch.uint8)
    with open(header.file, "rb") as stream:
        stream.seek(entry.begin)
        read = stream.readinto(raw.numpy()) if len(raw) else 0
    if read != len(raw):
        raise CheckpointMismatch(f"{header.file} ends at byte {entry.begin + read:,}, inside {name!r}; it was changed meanwhile")
    return raw.view(DTYPES[entry.dtype]).reshape(entry.shape)


def write_file(
    file: Path,
    tensors: Iterable[tuple[str, str, tuple[int, ...] | None]],
    produce: Callable[[str], Tensor | tuple[Header, str]],
    *,
    metadata: Mapping[str, str],
    sizes: Mapping[str, int] | None = None,
) -> None:
    """Write ``file`` in one step (a hidden draft is renamed at the end), a tensor at a time.

    Args:
        tensors: ``(name, dtype, shape)`` in the order of their bytes; a shape of None is the tensor's own.
        produce: name -> the tensor, of that dtype and shape, or where its bytes stand in another file, to be copied as they are.
        sizes: bytes of the tensors whose dtype is not known here (four bits an entry, ...), which can only be copied.

    Raises:
        CheckpointMismatch: a tensor is not what was announced, or of a dtype that is not known.
    """
    listed = {name: (dtype, shape) for name, dtype, shape in tensors}
    unknown = [name for name, (dtype, _) in listed.items() if dtype not in DTYPES and name not in (sizes or {})]
    if unknown:
        raise CheckpointMismatch(f"{unknown[0]!r} is of the dtype {listed[unknown[0]][0]}, whose size is not known here")
    raw = _header(listed, metadata, sizes or {})
    open_shapes = any(shape is None for _, shape in listed.values())
    draft = file.with_name(f".{file.name}.part")
    with open(draft, "wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        for name, (dtype, shape) in listed.items():
            source = produce(name)
            if isinstance(source, tuple):
                _copy(stream, *source)
                continue
            if source.dtype != DTYPES.get(dtype) or tuple(source.shape) != (tuple(source.shape) if shape is None else tuple(shape)):
                raise CheckpointMismatch(f"{name!r} is {source.dtype} {tuple(source.shape)} where {dtype} {shape} is to be written")
            listed[name] = dtype, tuple(source.shape)
            stream.write(source.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        if open_shapes:  # now they are known; the room was left for them
            stream.seek(8)
            stream.write(_header(listed, metadata, sizes or {}).ljust(len(raw)))
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(draft, file)


def _header(
    listed: Mapping[str, tuple[str, tuple[int, ...] | None]], metadata: Mapping[str, str], sizes: Mapping[str, int]
) -> bytes:
    """The JSON, as long as it can become where a shape is not known yet."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, (dtype, shape) in listed.items():
        size = sizes.get(name) if dtype not in DTYPES else 10**15 if shape is None else DTYPES[dtype].itemsize * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": [10**15] if shape is None else list(shape), "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header, separators=(",", ":")).encode()
    return raw + b" " * (-len(raw) % 8)


def _copy(out: BinaryIO, header: Header, name: str) -> None:
    """Append the bytes of a tensor of another file."""
    entry = header.entries[name]
    left = entry.end - entry.begin
    with open(header.file, "rb") as stream:
        stream.seek(entry.begin)
        while left:
            piece = stream.read(min(_CHUNK, left))
            if not piece:
                raise CheckpointMismatch(
                    f"{header.file} ends at byte {entry.end - left:,}, inside {name!r}; it was changed meanwhile"
                )
            out.write(piece)
            left -= len(piece)
