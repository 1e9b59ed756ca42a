"""AdaLoRA: a singular-value-like update whose triplets can be switched off one by one.

``W' = W + alpha / (r + 1e-5) P diag(E) Q`` with ``P`` (out, r), ``E`` (r, 1), ``Q`` (r, in); P and Q start at N(0, 0.02^2),
E at zero, so training starts at the base. ``orthogonality(model)`` is the penalty that keeps P and Q near orthonormal; add
it to the loss. Pruning sets entries of E to zero and keeps P and Q, so that a triplet can return; the divisor stays the
rank at the start. Source: arXiv 2303.10512, Eqs. 3 and 4; the names are the paper's, the divisor is its code's.
Trainable: ``r (in + out + 1)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab.core.contracts import MethodConfig, Reparameterization
from trimtab.core.errors import NoMatch
from trimtab.core.registry import method
from trimtab.core.site import Operation, Site
from trimtab.kernels.lowrank import low_rank
from trimtab.methods.reparameterized.lora import check_rank

__all__ = ["AdaLoRA", "AdaLoRAAdapter", "orthogonality"]


@dataclass(frozen=True)
class AdaLoRA(MethodConfig):
    """LoRA as ``P diag(E) Q`` with a rank that a budget can shrink place by place.

    Not without a budget schedule: alone it is a LoRA with one diagonal more.

    Args:
        rank: rank at the start, at most ``min(in, out)``; 1.5 times the rank aimed at is usual.
        alpha: scale numerator; None means ``2 * rank``.
        dropout: probability of zeroing an entry of the adapter branch's input while training.
        penalty: weight of the orthogonality penalty (0.1 to 0.5).
    """

    search = {"rank": (4, 8, 12, 24, 48)}

    rank: int = 12
    alpha: float | None = None
    dropout: float = 0.0
    penalty: float = 0.5

    def __post_init__(self) -> None:
        self.require_rank(self.rank)
        self.require_probability("dropout", self.dropout)
        self.require(self.alpha is None or self.alpha != 0, "alpha 0 would switch the adapter off")
        self.require(self.penalty >= 0, f"the penalty must be at least 0, found {self.penalty!r}")

    @property
    def scale(self) -> float:
        """The factor in front of ``P diag(E) Q``."""
        return (2 * self.rank if self.alpha is None else self.alpha) / (self.rank + 1e-5)


@method(AdaLoRA, paper="arXiv:2303.10512 Eq. 3", tests=({"rank": 2}, {"rank": 3, "alpha": 1.5}))
class AdaLoRAAdapter(Reparameterization):
    """``p`` (out, r), ``e`` (r, 1), ``q`` (r, in)."""

    fast = frozenset({"linear", "conv", "embedding"})
    needs_weight = False
    in_axes = {"q": 1}
    out_axes = {"p": 0}
    rank_axes = {"p": 1, "e": 0, "q": 0}

    def __init__(self, config: AdaLoRA, site: Site, *, rng: torch.Generator):
        super().__init__(config, site)
        out, fan_in = site.shape
        self.p = self.normal(out, config.rank, std=0.02, rng=rng)
        self.e = self.zeros(config.rank, 1)
        self.q = self.normal(config.rank, fan_in, std=0.02, rng=rng)

    @classmethod
    def check(cls, config: AdaLoRA, site: Site) -> None:
        check_rank(config.rank, site)

    def weight(self, W: Tensor) -> Tensor:
        return W + self.config.scale * (self.p @ (self.e * self.q))

    def forward(self, x: Tensor, base: Operation) -> Tensor:
        # E goes on Q, whose product with x it scales: r * in more multiplications, and one Function for both factors
        dropout = self.config.dropout * self.training
        return low_rank(x, base, self.e * self.q, self.p, scale=self.config.scale, dropout=dropout)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.config.scale * self.p, self.e * self.q

    def orthogonality(self) -> Tensor:
        """``||P^T P - I||_F + ||Q Q^T - I||_F``, a scalar (Eq. 4; Frobenius norms as in its code, not squared)."""
        eye = torch.eye(self.p.shape[-1], device=self.p.device, dtype=self.p.dtype)  # ranks may have been cut
        # over the last two axes, so that a bank of experts sums its experts
        return sum(torch.linalg.matrix_norm(gram - eye).sum() for gram in (self.p.mT @ self.p, self.q @ self.q.mT))


def orthogonality(model: nn.Module) -> Tensor:
    """The penalty to add to the loss: ``penalty / n`` times the sum over all AdaLoRA places, n the number of factors P and Q.

    Raises:
        NoMatch: the model has no AdaLoRA adapter.
    """
    found = [m for m in model.modules() if isinstance(m, AdaLoRAAdapter)]
    if not found:
        raise NoMatch("orthogonality(model) needs AdaLoRA adapters; tt.attach(model, tt.AdaLoRA()) first")
    return sum(m.config.penalty * m.orthogonality() for m in found) / (2 * len(found))
