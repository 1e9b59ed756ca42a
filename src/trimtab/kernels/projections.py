"""VeRA's update: two frozen projections with a learned scaling behind each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from trimtab.kernels.beside import Rule
from trimtab.kernels.dropout import draw_seed, keep_rate, masks
from trimtab.kernels.lowrank import down

__all__ = ["ScaledProjections"]


class ScaledProjections(Rule):
    """``f(x) = e * (d * drop(x) A^T) B^T``. With ``h = drop(x) A^T``, ``t = dy (e * B)``: ``dd = sum(t * h)``, ``de = rows of
    ((dy^T (d * h)) * B)``, ``dx = mask * ((d * t) A)``; no gradient product of A's or B's size is ever formed."""

    def __init__(self, A: Tensor, B: Tensor, p: float):
        self.A, self.B, self.p = A, B, p
        self.seed = draw_seed() if p and not torch.compiler.is_compiling() else 0

    def map(self, x: Tensor, d: Tensor, e: Tensor) -> Tensor:
        h = F.linear(F.dropout(x, self.p, training=self.p > 0), self.A.to(x.dtype))
        return F.linear(h * d, self.B.to(x.dtype)) * e

    def keep(self, x: Tensor) -> Tensor:
        return down(x, self.A.to(x.dtype), self.p, self.seed).mul_(1 / keep_rate(self.p))

    def add_(self, y: Tensor, x: Tensor, kept: Tensor, d: Tensor, e: Tensor) -> None:
        y.addmm_(kept * d, (e[:, None] * self.B.to(y.dtype)).t())

    def pull(
        self, dy: Tensor, h: Tensor, gx: Tensor | None, needs: Sequence[bool], d: Tensor, e: Tensor
    ) -> tuple[Tensor | None, ...]:
        A, B = self.A.to(dy.dtype), self.B.to(dy.dtype)
        t = dy @ (e[:, None] * B)
        dd = (t * h).sum(0) if needs[0] else None
        de = ((dy.t() @ (h * d)) * B).sum(1) if needs[1] else None
        if gx is not None:
            t.mul_(d / keep_rate(self.p))
            if self.p == 0:
                gx.addmm_(t, A)
            else:
                for rows, mask in masks(self.seed, self.p, gx):
                    gx[rows].addcmul_(t[rows] @ A, mask)
        return dd, de
