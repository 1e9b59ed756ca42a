"""Compacter: series adapters whose matrices are sums of Kronecker products with factors that all places share.

``y' = y + Up f(Down y + a) + b`` with ``Down^T = sum_i A_i (x) (s_i t_i)`` (d, m) and ``Up^T = sum_i A_i (x) (u_i v_i)`` (m, d), i
over n: ``A_i`` (n, n) is learned once for all places and both matrices, ``s_i`` (d/n, r), ``t_i`` (r, m/n), ``u_i`` (m/n, r) and
``v_i`` (r, d/n) at every place. The v start at zero, so training starts at the base. Source: arXiv 2106.04647, Sec. 3.
Trainable: ``2 r (d + m) + m + d`` a place, and ``n^3`` once. Saved for backward: ``y``, and m numbers a token where
``16 m <= d``; the matrices are made again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Generator, Tensor

from trimtab.core.anatomy import Anatomy
from trimtab.core.contracts import ActivationAdapter, MethodConfig, Span
from trimtab.core.errors import ShapeMismatch
from trimtab.core.registry import method
from trimtab.core.site import Site
from trimtab.kernels.bottleneck import ACTIVATIONS, Parts, bottleneck
from trimtab.kernels.divisors import nearest_divisor
from trimtab.kernels.kroneckersum import kron_sum

__all__ = ["Compacter", "CompacterAdapter"]

#: reduction and divisions where nothing is said
USUAL = 32, 4


@dataclass(frozen=True)
class Compacter(MethodConfig):
    """Series adapters of Kronecker factors, most of them shared: a tenth of an adapter's numbers.

    Not for speed or memory, which are those of a series adapter as wide, nor for merging; and not for widths that n does not
    divide.

    Args:
        reduction: d / m, how many times thinner the middle is; must divide the width. None: 32.
        divisions: n, number of Kronecker terms; must divide d and m. None: 4. Where both are None, what is nearest and fits.
        rank: r of the factors beside the shared ones.
        act: activation in the middle: none, relu, gelu, gelu_tanh, silu or tanh.
        shared: whether all places of one attach share the A_i.
        init: ``"zero"`` (starts at the base, scaled like a linear layer); ``"paper"``: A from N(0, 1e-4^2), the rest
            Glorot-uniform, near the base.
        placement: ``"houlsby"``, after attention and feed-forward (Compacter); ``"pfeiffer"``, after the feed-forward
            (Compacter++).
    """

    search = {"reduction": (8, 16, 32, 64), "divisions": (2, 4, 8), "placement": ("houlsby", "pfeiffer")}
    learning_rate = Span(3e-4, 3e-2, log=True)

    reduction: int | None = None
    divisions: int | None = None
    rank: int = 1
    act: str = "gelu_tanh"
    shared: bool = True
    init: str = "zero"
    placement: str = "houlsby"

    def __post_init__(self) -> None:
        self.require_count("reduction", "divisions", optional=True)
        self.require_rank(self.rank)
        self.require_choice("act", tuple(ACTIVATIONS))
        self.require_choice("init", ("zero", "paper"))
        self.require_choice("placement", ("houlsby", "pfeiffer"))


@method(
    Compacter, paper="arXiv:2106.04647 Sec. 3",
    tests=({"reduction": 2, "divisions": 2}, {"reduction": 4, "divisions": 1, "rank": 2, "shared": False, "act": "none"}),
)  # fmt: skip
class CompacterAdapter(ActivationAdapter):
    """``rule`` (n, n, n), shared; ``s``, ``t``, ``u``, ``v`` with n as their first axis; ``down_bias`` (m,), ``up_bias`` (d,)."""

    targets = "attn | mlp"

    def __init__(self, config: Compacter, site: Site, *, rng: Generator):
        config = self.fit(config, site)
        super().__init__(config, site)
        n, r, d = config.divisions, config.rank, site.out_features
        m = d // config.reduction
        deviation = 1e-4 if config.init == "paper" else n**-0.5
        make = lambda: self.normal(n, n, n, std=deviation, rng=rng)  # noqa: E731
        key = ("Compacter", n, site.device, site.adapter_dtype)
        self.rule = site.cohort.share(key, make) if config.shared else make()
        if config.init == "paper":
            glorot = lambda a, b: self.uniform(n, a, b, bound=math.sqrt(12 / (a + b)), rng=rng)  # noqa: E731
            self.s, self.t, self.u, self.v = glorot(d // n, r), glorot(r, m // n), glorot(m // n, r), glorot(r, d // n)
        else:  # entries of Down then have the variance of a Kaiming-uniform start, 1 / (3 d)
            self.s = self.normal(n, d // n, r, std=1.0, rng=rng)
            self.t = self.normal(n, r, m // n, std=(3 * d * r) ** -0.5, rng=rng)
            self.u = self.normal(n, m // n, r, std=(3 * m * r) ** -0.5, rng=rng)
            self.v = self.zeros(n, r, d // n)
        self.down_bias, self.up_bias = self.zeros(m), self.zeros(d)

    @classmethod
    def places(cls, config: Compacter, anatomy: Anatomy) -> str:
        return "mlp" if config.placement == "pfeiffer" else cls.targets

    @classmethod
    def reads(cls, config: Compacter) -> str:
        return "output"

    @classmethod
    def identity(cls, config: Compacter) -> bool:
        return config.init == "zero"

    @classmethod
    def merges(cls, config: Compacter, site: Site) -> bool:
        return config.act == "none"

    @classmethod
    def fit(cls, config: Compacter, site: Site) -> Compacter:
        d = site.out_features
        if config.reduction or config.divisions:
            return replace(config, reduction=config.reduction or USUAL[0], divisions=config.divisions or USUAL[1])
        n = nearest_divisor(d, USUAL[1])
        return replace(config, divisions=n, reduction=nearest_divisor(d, USUAL[0], where=lambda k: (d // k) % n == 0))

    @classmethod
    def check(cls, config: Compacter, site: Site) -> None:
        config = cls.fit(config, site)
        d, n = site.out_features, config.divisions
        good = [k for k in range(1, d + 1) if d % k == 0 and d % n == 0 and (d // k) % n == 0]
        if config.reduction not in good:
            near = sorted(good, key=lambda k: abs(k - config.reduction))[:3]
            raise ShapeMismatch(
                f"{site.name} has {d} features, which reduction {config.reduction} and {n} divisions do not divide; "
                + (f"nearest reductions: {', '.join(map(str, sorted(near)))}" if near else f"use divisions that divide {d}")
            )

    def made(self, rule: Tensor, s: Tensor, t: Tensor, u: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Parts:
        """Down (m, d), its bias, Up (d, m), its bias."""
        ones = rule.new_ones(rule.shape[0])
        return kron_sum(ones, rule, s @ t).t(), a, kron_sum(ones, rule, u @ v).t(), b

    def beside(self, y: Tensor, x: Tensor | None) -> Tensor:
        """``y`` with the network's output on ``x`` (None: on ``y``) added."""
        factors = (self.rule, self.s, self.t, self.u, self.v, self.down_bias, self.up_bias)
        return bottleneck(y, x, factors, make=self.made, act=self.config.act)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.beside(y, None)

    def change(self, x: Tensor, y: Tensor) -> Tensor:
        return self.beside(y.new_zeros(y.shape), y)
