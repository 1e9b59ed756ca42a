"""Four codings of a sequence of -1, 0, +1: bit masks, trits, Golomb-Rice, and entropy coding with counts.

=========  =======================================  ============================================================
coding     bits an entry at density k               what it is for
=========  =======================================  ============================================================
masks      2                                        bitwise algebra without decoding
trits      1.6                                      five entries a byte, byte aligned
rice       see ``rice_bits``                        the paper's; needs nothing but numpy
entropy    the entropy of the counts, per tensor    the smallest; needs the package constriction
           or per row or column, and 0.01 %
=========  =======================================  ============================================================

Golomb-Rice codes the gaps between kept entries: quotient by ``2^b`` in unary, the remainder in b bits, a bit for the sign,
``b = 1 + floor(log2(ln(phi - 1) / ln(1 - k)))``, phi the golden ratio. Unary parts, remainders and signs are three runs of bits, so
that decoding needs no loop over entries. Sources: arXiv 2311.13171, Sec. 2.2; arXiv 1903.02891, Eqs. 7-9 (the Golomb code).

Entropy coding keeps the bound of the paper, ``H(k) = -(1 - k) log2(1 - k) - k log2(k / 2)`` bits an entry, only if densities
are equal everywhere, which a ranking over all tensors does not give: see ``contexts.py``.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trimtab.artifacts import contexts
from trimtab.core.errors import CheckpointMismatch, Unsupported, nearest

__all__ = ["CODINGS", "bound", "decode", "encode", "rice_bits", "rice_parameter"]

CODINGS = ("entropy", "rice", "trits", "masks")
Symbols = NDArray[np.int8]
Shape = tuple[int, int]


def bound(k: float) -> float:
    """``H(k)``, bits an entry: independent positions at density ``k``, fair signs."""
    if not 0 < k < 1:
        return float(k > 0)
    return -(1 - k) * math.log2(1 - k) - k * math.log2(k / 2)


def rice_parameter(k: float) -> int:
    """``b`` of the Golomb-Rice code for gaps at density ``k``."""
    if not 0 < k < 1:
        return 0
    golden = (math.sqrt(5) + 1) / 2
    return max(0, 1 + math.floor(math.log2(math.log(golden - 1) / math.log(1 - k))))


def rice_bits(k: float) -> float:
    """Mean bits an entry of Golomb-Rice at density ``k``, signs included."""
    b = rice_parameter(k)
    return k * (1 + b + 1 / (1 - (1 - k) ** (2**b)))


def encode(symbols: Symbols, shapes: Sequence[Shape], coding: str) -> bytes:
    """The bytes of a sequence.

    Args:
        symbols: (n,) entries -1, 0, +1.
        shapes: (rows, columns) of the pieces that the sequence is made of, in order; ``entropy`` chooses its contexts by them.
        coding: one of ``CODINGS``.

    Raises:
        Unsupported: unknown coding, or ``entropy`` without the package constriction.
    """
    if coding == "entropy":
        return contexts.encode(symbols, shapes)
    if coding == "masks":
        return np.packbits(symbols > 0, bitorder="little").tobytes() + np.packbits(symbols < 0, bitorder="little").tobytes()
    if coding == "trits":
        return contexts.to_trits(symbols).tobytes()
    if coding == "rice":
        return _rice(symbols)
    raise Unsupported(f"unknown coding {coding!r}{nearest(str(coding), CODINGS)}")


def decode(payload: bytes, shapes: Sequence[Shape], coding: str) -> Symbols:
    """What ``encode`` was given.

    Raises:
        CheckpointMismatch: the bytes are no such sequence; the message says what does not fit.
        Unsupported: unknown coding, or ``entropy`` without the package constriction.
    """
    n = sum(rows * columns for rows, columns in shapes)
    data = np.frombuffer(payload, np.uint8)
    if coding == "entropy":
        return contexts.decode(payload, shapes)
    if coding == "masks":
        return _unmasked(data, n)
    if coding == "trits":
        _expect(len(data) == -(-n // 5) and (not n or data.max() < 243), "the trits are not those of the entries")
        return contexts.from_trits(data, n)
    if coding == "rice":
        return _unriced(payload, n)
    raise Unsupported(f"unknown coding {coding!r}{nearest(str(coding), CODINGS)}")


def _expect(ok: bool, what: str) -> None:
    if not ok:
        raise CheckpointMismatch(what)


def _unmasked(data: NDArray[np.uint8], n: int) -> Symbols:
    size = -(-n // 8)
    _expect(len(data) == 2 * size, f"{len(data)} bytes of masks for {n} entries, which take {2 * size}")
    plus, minus = (np.unpackbits(part, count=n, bitorder="little").view(np.int8) for part in (data[:size], data[size:]))
    _expect(not (plus & minus).any(), "an entry is marked as +1 and as -1")
    return plus - minus


def _rice(symbols: Symbols) -> bytes:
    where = np.flatnonzero(symbols)
    b = rice_parameter(len(where) / max(1, len(symbols)))
    gaps = np.diff(where, prepend=-1) - 1
    quotients = gaps >> b
    ends = np.cumsum(quotients + 1) - 1  # each quotient is that many 0 bits and a 1
    unary = np.zeros(int(ends[-1]) + 1 if len(ends) else 0, np.uint8)
    unary[ends] = 1
    remainders = (gaps[:, None] >> np.arange(b)) & 1
    parts = (unary, remainders.astype(np.uint8).ravel(), (symbols[where] < 0).astype(np.uint8))
    packed = b"".join(np.packbits(part, bitorder="little").tobytes() for part in parts)
    return struct.pack("<IIB", len(where), len(unary), b) + packed


def _unriced(payload: bytes, n: int) -> Symbols:
    head = struct.calcsize("<IIB")
    _expect(len(payload) >= head, f"{len(payload)} bytes are too few for a Rice code")
    count, length, b = struct.unpack_from("<IIB", payload)
    sizes = (length, count * b, count)
    stops = np.cumsum([-(-size // 8) for size in sizes])
    data = np.frombuffer(payload, np.uint8, offset=head)
    _expect(b < 64 and len(data) == stops[-1], f"{len(data)} bytes of a Rice code for {count} kept entries, which take {stops[-1]}")
    unary, remainders, signs = (
        np.unpackbits(part, count=size, bitorder="little") for part, size in zip(np.split(data, stops[:-1]), sizes, strict=True)
    )
    ends = np.flatnonzero(unary)
    _expect(len(ends) == count, f"{len(ends)} kept entries in a Rice code that announces {count}")
    gaps = (np.diff(ends, prepend=-1) - 1) << b
    if b:
        gaps += remainders.reshape(count, b).astype(np.int64) @ (1 << np.arange(b))
    where = np.cumsum(gaps + 1) - 1
    _expect(not count or int(where[-1]) < n, f"a kept entry at {int(where[-1]) if count else 0} of {n}")
    symbols = np.zeros(n, np.int8)
    symbols[where] = 1 - 2 * signs.view(np.int8)
    return symbols
