"""SSF: every operation's output is scaled and shifted, channel by channel.

``y' = gamma * y + beta``, hence ``W' = diag(gamma) W`` and ``b' = gamma * b + beta``, on linear layers, convolutions and norms;
``gamma`` ~ N(1, std), ``beta`` ~ N(0, std), both (out,). With the paper's std of 0.02 training does not start at the base.
A layer that cannot carry a bias (an RMS norm) gets the gain alone. Source: arXiv 2210.08823, Eq. 3-5. Trainable: ``2 out`` a
place. Saved for backward: the output before scaling.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from trimtab.core.contracts import MethodConfig, Reparameterization, Span
from trimtab.core.registry import method
from trimtab.core.site import Operation, Site
from trimtab.kernels.gain import gained

__all__ = ["SSF", "SSFAdapter"]


@dataclass(frozen=True)
class SSF(MethodConfig):
    """A gain and a shift behind every operation of a vision model; merges into weights and biases.

    Not for models whose layers have no bias, if the merged model must have the base's architecture: the shift needs one. Not
    where the start must be the base, unless ``std`` is 0.

    Args:
        std: standard deviation of the start of gain and shift around 1 and 0.
    """

    search = {"std": (0.0, 0.02)}
    learning_rate = Span(5e-4, 5e-2, log=True)

    std: float = 0.02

    def __post_init__(self) -> None:
        self.require(self.std >= 0, f"std must be at least 0, found {self.std!r}")


@method(SSF, paper="arXiv:2210.08823 Eq. 3-5", tests=({}, {"std": 0.0}))
class SSFAdapter(Reparameterization):
    """``gamma`` (out,), and ``beta`` (out,) where the module can carry a bias."""

    targets = "linear | norm | conv"
    tensors = ("weight",)
    kinds = frozenset({"linear", "conv", "grouped", "vector"})
    fast = frozenset({"linear"})
    needs_weight = False
    additive = False
    rebias = True

    def __init__(self, config: SSF, site: Site, *, rng: Generator):
        super().__init__(config, site)
        out = site.shape[0] if site.kind == "vector" else site.shape[-2]
        self.gamma = self._around(torch.ones(out, device=site.device), rng)
        self.beta = self._around(torch.zeros(out, device=site.device), rng) if site.carries_bias else None
        self.in_axes, self.out_axes = {}, {"gamma": 0} | ({"beta": 0} if site.carries_bias else {})

    def _around(self, centre: Tensor, rng: Generator) -> nn.Parameter:
        if self.site.is_meta:
            return self.parameter(centre)
        return self.parameter(centre + self.config.std * torch.randn(centre.shape, generator=rng).to(centre.device))

    @classmethod
    def identity(cls, config: SSF) -> bool:
        return config.std == 0

    def weight(self, W: Tensor) -> Tensor:
        return W * (self.gamma if W.dim() == 1 else self.gamma[:, None])

    def bias(self, b: Tensor | None) -> Tensor | None:
        if b is None or self.beta is None:
            return self.beta if b is None else b * self.gamma
        return b * self.gamma + self.beta

    def forward(self, x: Tensor, base: Operation) -> Tensor:
        return gained(base(x), self.gamma, self.beta)
