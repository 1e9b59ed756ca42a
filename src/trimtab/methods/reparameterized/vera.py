"""VeRA: two random projections, shared by all layers and frozen; every layer learns two vectors.

``W' = W + diag(e) B diag(d) A`` with ``A`` (r, in) and ``B`` (out, r) Kaiming-uniform (gain sqrt 2) from a seed of their own,
``d`` (r,) starting at ``d_initial``, ``e`` (out,) at zero, so training starts at the base. One A and one B of the
largest in and out among the places serve all of them; a place sees views, and checkpoints store them once.
Source: arXiv 2310.11454, Eq. 2 (there b and d). Trainable: ``r + out``. Kept for backward: ``A x``, (tokens, r), not ``x``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core.contracts import MethodConfig, Reparameterization, Span
from trimtab.core.registry import method
from trimtab.core.site import Operation, Site
from trimtab.kernels.beside import beside
from trimtab.kernels.lowrank import low_rank
from trimtab.kernels.projections import ScaledProjections

__all__ = ["VeRA", "VeRAAdapter"]


@dataclass(frozen=True)
class VeRA(MethodConfig):
    """Learned scalings of two shared random projections; the fewest parameters of the low-rank family.

    Not for speed: its products have rank 256 and more, and a step takes 1.4 times the floor at width 1024.

    Args:
        rank: r; may exceed the matrix, since the projections are random.
        d_initial: start of the inner scaling.
        dropout: probability of zeroing an entry of the adapter branch's input while training.
        seed: of the projections; equal seeds and equal places give equal projections.
    """

    search = {"rank": (64, 128, 256, 512, 1024), "d_initial": (0.1, 1.0)}
    learning_rate = Span(1e-3, 1e-1, log=True)

    rank: int = 256
    d_initial: float = 0.1
    dropout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        self.require_rank(self.rank)
        self.require_probability("dropout", self.dropout)
        self.require(self.d_initial != 0, "d_initial 0 beside a zero e would leave both without a gradient")


@method(VeRA, paper="arXiv:2310.11454 Eq. 2", tests=({"rank": 4}, {"rank": 20, "d_initial": 1.0}))
class VeRAAdapter(Reparameterization):
    """``d`` (r,), ``e`` (out,) learn; buffers ``A`` (r, in), ``B`` (out, r) are views of tensors that all places share."""

    fast = frozenset({"linear", "conv", "embedding"})
    needs_weight = False

    def __init__(self, config: VeRA, site: Site, *, rng: torch.Generator):
        super().__init__(config, site)
        out, fan_in = site.shape
        sites = site.cohort.sites or [site]
        sizes = max(s.shape[-2] for s in sites), max(s.shape[-1] for s in sites)
        key = ("VeRA", config.rank, config.seed, site.device, site.adapter_dtype)
        A, B = site.cohort.share(key, lambda: self._projections(config, *sizes))
        self.register_buffer("A", A[:, :fan_in])
        self.register_buffer("B", B[:out])
        self.d = self.parameter(torch.full((config.rank,), config.d_initial, dtype=torch.float64))
        self.e = self.zeros(out)

    def _projections(self, config: VeRA, out: int, fan_in: int) -> tuple[Tensor, Tensor]:
        """Kaiming-uniform with gain sqrt 2: bound ``sqrt(6 / fan_in)``, the second axis being the fan-in. A first, then B."""
        rng = torch.Generator().manual_seed(config.seed)
        uniform = lambda *shape: (2 * self.random(*shape, rng=rng) - 1) * math.sqrt(6 / shape[1])  # noqa: E731
        return self.constant(uniform(config.rank, fan_in)), self.constant(uniform(out, config.rank))

    def weight(self, W: Tensor) -> Tensor:
        B, A = self.factors()
        return W + B @ A

    def forward(self, x: Tensor, base: Operation) -> Tensor:
        dropout = self.config.dropout * self.training
        if base.kind == "linear":
            return beside(ScaledProjections(self.A, self.B, dropout), x, base, self.d, self.e)
        B, A = self.factors()
        return low_rank(x, base, A, B, dropout=dropout)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.e[:, None] * self.B, self.d[:, None] * self.A
