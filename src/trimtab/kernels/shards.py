"""Output sharding: all outputs of a shard get the same row, ``y_o += (D x)_{shard of o}`` with ``D`` (n, in).

The ``out`` outputs form ``n`` contiguous shards, the first ``out mod n`` of them one longer than the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from trimtab.kernels.beside import Rule
from trimtab.kernels.dropout import keep_rate, masks
from trimtab.kernels.lowrank import down

__all__ = ["Shards", "repeat_rows"]


def _pieces(out: int, n: int) -> list[tuple[slice, slice, int]]:
    """Runs of shards of one length: their outputs, their numbers, that length."""
    size, longer = divmod(out, n)
    edge = longer * (size + 1)
    found = [(slice(0, edge), slice(0, longer), size + 1), (slice(edge, out), slice(longer, n), size)]
    return [piece for piece in found if piece[1].start < piece[1].stop]


def repeat_rows(h: Tensor, out: int, dim: int = -1) -> Tensor:
    """``(..., n, ...) -> (..., out, ...)`` along ``dim``: every shard's entry once for each of its outputs."""
    pieces = _pieces(out, h.shape[dim])
    parts = [h.narrow(dim, k.start, k.stop - k.start).repeat_interleave(size, dim) for _, k, size in pieces]
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0]


@dataclass(frozen=True)
class Shards(Rule):
    """``y += repeat(drop(x) D^T)``; keeps ``x``.

    Attributes:
        out: number of outputs.
        p: dropout of ``x``; its mask comes from ``seed`` in both directions and is never kept.
        seed: seed of the mask.
    """

    out: int
    p: float = 0.0
    seed: int = 0

    def map(self, x: Tensor, d: Tensor) -> Tensor:
        return repeat_rows((F.dropout(x, self.p) if self.p else x) @ d.transpose(-1, -2), self.out)

    def add_(self, y: Tensor, x: Tensor, kept: Tensor | None, d: Tensor) -> None:
        h = down(x, d, self.p, self.seed).div_(keep_rate(self.p))
        for outputs, shards, size in _pieces(self.out, d.shape[0]):
            y[:, outputs].unflatten(1, (-1, size)).add_(h[:, shards, None])

    def pull(self, dy: Tensor, x: Tensor, gx: Tensor | None, needs: Sequence[bool], d: Tensor) -> tuple[Tensor | None, ...]:
        e = dy.new_empty(dy.shape[0], d.shape[0])  # gradient of h: sums over the shards
        for outputs, shards, size in _pieces(self.out, d.shape[0]):
            e[:, shards] = dy[:, outputs].unflatten(1, (-1, size)).sum(2)
        e.div_(keep_rate(self.p))
        if self.p == 0:
            if gx is not None:
                gx.addmm_(e, d)
            return (e.t() @ x if needs[0] else None,)
        gd = torch.zeros_like(d) if needs[0] else None
        for rows, mask in masks(self.seed, self.p, x):
            if gx is not None:
                gx[rows].addcmul_(e[rows] @ d, mask)
            if gd is not None:
                gd.addmm_(e[rows].t(), x[rows] * mask)
        return (gd,)
