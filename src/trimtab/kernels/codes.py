"""Small integers packed without gaps, most significant bit first: a byte's first code stands in its highest bits.

Codes of ``bits`` bits (1 to 8) along the last axis become ``count * bits / 8`` bytes. For 4 bits this is the published sketches'
layout: byte j holds code 2j in its high and code 2j + 1 in its low half. ``gather`` reads table entries by packed codes;
where a whole byte names a run of entries (1, 2, 4, 8 bits), it looks up the run at once, in a table of all bytes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from trimtab.core.errors import ShapeMismatch

__all__ = ["check_layout", "gather", "pack", "unpack"]


def check_layout(count: int, bits: int, what: str = "codes") -> None:
    """Whether ``count`` codes of ``bits`` bits fill whole bytes.

    Raises:
        ShapeMismatch: they do not, or ``bits`` is not 1 to 8.
    """
    if not isinstance(bits, int) or isinstance(bits, bool) or not 1 <= bits <= 8:
        raise ShapeMismatch(f"codes have 1 to 8 bits, found bits={bits!r}")
    if count * bits % 8:
        run = _period(bits)[0]
        raise ShapeMismatch(
            f"{count} {what} of {bits} bits do not fill whole bytes; pad them by {-count % run} to {count + -count % run}, "
            f"a multiple of {run}"
        )


def _period(bits: int) -> tuple[int, int]:
    """The shortest run of codes that fills whole bytes: (codes, bytes)."""
    common = math.gcd(bits, 8)
    return 8 // common, bits // common


def pack(codes: Tensor, bits: int) -> Tensor:
    """``(..., count)`` uint8 codes below ``2^bits`` -> ``(..., count * bits / 8)`` bytes.

    Raises:
        ShapeMismatch: codes of another dtype, too large, or a count that leaves a byte half filled.
    """
    check_layout(codes.shape[-1], bits)
    if codes.dtype != torch.uint8:
        raise ShapeMismatch(f"codes are uint8, found {codes.dtype}")
    if codes.numel() and not codes.is_meta and int(codes.max()) >= 1 << bits:
        raise ShapeMismatch(f"a code of {int(codes.max())} does not fit in {bits} bits")
    if bits == 8:
        return codes.contiguous()
    run, size = _period(bits)
    runs = codes.unflatten(-1, (-1, run))  # (..., runs, codes of a run)
    word = torch.zeros(runs.shape[:-1], dtype=torch.int64, device=codes.device)
    for j in range(run):
        word |= runs[..., j].to(torch.int64) << bits * (run - 1 - j)
    return torch.stack([(word >> 8 * (size - 1 - k) & 255).to(torch.uint8) for k in range(size)], -1).flatten(-2)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse of ``pack``: ``(..., bytes)`` -> ``(..., bytes * 8 / bits)`` uint8 codes.

    Raises:
        ShapeMismatch: bytes of another dtype, or a number of them that ends inside a code.
    """
    run, size = _period(bits)
    if packed.dtype != torch.uint8:
        raise ShapeMismatch(f"packed codes are uint8, found {packed.dtype}")
    if packed.shape[-1] % size:
        raise ShapeMismatch(f"{packed.shape[-1]} bytes end inside a code of {bits} bits; whole runs have {size} bytes")
    if bits == 8:
        return packed
    mask = (1 << bits) - 1
    if size == 1:
        return torch.stack([packed >> bits * (run - 1 - j) & mask for j in range(run)], -1).flatten(-2)
    parts = packed.unflatten(-1, (-1, size)).to(torch.int32 if size < 4 else torch.int64)
    word = sum(parts[..., k] << 8 * (size - 1 - k) for k in range(size))
    return torch.stack([(word >> bits * (run - 1 - j) & mask).to(torch.uint8) for j in range(run)], -1).flatten(-2)


def gather(table: Tensor, packed: Tensor, bits: int) -> Tensor:
    """``W[o, g s + j] = table[o, g, code[o, g, j]]``: tables (rows, groups, 2^bits), packed (rows, groups, bytes) -> (rows, in).

    Outside of a graph. Temporaries have the size of the result.
    """
    rows, groups, size = table.shape
    run = 8 // bits if 8 % bits == 0 else 0
    cells = torch.arange(rows * groups, dtype=torch.int32, device=table.device)[:, None]
    if run and 256 * 2 <= packed.shape[-1]:  # longer than the table of all bytes: look whole bytes up
        names = torch.arange(256, dtype=torch.uint8, device=table.device)
        wide = table.reshape(-1, size).index_select(1, unpack(names, bits).int()).view(-1, run)  # (rows * groups * 256, run)
        index = packed.reshape(rows * groups, -1) + cells * 256
        return _lookup(wide, index.view(-1)).view(rows, -1)
    index = unpack(packed, bits).view(rows * groups, -1) + cells * size
    return table.reshape(-1).index_select(0, index.view(-1)).view(rows, -1)


def _lookup(wide: Tensor, index: Tensor) -> Tensor:
    """Rows of ``wide``; a row of at most eight bytes is moved as one integer."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(wide.shape[1] * wide.element_size())
    if whole is not None:
        return wide.view(whole).view(-1).index_select(0, index).view(wide.dtype)
    return F.embedding(index, wide)
