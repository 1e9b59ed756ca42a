"""SNELL: two factors merged by distances, and of the merged matrix only the largest entries.

``K[i, o] = sum_p c_p ||A_p[i] - B_p[o]||_2`` (in, out) with ``A`` (P, in, r / P), ``B`` (P, out, r / P) and ``c_p = +c, -c, ...``;
``W' = W + U^T`` with ``U = K |K| 1[|K| > t]``, t the s-quantile of ``|K|`` over the matrix; for s = 0, ``U = K``. K is full-rank.
A and B start Kaiming-uniform, so the start is near the base and not at it. Source: arXiv 2411.01800, Eqs. 3-6 and Tab. A6;
where the paper's rule and gradient differ from its code's, the code's are the default. Trainable: ``r (in + out)``. Saved
for backward: ``x`` alone (kernels/kernelized.py).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core.contracts import MethodConfig, Reparameterization, Span
from trimtab.core.registry import method
from trimtab.core.site import Operation, Site
from trimtab.kernels.kernelized import Competition, kernel_delta, kernelized, quantile

__all__ = ["SNELL", "KernelMerge", "SNELLAdapter"]


@dataclass(frozen=True)
class SNELL(MethodConfig):
    """Sparse tuning at a LoRA's memory: factors merged by distances, and the merged matrix's largest entries alone.

    Not for a start at the base: with sparsity 0 the first step already moves the model.

    Args:
        rank: r, a multiple of ``pieces``.
        sparsity: s, the share of entries that are zero; 0 is the dense kernel, unsquared: not the limit of small s.
        shrink: what winners become: ``"square"`` K|K| (the code), ``"paper"`` K(|K| - t), ``"hard"`` K, or ``"soft"``
            sign(K)(|K| - t).
        through: let gradients flow through the factor that depends on K too, instead of taking it as a constant.
        pieces: P, how many distances make the kernel.
        coefficient: c; the signs of the pieces alternate.
        learn_coefficients: train the P coefficients, as in the paper; its code does not.
    """

    search = {"rank": (8, 16, 32), "sparsity": (0.0, 0.1, 0.3, 0.5, 0.8, 0.9)}
    learning_rate = Span(3e-4, 3e-2, log=True)

    rank: int = 8
    sparsity: float = 0.5
    shrink: str = "square"
    through: bool = False
    pieces: int = 2
    coefficient: float = 0.1
    learn_coefficients: bool = False

    def __post_init__(self) -> None:
        self.require_rank(self.rank)
        self.require_count("pieces")
        self.require(self.rank % self.pieces == 0, f"the rank must be a multiple of pieces={self.pieces}, found {self.rank}")
        self.require_probability("sparsity", self.sparsity)
        self.require_choice("shrink", ("square", "paper", "hard", "soft"))
        self.require(self.coefficient != 0, "coefficient 0 would switch the adapter off")
        if self.pieces == 1:
            warnings.warn("SNELL with pieces=1 makes every entry of K of one sign: use 2 or more", stacklevel=3)

    @property
    def rule(self) -> Competition:
        """How entries compete."""
        return Competition(self.shrink if self.sparsity else "dense", self.through)


class KernelMerge(Reparameterization):
    """``a`` (P, in, r / P) and ``b`` (P, out, r / P), with the coefficients ``c`` (P,); SNELL and SNELLA are both this."""

    fast = frozenset({"linear"})
    kinds = frozenset({"linear", "bare"})
    needs_weight = False
    identity_at_start = False

    def __init__(self, config: SNELL, site: Site, *, rng: torch.Generator):
        super().__init__(config, site)
        pieces, width = config.pieces, config.rank // config.pieces
        out, fan_in = site.shape
        self.a = self.uniform(pieces, fan_in, width, bound=(fan_in * width) ** -0.5, rng=rng)
        self.b = self.uniform(pieces, out, width, bound=(out * width) ** -0.5, rng=rng)
        c = torch.tensor([config.coefficient * (-1) ** p for p in range(pieces)])
        if config.learn_coefficients:
            self.c = self.parameter(c)
        else:
            self.register_buffer("c", self.constant(c))

    def sparsity(self) -> float | Tensor:
        """s of this place."""
        return self.config.sparsity

    def mix(self) -> Sequence[Tensor]:
        """What the kernel has beside distances: nothing."""
        return ()

    def parts(self) -> tuple[Tensor | None, ...]:
        """The threshold, the factors, the coefficients and the rest of the kernel, in float32 or wider."""
        wide = torch.promote_types(self.a.dtype, torch.float32)
        params = [p.to(wide) for p in (self.a, self.b, self.c, *self.mix())]
        return None if self.config.rule.rule == "dense" else quantile(self.sparsity(), *params), *params

    def weight(self, W: Tensor) -> Tensor:
        return W + kernel_delta(self.config.rule, *self.parts())

    def forward(self, x: Tensor, base: Operation) -> Tensor:
        return kernelized(self.config.rule, x, base, *self.parts())


VARIANTS = ({"rank": 4}, {"rank": 4, "sparsity": 0.0}, {"rank": 4, "shrink": "paper", "through": True, "learn_coefficients": True})


@method(SNELL, paper="arXiv:2411.01800 Eqs. 3-6", tests=VARIANTS)
class SNELLAdapter(KernelMerge):
    """The kernel of distances."""
