"""The largest entries of many tensors together, by a rule on how many each of them gets; nothing is sorted or joined.

The bits of non-negative float32 numbers, read as integers, are in the numbers' order: the level at which a rule stops to hold is
found by bisection over them, 31 passes that count, and the level of a given number of entries from two histograms, of the upper
16 bits and of the rest (``largest``). Entries equal to that level are taken in the order of the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Top", "bisect", "largest", "most"]

_INFINITY = 0x7F800000  # bits of float32's infinity, above those of all finite numbers


@dataclass(frozen=True)
class Top:
    """A choice of entries: those above ``level``, and the first ``tied[i]`` of tensor i's that equal it.

    Attributes:
        level: bits of a number.
        above, tied: for every tensor, how many stand above the level, and how many equal to it are chosen.
    """

    level: int
    above: tuple[int, ...]
    tied: tuple[int, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """How many entries each tensor gets."""
        return tuple(a + t for a, t in zip(self.above, self.tied, strict=True))

    def mask(self, scores: Tensor, position: int) -> Tensor:
        """Which entries of ``scores``, tensor ``position`` of those ranked, are chosen: flattened booleans."""
        bits = _bits(scores).flatten()
        chosen = bits > self.level
        if self.tied[position]:
            chosen[(bits == self.level).nonzero()[: self.tied[position], 0]] = True
        return chosen

    def index(self, scores: Tensor, position: int) -> Tensor:
        """The chosen places in ``scores``, tensor ``position`` of those ranked: flattened, ascending."""
        return self.mask(scores, position).nonzero()[:, 0]


def most(scores: Sequence[Tensor], fits: Callable[[Sequence[int]], bool]) -> tuple[Top, Top]:
    """The largest choice of top entries whose counts ``fits``, and the same with one entry more, if there is one.

    Args:
        scores: non-negative finite float32 tensors.
        fits: a rule on the counts: true for none, and once it is false it stays false as the counts grow.
    """
    bits = [_bits(score) for score in scores]
    count = lambda test: tuple(int(torch.count_nonzero(test(b))) for b in bits)  # noqa: E731
    # the highest level from which on down everything would be too much
    level = bisect(0, _INFINITY, lambda drop: fits(count(lambda b: b >= _INFINITY - drop)))
    level = _INFINITY - level - 1
    above, equal = count(lambda b: b > level), count(lambda b: b == level)
    make = lambda n: Top(level, above, _first(equal, n))  # noqa: E731
    taken = bisect(0, sum(equal), lambda n: fits(make(n).counts))
    return make(taken), make(min(taken + 1, sum(equal)))


def largest(scores: Callable[[], Iterable[Tensor]], counts: Sequence[int]) -> list[Top]:
    """For every n in ``counts``, the n largest entries; exactly n, ties going to the first in order.

    Args:
        scores: gives the tensors, non-negative finite float32, one after another; called three times, so that they may be
            read or computed anew instead of being held.
        counts: each from 0 to the number of entries.
    """
    high = torch.zeros(1 << 16, dtype=torch.int64)
    for score in scores():
        high += torch.bincount(_bits(score).flatten() >> 15, minlength=1 << 16).cpu()
    bins = {n: _from_top(high, n) for n in counts if n}
    low = {b: torch.zeros(1 << 15, dtype=torch.int64) for b, _ in bins.values()}
    for score in scores():
        bits = _bits(score).flatten()
        upper = bits >> 15
        for b, histogram in low.items():
            histogram += torch.bincount(bits[upper == b] & 0x7FFF, minlength=1 << 15).cpu()
    levels = {n: (b << 15) + _from_top(low[b], n - before)[0] for n, (b, before) in bins.items()}
    above: dict[int, list[int]] = {n: [] for n in counts}
    equal: dict[int, list[int]] = {n: [] for n in counts}
    for score in scores():
        bits = _bits(score)
        for n in above:
            level = levels.get(n, _INFINITY)
            above[n].append(int(torch.count_nonzero(bits > level)))
            equal[n].append(int(torch.count_nonzero(bits == level)))
    return [Top(levels.get(n, _INFINITY), tuple(above[n]), _first(equal[n], n - sum(above[n]))) for n in counts]


def _from_top(histogram: Tensor, n: int) -> tuple[int, int]:
    """The bin that holds the n-th entry counted from the last bin down, and how many entries stand above that bin."""
    reached = histogram.flip(0).cumsum(0)
    place = int(torch.searchsorted(reached, n))
    return len(histogram) - 1 - place, int(reached[place]) - int(histogram[len(histogram) - 1 - place])


def bisect(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """The largest number from ``low`` to ``high`` for which ``holds``; it holds for ``low``, and up to some number."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _bits(score: Tensor) -> Tensor:
    return score.view(torch.int32)


def _first(sizes: Sequence[int], n: int) -> tuple[int, ...]:
    """``n`` things taken from groups of these sizes, in order."""
    taken = []
    for size in sizes:
        taken.append(min(size, n))
        n -= taken[-1]
    return tuple(taken)
