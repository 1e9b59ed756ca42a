"""Vectors of -1, 0 and +1 as two bit masks, and their algebra without unpacking.

``P`` marks +1 and ``N`` marks -1; 64 entries a word, two bits an entry. With ``pop`` the number of set bits::

    <a, b>   = pop((Pa & Pb) | (Na & Nb)) - pop((Pa & Nb) | (Na & Pb))
    |a - b|_1 = pop(Pa ^ Pb) + pop(Na ^ Nb)          |a - b|^2 = nnz(a) + nnz(b) - 2 <a, b>

Scales multiply outside. Sums of several vectors are kept as bit planes (``Tally``): adding one costs two ripples of log2(K)
word operations, and the majority's sign is read off without an integer a entry. Source: arXiv 2311.13171, Sec. 2.2.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from trimtab.core.errors import ShapeMismatch

__all__ = ["Tally", "Ternary"]

Words = NDArray[np.uint64]


def _pop(words: Words) -> int:
    return int(np.bitwise_count(words).sum(dtype=np.int64))


def _words(mask: NDArray[np.bool_]) -> Words:
    """(n,) booleans to (ceil(n / 64),) words, entry i at bit i % 64."""
    packed = np.packbits(mask, bitorder="little")
    return np.concatenate([packed, np.zeros(-len(packed) % 8, np.uint8)]).view("<u8")


class Ternary:
    """A vector of ``size`` entries -1, 0, +1.

    Attributes:
        plus, minus: words of the two masks, (ceil(size / 64),); bits beyond ``size`` are 0.
        size: number of entries.
    """

    def __init__(self, plus: Words, minus: Words, size: int):
        self.plus, self.minus, self.size = plus, minus, size

    @classmethod
    def pack(cls, symbols: NDArray[np.int8]) -> Ternary:
        """From ``(n,)`` integers -1, 0, +1."""
        flat = np.asarray(symbols).reshape(-1)
        return cls(_words(flat > 0), _words(flat < 0), flat.size)

    def unpack(self) -> NDArray[np.int8]:
        """``(size,)`` integers -1, 0, +1."""
        both = (words.view(np.uint8) for words in (self.plus, self.minus))
        plus, minus = (np.unpackbits(mask, count=self.size, bitorder="little").view(np.int8) for mask in both)
        return plus - minus

    def _with(self, other: Ternary) -> Ternary:
        if self.size != other.size:
            raise ShapeMismatch(f"two ternary vectors of {self.size} and {other.size} entries do not combine")
        return other

    @property
    def nnz(self) -> int:
        """Entries that are not 0."""
        return _pop(self.plus) + _pop(self.minus)

    def dot(self, other: Ternary) -> int:
        """``<self, other>``."""
        b = self._with(other)
        same = _pop((self.plus & b.plus) | (self.minus & b.minus))
        return same - _pop((self.plus & b.minus) | (self.minus & b.plus))

    def l1(self, other: Ternary) -> int:
        """``|self - other|_1``."""
        b = self._with(other)
        return _pop(self.plus ^ b.plus) + _pop(self.minus ^ b.minus)

    def l2_squared(self, other: Ternary) -> int:
        """``|self - other|^2``."""
        return self.nnz + other.nnz - 2 * self.dot(other)

    def hamming(self, other: Ternary) -> int:
        """Entries in which the two differ."""
        b = self._with(other)
        return _pop((self.plus ^ b.plus) | (self.minus ^ b.minus))

    def agreement(self, other: Ternary) -> Ternary:
        """The entries whose sign both share, 0 elsewhere."""
        b = self._with(other)
        return Ternary(self.plus & b.plus, self.minus & b.minus, self.size)

    def __neg__(self) -> Ternary:
        return Ternary(self.minus, self.plus, self.size)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Ternary):
            return NotImplemented
        same = np.array_equal(self.plus, other.plus) and np.array_equal(self.minus, other.minus)
        return self.size == other.size and same

    __hash__ = None  # type: ignore[assignment]

    def __len__(self) -> int:
        return self.size

    def __repr__(self) -> str:
        return f"Ternary({self.size} entries, {self.nnz} not zero)"


class Tally:
    """The sum of ternary vectors of one size, as bit planes of the number of +1 and of -1 at each entry."""

    def __init__(self, vectors: Iterable[Ternary] = ()):
        self.size: int | None = None
        self.plus: list[Words] = []
        self.minus: list[Words] = []
        for vector in vectors:
            self.add(vector)

    def add(self, vector: Ternary) -> Tally:
        """Add one vector in place."""
        if self.size is None:
            self.size = vector.size
        if vector.size != self.size:
            raise ShapeMismatch(f"a sum of vectors of {self.size} entries takes no vector of {vector.size}")
        _ripple(self.plus, vector.plus)
        _ripple(self.minus, vector.minus)
        return self

    def values(self) -> NDArray[np.int32]:
        """The sum itself, ``(size,)``."""
        total = np.zeros(self.size or 0, np.int32)
        for planes, sign in ((self.plus, 1), (self.minus, -1)):
            for i, plane in enumerate(planes):
                bits = np.unpackbits(plane.view(np.uint8), count=total.size, bitorder="little")
                total += bits.astype(np.int32) * (sign << i)
        return total

    def majority(self) -> Ternary:
        """The sign of the sum at every entry (0 where it is 0): which side has more votes, read from the planes."""
        depth = max(len(self.plus), len(self.minus))
        zero = np.zeros_like(self.plus[0]) if depth else np.zeros(0, np.uint64)
        more, less = zero.copy(), zero.copy()
        for i in reversed(range(depth)):  # from the highest plane on, the first difference decides
            p = self.plus[i] if i < len(self.plus) else zero
            m = self.minus[i] if i < len(self.minus) else zero
            open_ = ~(more | less)
            more |= open_ & p & ~m
            less |= open_ & m & ~p
        return Ternary(more, less, self.size or 0)


def _ripple(planes: list[Words], carry: Words) -> None:
    """Add one bit an entry to a counter of bit planes."""
    for i, plane in enumerate(planes):
        planes[i], carry = plane ^ carry, plane & carry
        if not carry.any():
            return
    if carry.any() or not planes:
        planes.append(carry.copy())
