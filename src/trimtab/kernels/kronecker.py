"""Kronecker updates ``dW = w1 (x) w2`` on activations; the product is never formed.

With ``x`` viewed as ``X`` (i1, i2) a token, ``dW x`` is ``w1 X w2^T`` (o1, o2). If ``w2 = R L`` the three contractions are
``L`` first, ``w1`` on the thin side, ``R`` last; a full ``w2`` goes first or last, whichever takes fewer multiplications.

A sum of several products runs in the same contractions if they are stacked: the second one sums over the terms. With
``w2`` first, ``L`` is (terms k, i2) and ``w1`` (o1, i1 terms); with ``w1`` first it is (o1 terms, i1), and ``R`` (o2, terms i2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.kernels.beside import Rule

__all__ = ["Kronecker", "kron", "plan"]


def kron(w1: Tensor, w2: Tensor) -> Tensor:
    """``w1 (x) w2``: (o1, i1), (o2, i2) -> (o1 o2, i1 i2)."""
    return (w1[:, None, :, None] * w2[None, :, None, :]).reshape(w1.shape[0] * w2.shape[0], w1.shape[1] * w2.shape[1])


def plan(o1: int, i1: int, o2: int, i2: int, rank: int | None) -> str:
    """The cheapest order of contractions a token: ``"thin"`` (through the rank), ``"w2 first"`` or ``"w1 first"``."""
    costs = {"w2 first": i1 * o2 * (i2 + o1), "w1 first": o1 * i2 * (i1 + o2)}
    if rank is not None:
        costs["thin"] = rank * (i1 * i2 + o1 * i1 + o1 * o2)
    return min(costs, key=costs.__getitem__)


@dataclass(frozen=True)
class Kronecker(Rule):
    """``y += vec(w1 X L^T R^T)``; parameters ``w1`` (o1, i1), then ``L`` (k, i2) if ``left``, then ``R`` (o2, k) if ``right``.

    With one of ``left`` and ``right`` alone, the parameters may be stacks of terms (see above).
    """

    o1: int
    i1: int
    left: bool
    right: bool

    def map(self, x: Tensor, w1: Tensor, *w2: Tensor) -> Tensor:
        left, right = self._split(w2)
        h = x.unflatten(-1, (self.i1, -1))
        h = h if left is None else _regroup(h @ left.transpose(-1, -2), w1.shape[-1])
        m = w1 @ h
        return (m if right is None else _regroup(m, self.o1) @ right.transpose(-1, -2)).flatten(-2)

    def add_(self, y: Tensor, x: Tensor, kept: Tensor | None, w1: Tensor, *w2: Tensor) -> None:
        left, right = self._split(w2)
        m = torch.matmul(w1, self._thin(x, left, w1.shape[1]))
        if right is None:
            y.view(m.shape).add_(m)
        else:
            _rows(y, self.o1).addmm_(_regroup(m, self.o1).flatten(0, 1), right.t())

    def pull(
        self, dy: Tensor, x: Tensor, gx: Tensor | None, needs: Sequence[bool], w1: Tensor, *w2: Tensor
    ) -> tuple[Tensor | None, ...]:
        left, right = self._split(w2)
        n, last = x.shape[0], self.right and needs[-1]
        rows = _rows(dy, self.o1)
        e = rows if right is None else rows @ right
        e = e.view(n, w1.shape[0], e.shape[1] * self.o1 // w1.shape[0])  # gradient of m = w1 h
        h = self._thin(x, left, w1.shape[1]) if needs[0] or last else None
        grads = [torch.bmm(e, h.transpose(1, 2)).sum(0) if needs[0] else None]
        gh = _regroup(torch.matmul(w1.t(), e), self.i1).flatten(0, 1)
        if left is not None:
            grads.append(gh.t() @ _rows(x, self.i1) if needs[1] else None)
        if right is not None:
            grads.append(rows.t() @ _regroup(torch.matmul(w1, h), self.o1).flatten(0, 1) if last else None)
        if gx is not None:
            gx = _rows(gx, self.i1)
            gx.add_(gh) if left is None else gx.addmm_(gh, left)
        return tuple(grads)

    def _split(self, w2: tuple[Tensor, ...]) -> tuple[Tensor | None, Tensor | None]:
        return (w2[0] if self.left else None), (w2[-1] if self.right else None)

    def _thin(self, x: Tensor, left: Tensor | None, height: int) -> Tensor:
        """``X L^T``: (tokens, i1, k), the terms of a stack beside i1: (tokens, height, k)."""
        rows = _rows(x, self.i1)
        rows = rows if left is None else rows @ left.t()
        return rows.view(x.shape[0], height, rows.shape[1] * self.i1 // height)


def _regroup(t: Tensor, height: int) -> Tensor:
    """(..., a, b) -> (..., height, a b / height), a view: moves the terms of a stack from one axis to the other."""
    return t if t.shape[-2] == height else t.flatten(-2).unflatten(-1, (height, -1))


def _rows(t: Tensor, parts: int) -> Tensor:
    """(tokens, parts * size) -> (tokens * parts, size), a view."""
    return t.view(t.shape[0] * parts, t.shape[1] // parts)
