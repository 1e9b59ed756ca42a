"""Weighted k-means of numbers, many rows at once: every row sorted once, everything after that by prefix sums.

With the values of a row in order, a cluster is a run, and its weight, sum and cost are differences of three prefix sums. So a Lloyd
step costs K searches a row, and so do the draws of a greedy k-means++ start and the comparison of its candidates: none of them
touches the n values again. Restarts are therefore nearly free; the best one of each row is taken.

A row with at most K distinct values gets exactly those.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core.errors import ShapeMismatch

__all__ = ["assign", "kmeans", "midpoints"]

_RUN = 1 << 20  # values handled at once: bounds the temporaries


def kmeans(
    values: Tensor,
    size: int,
    *,
    weights: Tensor | None = None,
    restarts: int = 4,
    iterations: int = 100,
    rng: torch.Generator,
) -> Tensor:
    """Centres of ``size`` clusters for every row, ascending, ``(rows, n) -> (rows, size)`` float64.

    Args:
        weights: of the values, not negative: (rows, n), or (n,) for all rows; a row without any weight is taken as unweighted.
        restarts: starts a row.
        iterations: most Lloyd steps.

    Raises:
        ShapeMismatch: values or weights that are not finite, or negative weights.
    """
    if not bool(torch.isfinite(values).all()):
        raise ShapeMismatch("k-means got NaN or infinite values; repair the weight first")
    if weights is not None and not bool((torch.isfinite(weights) & (weights >= 0)).all()):
        raise ShapeMismatch("k-means got weights that are negative, NaN or infinite")
    step = max(1, _RUN // max(1, values.shape[1]))
    found = []
    for start in range(0, values.shape[0], step):
        v, order = values[start : start + step].double().sort(dim=1)
        if weights is None:
            w = torch.ones_like(v)
        else:
            w = weights.double().expand(values.shape)[start : start + step].gather(1, order)
            w = torch.where(w.sum(1, keepdim=True) > 0, w, 1.0)
        found.append(_rows(v, w, size, restarts, iterations, rng))
    return torch.cat(found)


def midpoints(centres: Tensor) -> Tensor:
    """Bounds between ascending centres, ``(..., K) -> (..., K - 1)``: a value above bound k belongs to centre k + 1 or later.

    A bound that rounding would put on its upper centre is put on the lower one, so that centres belong to themselves.
    """
    low, high = centres[..., :-1], centres[..., 1:]
    middle = low + (high - low) / 2
    return torch.where(middle >= high, low, middle)


def assign(values: Tensor, centres: Tensor) -> Tensor:
    """The nearest centre of each value, the lower one of two equally near: (rows, n), (rows, K) -> (rows, n) uint8."""
    return torch.searchsorted(midpoints(centres), values.to(centres.dtype).contiguous(), out_int32=True).to(torch.uint8)


@dataclass
class _Sums:
    """Prefix sums of the sorted values, ``(rows, n + 1)``: of w, w v and w v^2, with v shifted to a mean of zero."""

    v: Tensor
    zero: Tensor
    one: Tensor
    two: Tensor

    def find(self, bounds: Tensor) -> Tensor:
        """How many values are at most ``bounds`` (rows, ...): the index at which a run beyond them begins."""
        flat = bounds.reshape(bounds.shape[0], -1)
        return torch.searchsorted(self.v, flat, right=True).view(bounds.shape)

    def take(self, prefix: Tensor, index: Tensor) -> Tensor:
        """``prefix`` at ``index`` (rows, ...)."""
        return prefix.gather(1, index.reshape(index.shape[0], -1)).view(index.shape)

    def cost(self, low: Tensor, high: Tensor, centre: Tensor) -> Tensor:
        """``sum of w (v - centre)^2`` over the runs ``low`` to ``high`` (excluded)."""
        zero, one, two = (self.take(p, high) - self.take(p, low) for p in (self.zero, self.one, self.two))
        return (two - 2 * centre * one + centre * centre * zero).clamp_(min=0)


def _rows(v: Tensor, w: Tensor, size: int, restarts: int, iterations: int, rng: torch.Generator) -> Tensor:
    """``kmeans`` for rows already sorted."""
    mean = (w * v).sum(1, keepdim=True) / w.sum(1, keepdim=True)
    centred = v - mean
    prefixes = [_prefix(w), _prefix(w * centred), _prefix(w * centred * centred)]
    sums = _Sums(centred.contiguous(), *prefixes)
    change = v[:, 1:] != v[:, :-1]
    few = change.sum(1) < size
    if bool(few.all()):
        return _distinct(v, change, size)
    centres = _lloyd(sums, _start(sums, size, restarts, rng), iterations)
    edges = _edges(sums, centres)
    cost = sums.cost(edges[..., :-1], edges[..., 1:], centres).sum(-1)
    best = cost.argmin(1)[:, None, None].expand(-1, 1, size)
    chosen = centres.gather(1, best).squeeze(1) + mean
    return torch.where(few[:, None], _distinct(v, change, size), chosen)


def _prefix(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x.cumsum(1), (1, 0))


def _distinct(v: Tensor, change: Tensor, size: int) -> Tensor:
    """The first ``size`` distinct values of each row; the last one again where there are fewer."""
    rank = torch.nn.functional.pad(change.cumsum(1), (1, 0)).clamp_(max=size - 1)
    found = v.new_full((v.shape[0], size), -math.inf).scatter_reduce_(1, rank, v, "amin", include_self=False)
    return found.cummax(1).values


def _edges(sums: _Sums, centres: Tensor) -> Tensor:
    """Where the runs of ascending centres (rows, starts, k) begin and end: (rows, starts, k + 1)."""
    n = sums.v.shape[1]
    inner = sums.find((centres[..., 1:] + centres[..., :-1]) / 2)
    return torch.cat([inner.new_zeros(*inner.shape[:2], 1), inner, inner.new_full((*inner.shape[:2], 1), n)], -1)


def _start(sums: _Sums, size: int, restarts: int, rng: torch.Generator) -> Tensor:
    """Greedy k-means++: each further centre is the best of a few values drawn in proportion to their cost."""
    rows, tries = sums.v.shape[0], 2 + int(math.log(size))
    u = torch.rand(rows, restarts, 1, generator=rng, dtype=torch.float64).to(sums.v.device)
    first = torch.searchsorted(sums.zero, (u * sums.zero[:, -1, None, None]).squeeze(-1), right=True) - 1
    centres = sums.take(sums.v, first.clamp_(0, sums.v.shape[1] - 1))[..., None]
    for _ in range(size - 1):
        edges = _edges(sums, centres)
        u = torch.rand(rows, restarts, tries, generator=rng, dtype=torch.float64).to(sums.v.device)
        drawn = _draw(sums, centres, edges, u)
        gain = _gain(sums, centres, edges, drawn)
        new = drawn.gather(-1, gain.argmax(-1, keepdim=True))
        centres = torch.cat([centres, new], -1).sort(-1).values
    return centres


def _draw(sums: _Sums, centres: Tensor, edges: Tensor, u: Tensor) -> Tensor:
    """Values drawn in proportion to their cost by the uniform numbers ``u`` (rows, starts, tries): which run, then where in it."""
    cumulated = sums.cost(edges[..., :-1], edges[..., 1:], centres).cumsum(-1)
    aim = u * cumulated[..., -1:]
    cell = torch.searchsorted(cumulated, aim, right=True).clamp_(max=centres.shape[-1] - 1)
    aim = aim - torch.nn.functional.pad(cumulated, (1, 0)).gather(-1, cell)
    begin, centre = edges.gather(-1, cell), centres.gather(-1, cell)
    low, high = begin.clone(), edges.gather(-1, cell + 1) - 1  # the first i with a cost of begin..i above the aim
    for _ in range(sums.v.shape[1].bit_length()):
        middle = (low + high) // 2
        above = sums.cost(begin, middle.clamp(min=0) + 1, centre) > aim
        high = torch.where(above & (low < high), middle, high)
        low = torch.where(~above & (low < high), middle + 1, low)
    return sums.take(sums.v, low.clamp_(0, sums.v.shape[1] - 1))


def _gain(sums: _Sums, centres: Tensor, edges: Tensor, drawn: Tensor) -> Tensor:
    """By how much the cost falls if ``drawn`` (rows, starts, tries) becomes a centre; only its two neighbours lose values."""
    n, k = sums.v.shape[1], centres.shape[-1]
    above = torch.searchsorted(centres, drawn)  # centres below the drawn value
    a = centres.gather(-1, (above - 1).clamp(min=0))
    b = centres.gather(-1, above.clamp(max=k - 1))
    split = edges.gather(-1, above)
    low = torch.where(above > 0, sums.find((a + drawn) / 2), 0)
    high = torch.where(above < k, sums.find((drawn + b) / 2), n)
    low, high = torch.minimum(low, split), torch.maximum(high, split)
    return sums.cost(low, split, a) + sums.cost(split, high, b) - sums.cost(low, high, drawn)


def _lloyd(sums: _Sums, centres: Tensor, iterations: int) -> Tensor:
    """Lloyd steps until nothing moves; a cluster left without weight takes the far end of the costliest run."""
    for _ in range(iterations):
        edges = _edges(sums, centres)
        weight, total = (sums.take(p, edges).diff(dim=-1) for p in (sums.zero, sums.one))
        empty = weight <= 0
        new = torch.where(empty, centres, total / weight.clamp(min=torch.finfo(weight.dtype).tiny))
        if bool(empty.any()):
            new = torch.where(empty, _farthest(sums, edges, centres), new).sort(-1).values
        moved = (new - centres).abs().amax()
        centres = new
        if moved == 0:
            break
    return centres


def _farthest(sums: _Sums, edges: Tensor, centres: Tensor) -> Tensor:
    """The value farthest from its centre in the run with the largest cost, (rows, starts, 1)."""
    worst = sums.cost(edges[..., :-1], edges[..., 1:], centres).argmax(-1, keepdim=True)
    n, centre = sums.v.shape[1], centres.gather(-1, worst)
    low = sums.take(sums.v, edges.gather(-1, worst).clamp(max=n - 1))
    high = sums.take(sums.v, (edges.gather(-1, worst + 1) - 1).clamp(min=0))
    return torch.where(centre - low > high - centre, low, high)
