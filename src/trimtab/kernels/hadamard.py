"""The Hadamard product of two low-rank products, ``dW = s (w1a w1b) * (w2a w2b)``, in its two forms.

Activation form: ``dW = s Ka Kb`` is a low-rank update of rank r^2 with Khatri-Rao factors, ``Ka[:, (i, j)] = w1a_i * w2a_j`` and
``Kb[(i, j)] = w1b_i * w2b_j``. Weight form: ``dW`` dense. The first takes ``3 r^2 (in + out)`` multiplications a token beside
the frozen layer (forward, input gradient, factor gradients), the second ``out in`` for the weight gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.kernels.beside import Rule
from trimtab.kernels.rebuilt import Pull, Recipe

__all__ = ["Hadamard", "KhatriRao", "khatri_rao"]


def khatri_rao(w1a: Tensor, w1b: Tensor, w2a: Tensor, w2b: Tensor) -> tuple[Tensor, Tensor]:
    """``Ka`` (out, r^2) and ``Kb`` (r^2, in) with ``Ka Kb = (w1a w1b) * (w2a w2b)``."""
    return (w1a[:, :, None] * w2a[:, None, :]).flatten(1), (w1b[:, None, :] * w2b[None, :, :]).flatten(0, 1)


@dataclass(frozen=True)
class KhatriRao(Rule):
    """The activation form; the r^2-wide factors and activations are computed again in backward."""

    scale: float

    def map(self, x: Tensor, *params: Tensor) -> Tensor:
        ka, kb = khatri_rao(*params)
        return (x @ kb.transpose(-1, -2)) @ (self.scale * ka).transpose(-1, -2)

    def add_(self, y: Tensor, x: Tensor, kept: Tensor | None, *params: Tensor) -> None:
        ka, kb = khatri_rao(*params)
        y.addmm_(x @ kb.t(), ka.t(), alpha=self.scale)

    def pull(
        self, dy: Tensor, x: Tensor, gx: Tensor | None, needs: Sequence[bool], *params: Tensor
    ) -> tuple[Tensor | None, ...]:
        w1a, w1b, w2a, w2b = params
        r = w1a.shape[1]
        ka, kb = khatri_rao(*params)
        v = (dy @ ka).mul_(self.scale)
        if gx is not None:
            gx.addmm_(v, kb)
        g1a = g1b = g2a = g2b = None
        if needs[0] or needs[2]:
            gka = (dy.t() @ (x @ kb.t()).mul_(self.scale)).view(-1, r, r)
            g1a, g2a = torch.bmm(gka, w2a[:, :, None])[:, :, 0], torch.bmm(w1a[:, None, :], gka)[:, 0]
        if needs[1] or needs[3]:
            gkb = (v.t() @ x).view(r, r, -1)
            g1b, g2b = (gkb * w2b).sum(1), (gkb * w1b[:, None, :]).sum(0)
        return g1a, g1b, g2a, g2b


@dataclass(frozen=True)
class Hadamard(Recipe):
    """The weight form; the two products are computed again in backward."""

    scale: float

    def delta(self, w1a: Tensor, w1b: Tensor, w2a: Tensor, w2b: Tensor) -> Tensor:
        return self.scale * (w1a @ w1b) * (w2a @ w2b)

    def remake(self, W: Tensor | None, needs: Sequence[bool], *params: Tensor) -> tuple[Tensor, Pull]:
        w1a, w1b, w2a, w2b = params
        first, second = w1a @ w1b, w2a @ w2b
        if W is None:
            weight = (first * second).mul_(self.scale)
        else:
            weight = torch.addcmul(W, first, second, value=self.scale)

        def pull(G: Tensor) -> tuple[Tensor | None, ...]:
            G.mul_(self.scale)
            g1a = g1b = g2a = g2b = None
            if needs[0] or needs[1]:
                t = second.mul_(G)
                g1a, g1b = t @ w1b.t(), w1a.t() @ t
            if needs[2] or needs[3]:
                t = first.mul_(G)
                g2a, g2b = t @ w2b.t(), w2a.t() @ t
            return g1a, g1b, g2a, g2b

        return weight, pull
