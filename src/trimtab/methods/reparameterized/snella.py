"""SNELLA: SNELL with a richer kernel, and a budget of entries that places compete for.

``D[i, o] = sum_p c_p ||A_p[i] - B_p[o]||_2``, ``K = D + alpha softmax(D / gamma, over o) + beta``, and ``W' = W + U^T`` with
``U = K |K| 1[|K| > t]``, t the s_l-quantile of ``|K|``; s_l belongs to the place and changes while training
(schedules/bilevel.py). gamma is ``softplus(g)``, so that no step makes it negative; alpha = gamma = 1 and beta = 0 at the start.
Source: arXiv 2510.24037; the kernel is its code's. Trainable: ``r (in + out) + 3``. Saved for backward: ``x`` alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from trimtab.core.contracts import MethodConfig, Span
from trimtab.core.registry import method
from trimtab.core.site import Site
from trimtab.kernels.kernelized import Competition
from trimtab.methods.reparameterized.snell import KernelMerge

__all__ = ["SNELLA", "SNELLAAdapter"]


@dataclass(frozen=True)
class SNELLA(MethodConfig):
    """SNELL with a softmax in its kernel, whose sparsity at every place comes from a shared budget.

    Not without its schedule (``trimtab.schedules.BilevelCompetition``): alone it stays nearly dense everywhere.

    Args:
        rank: r, an even number.
        sparsity: s at the start, at every place.
        dense: K itself, neither squared nor sparse: another model, not the limit of sparsity 0.
        coefficient: c of the two pieces, +c and -c.
    """

    search = {"rank": (8, 16, 32), "dense": (False, True)}
    learning_rate = Span(3e-4, 3e-2, log=True)

    rank: int = 32
    sparsity: float = 0.01
    dense: bool = False
    coefficient: float = 0.1

    pieces = 2
    learn_coefficients = False

    def __post_init__(self) -> None:
        self.require_rank(self.rank)
        self.require(self.rank % 2 == 0, f"the rank must be even, for two pieces; found {self.rank}")
        self.require_probability("sparsity", self.sparsity)
        self.require(self.coefficient != 0, "coefficient 0 would switch the distances off")

    @property
    def rule(self) -> Competition:
        """How entries compete."""
        return Competition("dense" if self.dense else "square")


@method(SNELLA, paper="arXiv:2510.24037", tests=({"rank": 4, "sparsity": 0.5}, {"rank": 4, "dense": True}))
class SNELLAAdapter(KernelMerge):
    """``alpha``, ``g`` and ``beta``, scalars, and the buffer ``kept``: how many entries win here."""

    def __init__(self, config: SNELLA, site: Site, *, rng: torch.Generator):
        super().__init__(config, site, rng=rng)
        self.alpha, self.beta = self.ones(1), self.zeros(1)
        self.g = self.parameter(torch.full((1,), math.log(math.e - 1)))  # softplus(g) = 1
        self.register_buffer("kept", torch.tensor(round((1 - config.sparsity) * self.capacity), device=site.device))

    @property
    def capacity(self) -> int:
        """How many entries the matrix has."""
        return math.prod(self.site.shape)

    def sparsity(self) -> Tensor:
        return 1 - self.kept.double() / self.capacity

    def mix(self) -> Sequence[Tensor]:
        return self.alpha.view(()), F.softplus(self.g).view(()), self.beta.view(())
