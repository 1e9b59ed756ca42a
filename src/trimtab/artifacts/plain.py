"""Tensors that are stored as they are, or rounded: what a compressed update does not make ternary.

``raw`` keeps every bit; ``float16`` and ``bfloat16`` round; ``int8`` rounds each row (the first axis; a vector is one row) to 255
steps of its largest magnitude, with one float32 a row: ``q = round(127 x / max|x|)``. zlib follows where it saves a tenth.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor

from trimtab.core.errors import Unsupported, nearest
from trimtab.core.reading import inflate

__all__ = ["PLAIN", "pack_plain", "unpack_plain"]

PLAIN = ("raw", "float16", "bfloat16", "int8")


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _tensor(data: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    size = torch.empty((), dtype=dtype).element_size()
    count = torch.Size(shape).numel()
    if len(data) != size * count:
        raise ValueError(f"{len(data)} bytes for {count} numbers of {size} bytes")
    if not count:
        return torch.empty(shape, dtype=dtype)
    # a copy: numpy's view of the bytes cannot be written to
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy()).view(dtype).reshape(shape)


def _rows(shape: tuple[int, ...]) -> int:
    return shape[0] if len(shape) > 1 else 1


def pack_plain(tensor: Tensor, store: str) -> bytes:
    """The bytes of one tensor; a first byte tells whether the rest went through zlib.

    Raises:
        Unsupported: ``store`` is none of ``PLAIN``.
    """
    if store == "raw":
        data = _bytes(tensor)
    elif store in ("float16", "bfloat16"):
        data = _bytes(tensor.to(getattr(torch, store)))
    elif store == "int8":
        flat = tensor.detach().float().cpu().reshape(_rows(tuple(tensor.shape)), -1)
        scale = flat.abs().amax(1, keepdim=True) / 127 if flat.numel() else flat.new_zeros(len(flat), 1)
        steps = (flat / scale.clamp_min(torch.finfo(torch.float32).tiny)).round().clamp(-127, 127)
        data = _bytes(scale) + _bytes(steps.to(torch.int8))
    else:
        raise Unsupported(f"unknown way to store a tensor: {store!r}{nearest(str(store), PLAIN)}")
    small = zlib.compress(data, 9)
    return b"\1" + small if len(small) < 0.9 * len(data) else b"\0" + data


def unpack_plain(payload: bytes, store: str, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """What ``pack_plain`` was given, rounded as ``store`` says, in the dtype that it had.

    Raises:
        ValueError: the bytes are not those of such a tensor (``CheckpointMismatch`` is one).
    """
    kind = getattr(torch, dtype)
    size = torch.Size(shape).numel()
    wanted = size * (1 if store == "int8" else (kind if store == "raw" else getattr(torch, store)).itemsize)
    wanted += 4 * _rows(shape) * (store == "int8")
    data = inflate(payload[1:], "a stored tensor", most=wanted) if payload[:1] == b"\1" else payload[1:]
    if store == "raw":
        return _tensor(data, kind, shape)
    if store != "int8":
        return _tensor(data, getattr(torch, store), shape).to(kind)
    rows = _rows(shape)
    scale = _tensor(data[: 4 * rows], torch.float32, (rows, 1))
    steps = _tensor(data[4 * rows :], torch.int8, shape)
    return (steps.float().reshape(rows, -1) * scale).reshape(shape).to(kind) if steps.numel() else steps.to(kind)
