"""PiSSA: the principal singular triplets of W learn, the residual stays.

With ``W = U S V^T`` and scale ``s``: ``B0 = U_r sqrt(S_r / s)`` (out, r), ``A0 = sqrt(S_r / s) V_r^T`` (r, in), and
``W' = W + s (B A - B0 A0)``; training starts at the base. The residual is W's spectrum from ``r + 1`` on. W is kept and
subtracted from lazily (see moved.py). Dropout has no place here: it would break the start while training.
Source: arXiv 2404.02948, Eqs. 2-4; dividing S by s is the code's, so that any alpha works. Trainable: ``r (in + out)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core.contracts import MethodConfig, Span
from trimtab.core.registry import method
from trimtab.core.site import Site
from trimtab.kernels.spectral import top_svd
from trimtab.methods.reparameterized.moved import MovedLowRank

__all__ = ["PiSSA", "PiSSAAdapter"]


@dataclass(frozen=True)
class PiSSA(MethodConfig):
    """LoRA that starts from the principal singular vectors of W; learns faster than LoRA at the same cost.

    Not for very many adapters on disk: each carries its start as well, twice the numbers of a LoRA.

    Args:
        rank: r, at most ``min(in, out)``.
        alpha: scale numerator, above 0; None means ``rank``, a scale of 1, as in the paper.
        iterations: None for the exact SVD; else power iterations of the randomised one (4 to 16), for large matrices.
    """

    search = {"rank": (2, 4, 8, 16, 32, 64)}
    learning_rate = Span(1e-5, 1e-3, log=True)

    rank: int = 8
    alpha: float | None = None
    iterations: int | None = None

    def __post_init__(self) -> None:
        self.require_rank(self.rank)
        self.require(self.alpha is None or self.alpha > 0, f"alpha must be above 0, found {self.alpha!r}")
        self.require(
            self.iterations is None or self.iterations >= 0,
            f"iterations must be None or at least 0, found {self.iterations!r}",
        )

    @property
    def scale(self) -> float:
        """The factor in front of both products."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


@method(PiSSA, paper="arXiv:2404.02948 Eqs. 2-4", tests=({"rank": 2, "alpha": 3.0}, {"rank": 2, "iterations": 4}))
class PiSSAAdapter(MovedLowRank):
    """Factors that start at the principal triplets of the site's matrix."""

    @staticmethod
    def start(config: PiSSA, site: Site, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        U, S, Vh = top_svd(site.weight, config.rank, iterations=config.iterations, rng=rng)
        root = (S / config.scale).sqrt()
        return U * root, root[:, None] * Vh
