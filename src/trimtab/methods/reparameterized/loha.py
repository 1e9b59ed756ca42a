"""LoHa: the Hadamard product of two low-rank products beside the frozen weight.

``W' = W + (alpha / r) (w1a w1b) * (w2a w2b)`` with ``w1a, w2a`` (out, r) and ``w1b, w2b`` (r, in). Its rank is up to r^2.
``w2b`` starts at zero, the others Kaiming-uniform (a = sqrt 5), so training starts at the base. Source: FedPara,
arXiv 2108.06098, Prop. 1; the start is peft's. Trainable: ``2 r (in + out)``. Saved for backward: ``x`` alone, in both forms
(kernels/hadamard.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core.contracts import MethodConfig, Reparameterization
from trimtab.core.errors import TooSmall
from trimtab.core.registry import method
from trimtab.core.site import Operation, Site
from trimtab.kernels.beside import beside
from trimtab.kernels.hadamard import Hadamard, KhatriRao, khatri_rao
from trimtab.kernels.lowrank import low_rank
from trimtab.kernels.rebuilt import rebuilt

__all__ = ["LoHa", "LoHaAdapter"]


@dataclass(frozen=True)
class LoHa(MethodConfig):
    """Hadamard product of two rank-r products: rank r^2 for the parameters of a LoRA of rank 2r.

    Not for small budgets of time: it costs a LoRA of rank r^2, or a dense weight gradient where that is less.

    Args:
        rank: r of each of the two products.
        alpha: scale numerator; None means ``rank``, a scale of 1.
        rank_dropout: probability of dropping a row (an output) of the update while training; the kept rows are scaled
            by the inverse of the share that was kept.
        module_dropout: probability of dropping the whole update of a place for one forward while training.
    """

    search = {"rank": (2, 4, 8, 16, 32)}

    rank: int = 8
    alpha: float | None = None
    rank_dropout: float = 0.0
    module_dropout: float = 0.0

    def __post_init__(self) -> None:
        self.require_rank(self.rank)
        self.require(self.alpha is None or self.alpha != 0, "alpha 0 would switch the adapter off")
        self.require_probability("rank_dropout", self.rank_dropout)
        self.require_probability("module_dropout", self.module_dropout)

    @property
    def scale(self) -> float:
        """The factor in front of the product."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


@method(LoHa, paper="arXiv:2108.06098 Prop. 1", tests=({"rank": 1}, {"rank": 3, "alpha": 4.5}))
class LoHaAdapter(Reparameterization):
    """Factors ``w1a``, ``w1b``, ``w2a``, ``w2b``."""

    fast = frozenset({"linear", "conv", "embedding"})
    needs_weight = False

    def __init__(self, config: LoHa, site: Site, *, rng: torch.Generator):
        super().__init__(config, site)
        out, fan_in = site.shape
        self.w1a, self.w1b = self.kaiming(out, config.rank, rng=rng), self.kaiming(config.rank, fan_in, rng=rng)
        self.w2a, self.w2b = self.kaiming(out, config.rank, rng=rng), self.zeros(config.rank, fan_in)
        self.thin = 3 * config.rank**2 * (out + fan_in) < out * fan_in

    @classmethod
    def check(cls, config: LoHa, site: Site) -> None:
        if config.rank > min(site.shape[-2:]):
            raise TooSmall(
                f"rank {config.rank} is larger than the matrix {tuple(site.shape[-2:])} of {site.name}; "
                f"use at most {min(site.shape[-2:])}"
            )

    def weight(self, W: Tensor) -> Tensor:
        return W + Hadamard(self.config.scale).delta(self.w1a, self.w1b, self.w2a, self.w2b)

    def forward(self, x: Tensor, base: Operation) -> Tensor:
        scale, params = self.config.scale, (self._kept(), self.w1b, self.w2a, self.w2b)
        if base.kind == "linear":
            return beside(KhatriRao(scale), x, base, *params) if self.thin else rebuilt(Hadamard(scale), x, base, *params)
        if self.thin:
            ka, kb = khatri_rao(*params)
            return low_rank(x, base, kb, ka, scale=scale)
        return base.apply(x, base.weight + Hadamard(scale).delta(*params))

    def factors(self) -> tuple[Tensor, Tensor] | None:
        if self.config.rank**2 >= min(self.site.shape):
            return None
        ka, kb = khatri_rao(self.w1a, self.w1b, self.w2a, self.w2b)
        return self.config.scale * ka, kb

    def _kept(self) -> Tensor:
        """``w1a`` with its dropped rows at zero: an output's row of ``w1a`` scales its whole row of the update."""
        c, w = self.config, self.w1a
        if not self.training or c.rank_dropout == c.module_dropout == 0:
            return w
        kept = (torch.rand(w.shape[0], 1, device=w.device) >= c.rank_dropout).to(w.dtype)
        kept = kept / kept.mean().clamp_min(1 / w.shape[0])
        return w * kept * (torch.rand((), device=w.device) >= c.module_dropout)
