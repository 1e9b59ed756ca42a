"""Compressed updates in memory, still packed: two bits an entry, added, scaled and multiplied without unpacking.

An update is, for each tensor, ``sum_i c_i s_i`` with ternary ``s_i``. Adding two joins their terms, and a scalar multiplies the
``c_i``; terms of equal scale can be counted together (``Tally``). The inner product is bilinear::

    <x, y> = sum over tensors, i, j of  c_i d_j <s_i, t_j>

It is that of the stored numbers (of a LoRA: of its factors, not of ``B A``), counted from the starts that both share.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimtab.artifacts.packed import Entry, Packed
from trimtab.artifacts.ternary import Tally, Ternary
from trimtab.core.errors import CheckpointMismatch, ShapeMismatch, Unsupported

__all__ = ["Update", "read_update"]

Term = tuple[float, Ternary]
MOST_TERMS = 64  # of a tensor whose rows or columns have scales of their own


@dataclass(frozen=True)
class Update:
    """Tensors as sums of scaled ternary vectors.

    Attributes:
        terms: key -> ``(c_i, s_i)``, all of one size.
        shapes: key -> shape.
    """

    terms: Mapping[str, tuple[Term, ...]]
    shapes: Mapping[str, tuple[int, ...]]

    def _like(self, other: Update) -> Update:
        if self.shapes != other.shapes:
            differing = sorted(
                key for key in {*self.shapes, *other.shapes} if self.shapes.get(key) != other.shapes.get(key)
            )
            raise ShapeMismatch(f"two updates of other tensors do not combine; they differ in {', '.join(differing[:3])}")
        return other

    def __add__(self, other: Update) -> Update:
        b = self._like(other)
        return Update({key: (*terms, *b.terms[key]) for key, terms in self.terms.items()}, self.shapes)

    def __mul__(self, factor: float) -> Update:
        return Update({key: tuple((factor * c, s) for c, s in terms) for key, terms in self.terms.items()}, self.shapes)

    __rmul__ = __mul__

    def __neg__(self) -> Update:
        return self * -1.0

    def __sub__(self, other: Update) -> Update:
        return self + -other

    def dot(self, other: Update) -> float:
        """``<self, other>`` over all tensors."""
        b = self._like(other)
        return math.fsum(
            c * d * s.dot(t) for key, terms in self.terms.items() for c, s in terms for d, t in b.terms[key] if c and d
        )

    def norm(self) -> float:
        """``|self|_2``."""
        return math.sqrt(max(0.0, self.dot(self)))

    def cosine(self, other: Update) -> float:
        """Cosine of the angle to ``other``; 0 if one of them is 0."""
        size = self.norm() * other.norm()
        return self.dot(other) / size if size else 0.0

    def majority(self) -> dict[str, Ternary]:
        """For each tensor the sign that more terms have, every term one vote, turned round by a negative scale."""
        voters = {key: [s if c > 0 else -s for c, s in terms if c] for key, terms in self.terms.items()}
        return {
            key: Tally(vectors).majority() if vectors else Ternary.pack(np.zeros(math.prod(self.shapes[key]), np.int8))
            for key, vectors in voters.items()
        }

    def values(self, key: str) -> NDArray[np.float32]:
        """One tensor, unpacked; terms of one magnitude are counted as integers first."""
        total = np.zeros(math.prod(self.shapes[key]), np.float64)
        by_scale: dict[float, Tally] = {}
        for c, s in self.terms[key]:
            if c:
                by_scale.setdefault(abs(c), Tally()).add(s if c > 0 else -s)
        for scale, tally in by_scale.items():
            total += scale * tally.values()
        return total.astype(np.float32).reshape(self.shapes[key])

    @property
    def nbytes(self) -> int:
        """Memory of the masks."""
        return sum(s.plus.nbytes + s.minus.nbytes for terms in self.terms.values() for _, s in terms)


def read_update(path: str | os.PathLike) -> Update:
    """The ternary part of a compressed file, packed; tensors that it stores as they are, and starts, are left out.

    Raises:
        CheckpointMismatch: the file is damaged, or none of it is ternary.
    """
    packed = Packed(path)
    parts: dict[str, list[NDArray[np.int8]]] = {entry.key: [] for entry in packed.entries if entry.store == "ternary"}
    if not parts:
        raise CheckpointMismatch(f"{packed.path} holds no ternary update")
    factors: dict[int, Any] = {}
    for frame, payload, offset in packed.payloads():
        if frame.tag == b"fits":
            factors = packed.factors(frame, payload, offset)
        if frame.tag == b"tern":
            for number, _, _, symbols in packed.symbols(frame, payload, offset):
                parts[packed.entries[number].key].append(symbols)
    entries = {entry.key: entry for entry in packed.entries}
    empty = np.zeros(0, np.int8)
    whole = {key: np.concatenate([empty, *found]) for key, found in parts.items()}
    numbers = {entry.key: i for i, entry in enumerate(packed.entries)}
    terms = {key: _terms(entries[key], symbols, factors.get(numbers[key])) for key, symbols in whole.items()}
    return Update(terms, {key: entries[key].shape for key in parts})


def _terms(entry: Entry, symbols: NDArray[np.int8], factors: Any) -> tuple[Term, ...]:
    """One term; where factors were fitted, one for each of them, its row or column alone."""
    if factors is None:
        return ((entry.scale, Ternary.pack(symbols)),)
    if len(factors) > MOST_TERMS:
        raise Unsupported(f"{entry.key} has {len(factors)} fitted factors, too many to keep packed; tt.expand the file instead")
    table, terms = symbols.reshape(entry.rows), []
    for i, factor in enumerate(factors.tolist()):
        only = np.zeros_like(table)
        part = np.s_[i] if entry.rows[0] < entry.rows[1] else np.s_[:, i]
        only[part] = table[part]
        terms.append((entry.scale * factor, Ternary.pack(only)))
    return tuple(terms)
