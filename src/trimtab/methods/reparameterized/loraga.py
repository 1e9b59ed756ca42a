"""LoRA-GA: LoRA whose first step follows the full gradient.

With ``dL/dW = U S V^T`` on sample data: ``A0 = c V_{1..r}^T`` (r, in), ``B0 = c U_{r+1..2r}`` (out, r), and ``W' = W + s
(B A - B0 A0)``, ``s = alpha / sqrt(r)``. The first gradient step moves W by ``-lr s^2 (B0 B0^T G + G A0^T A0)``, for
``c = 1`` the best approximation of G of rank 2r: that is why B takes the *next* r vectors. ``c = out^(1/4) / sqrt(gamma)``
keeps the outputs' size. W is kept and subtracted from lazily (see moved.py). Source: arXiv 2407.05000, Theorems 3.1 and 3.2.
Trainable: ``r (in + out)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core.contracts import MethodConfig, Span
from trimtab.core.errors import Unsupported
from trimtab.core.registry import method
from trimtab.core.site import Site
from trimtab.kernels.spectral import top_svd
from trimtab.methods.reparameterized.lora import check_rank
from trimtab.methods.reparameterized.moved import MovedLowRank

__all__ = ["LoRAGA", "LoRAGAAdapter"]


@dataclass(frozen=True)
class LoRAGA(MethodConfig):
    """LoRA that starts from the singular vectors of the loss's gradient; needs ``tt.attach(..., loss=...)``.

    Not without data of the task when attaching; and a file carries its start, twice the numbers of a LoRA.

    Args:
        rank: r; ``2 r`` at most ``min(in, out)``.
        alpha: scale numerator; the scale is ``alpha / sqrt(rank)``.
        direction: which of the 2r leading vectors A and B take: "ArB2r" (A the first r, B the next r; the paper's),
            "A2rBr" (the other way round), "ArBr" (alternating), "random".
        size: "stable" (both times ``out^(1/4) / sqrt(gamma)``), "weight_svd" (both times the mean root of W's leading
            singular values over s), "gd_scale" (both over s), "unit" (orthonormal).
        gamma: the divisor of "stable".
        form: "paper", or "peft": B times the gradient's singular values, and the size on B alone ("gd_scale" on
            both), which makes the start depend on the scale of the loss.
    """

    search = {"rank": (2, 4, 8, 16, 32, 64)}
    learning_rate = Span(1e-5, 1e-3, log=True)

    rank: int = 8
    alpha: float = 16.0
    direction: str = "ArB2r"
    size: str = "stable"
    gamma: float = 16.0
    form: str = "paper"

    def __post_init__(self) -> None:
        self.require_rank(self.rank)
        self.require(self.alpha != 0, "alpha 0 would switch the adapter off")
        self.require(self.gamma > 0, f"gamma must be above 0, found {self.gamma!r}")
        self.require_choice("direction", ("ArB2r", "A2rBr", "ArBr", "random"))
        self.require_choice("size", ("stable", "weight_svd", "gd_scale", "unit"))
        self.require_choice("form", ("paper", "peft"))

    @property
    def scale(self) -> float:
        """The factor in front of both products."""
        return self.alpha / math.sqrt(self.rank)


@method(
    LoRAGA, paper="arXiv:2407.05000 Thms. 3.1, 3.2",
    tests=({"rank": 2}, {"rank": 2, "direction": "ArBr", "size": "unit"}, {"rank": 2, "form": "peft"}),
)
class LoRAGAAdapter(MovedLowRank):
    """Factors that start at singular vectors of ``site.gradient``."""

    needs_gradient = True

    @classmethod
    def check(cls, config: LoRAGA, site: Site) -> None:
        check_rank(config.rank, site, least=2)

    @staticmethod
    def start(config: LoRAGA, site: Site, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        if site.gradient is None:
            raise Unsupported(f"LoRAGA starts {site.name} from dL/dW; pass tt.attach(..., loss=model -> scalar on sample data)")
        r = config.rank
        U, S, Vh = top_svd(site.gradient, 2 * r, iterations=4, width=4 * r, rng=rng)
        for_a, for_b = _pick(config, rng)
        a, b = Vh[for_a], U[:, for_b]
        if config.form == "paper":
            grow = _size(config, site, rng)
            return grow * b, grow * a
        grow = _size(config, site, rng, leading=S[for_b][0])
        return grow * b * S[for_b], (grow if config.size == "gd_scale" else 1.0) * a


def _pick(config: LoRAGA, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices among the 2r leading vectors, for A and for B."""
    r, order = config.rank, torch.arange(2 * config.rank)
    if config.direction == "random":
        order = torch.randperm(2 * r, generator=rng)
        # peft's random form gives A and B the same vectors
        return order[:r], order[:r] if config.form == "peft" else order[r:]
    halves = {"ArB2r": (order[:r], order[r:]), "A2rBr": (order[r:], order[:r]), "ArBr": (order[1::2], order[0::2])}
    return halves[config.direction]


def _size(config: LoRAGA, site: Site, rng: torch.Generator, *, leading: Tensor | None = None) -> float:
    """The factor on A and B; ``leading``: the first singular value in B, for peft's form."""
    if config.size == "stable":
        return site.out_features**0.25 / math.sqrt(config.gamma)
    if config.size == "gd_scale":
        return 1 / config.scale
    if config.size == "weight_svd":
        S = top_svd(site.weight, config.rank, iterations=4, width=4 * config.rank, rng=rng)[1]
        if leading is None:
            return float((S / config.scale).abs().sqrt().mean())
        return float(S[0] / leading.to(S)) if leading > 0 else 1.0
    return 1.0
