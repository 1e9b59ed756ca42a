"""LoRA: a low-rank update beside the frozen weight.

``W' = W + (alpha / r) B A`` with ``A`` (r, in), ``B`` (out, r); ``A`` starts Kaiming-uniform (a = sqrt 5), ``B`` at
zero, so training starts at the base. Source: arXiv 2106.09685, Eq. 3. Trainable: ``r (in + out)``.

``LowRank`` is the layer that every method with one pair of factors shares; the methods differ in scale and start.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core.contracts import MethodConfig, Reparameterization
from trimtab.core.errors import TooSmall
from trimtab.core.registry import method
from trimtab.core.site import Operation, Site
from trimtab.kernels.lowrank import low_rank

__all__ = ["LoRA", "LoRAAdapter", "LowRank", "check_rank", "start_bound"]


@dataclass(frozen=True)
class LoRA(MethodConfig):
    """Low-rank update ``W + (alpha / rank) B A``; the safe first choice.

    Not where the change has a high rank (new knowledge, another modality): raise the rank, or take MiSS, LoHa or SoKA.

    Args:
        rank: r, at most ``min(in, out)``.
        alpha: scale numerator; None means ``2 * rank``, a scale of 2.
        dropout: probability of zeroing an entry of the adapter branch's input while training.
    """

    search = {"rank": (2, 4, 8, 16, 32, 64), "dropout": (0.0, 0.05, 0.1)}

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        self.require_rank(self.rank)
        self.require_probability("dropout", self.dropout)
        self.require(self.alpha is None or self.alpha != 0, "alpha 0 would switch the adapter off")

    @property
    def scale(self) -> float:
        """The factor in front of ``B A``."""
        return (2 * self.rank if self.alpha is None else self.alpha) / self.rank


def check_rank(rank: int, site: Site, *, least: int = 1) -> None:
    """Raise ``TooSmall`` if the site's matrix is smaller than ``least * rank`` on either axis."""
    limit = min(site.shape[-2:])
    if least * rank > limit:
        what = f"rank {rank}" if least == 1 else f"{least} times the rank {rank}"
        raise TooSmall(
            f"{what} is larger than the matrix {tuple(site.shape[-2:])} of {site.name} allows; "
            f"use a rank of at most {limit // least}"
        )


def start_bound(site: Site) -> float:
    """Bound of A's uniform start: 1/sqrt(fan_in), with a fan-in of 1 for an embedding, whose input is one-hot."""
    return 1.0 if site.kind == "embedding" else 1 / math.sqrt(site.shape[-1])


class LowRank(Reparameterization):
    """Factors ``a`` (r, in) and ``b`` (out, r), ``W' = W + scale * b a``; the config has ``rank``, ``scale``, ``dropout``."""

    fast = frozenset({"linear", "conv", "embedding"})
    needs_weight = False
    rank_axes = {"a": 0, "b": 1}
    in_axes = {"a": 1}
    out_axes = {"b": 0}

    def __init__(self, config: LoRA, site: Site, *, rng: torch.Generator):
        super().__init__(config, site)
        out, fan_in = site.shape
        self.a = self.uniform(config.rank, fan_in, bound=start_bound(site), rng=rng)
        self.b = self.zeros(out, config.rank)

    @classmethod
    def check(cls, config: LoRA, site: Site) -> None:
        check_rank(config.rank, site)

    def weight(self, W: Tensor) -> Tensor:
        return W + self.config.scale * (self.b @ self.a)

    def forward(self, x: Tensor, base: Operation) -> Tensor:
        return low_rank(x, base, self.a, self.b, scale=self.config.scale, dropout=self.config.dropout * self.training)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.config.scale * self.b, self.a


@method(LoRA, paper="arXiv:2106.09685 Eq. 3", tests=({"rank": 2}, {"rank": 3, "alpha": 1.5}))
class LoRAAdapter(LowRank):
    """``LowRank`` with the scale ``alpha / r``."""
