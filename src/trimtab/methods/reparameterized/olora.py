"""OLoRA: LoRA that starts from the orthonormal basis of W's first columns.

With ``W = Q R``: ``B0 = Q[:, :r]`` (out, r), orthonormal columns; ``A0 = R[:r]`` (r, in), upper trapezoidal; ``W' = W +
s (B A - B0 A0)``; training starts at the base. W is kept and subtracted from lazily (see moved.py). QR does not pivot:
with ``s = 1`` the first r columns of the residual are zero, so the adapter owns the first r input features and the start
depends on the order of the features, unlike PiSSA's. Source: arXiv 2406.01775, Algorithm 1. Trainable: ``r (in + out)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core.contracts import MethodConfig, Span
from trimtab.core.registry import method
from trimtab.core.site import Site
from trimtab.kernels.spectral import full_precision
from trimtab.methods.reparameterized.moved import MovedLowRank

__all__ = ["OLoRA", "OLoRAAdapter"]


@dataclass(frozen=True)
class OLoRA(MethodConfig):
    """LoRA that starts from a QR decomposition of W; cheaper to start than PiSSA.

    Not where PiSSA's SVD is affordable and quality counts; and a file carries its start, twice the numbers of a LoRA.

    Args:
        rank: r, at most ``min(in, out)``.
        alpha: scale numerator; None means ``rank``, a scale of 1.
    """

    search = {"rank": (2, 4, 8, 16, 32, 64)}
    learning_rate = Span(1e-5, 1e-3, log=True)

    rank: int = 8
    alpha: float | None = None

    def __post_init__(self) -> None:
        self.require_rank(self.rank)
        self.require(self.alpha is None or self.alpha != 0, "alpha 0 would switch the adapter off")

    @property
    def scale(self) -> float:
        """The factor in front of both products."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


@method(OLoRA, paper="arXiv:2406.01775 Alg. 1", tests=({"rank": 2}, {"rank": 3, "alpha": 1.5}))
class OLoRAAdapter(MovedLowRank):
    """Factors that start at the first r columns of Q and rows of R."""

    @staticmethod
    def start(config: OLoRA, site: Site, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        W = full_precision(site.weight)
        # the first r columns of Q and R depend on the first r columns of W alone: no need to decompose the others
        Q, R = torch.linalg.qr(W[:, : config.rank])
        return Q, torch.cat([R, Q.t() @ W[:, config.rank :]], dim=1)
