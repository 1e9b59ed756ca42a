"""What PiSSA, OLoRA and LoRA-GA share: they start at ``B0 A0 != 0`` and take it out of the base.

``W' = W + s (B A - B0 A0)``. The base keeps its W (the residual ``W - s B0 A0`` is never written); both products are one
low-rank operation of rank 2r, whose frozen half costs no gradient. ``a0`` (r, in) and ``b0`` (out, r) are stored with the
adapter, so that it never depends on repeating a decomposition, and converting to a plain LoRA of rank 2r is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.core.contracts import MethodConfig
from trimtab.core.site import Operation, Site
from trimtab.kernels.lowrank import low_rank
from trimtab.methods.reparameterized.lora import LowRank

__all__ = ["MovedLowRank"]


class MovedLowRank(LowRank):
    """``LowRank`` from ``start(...)``; a subclass states that start, the config has ``rank`` and ``scale``."""

    # a cut rank takes its start with it: the base is whole again in that direction
    rank_axes = {"a": 0, "b": 1, "a0": 0, "b0": 1}
    in_axes = {"a": 1, "a0": 1}
    out_axes = {"b": 0, "b0": 0}

    def __init__(self, config: MethodConfig, site: Site, *, rng: torch.Generator):
        super(LowRank, self).__init__(config, site)
        out, fan_in = site.shape
        if site.is_meta:
            b, a = torch.empty(out, config.rank, device="meta"), torch.empty(config.rank, fan_in, device="meta")
        else:
            b, a = self.start(config, site, rng)
        self.a, self.b = self.parameter(a), self.parameter(b)
        self.register_buffer("a0", self.constant(a))
        self.register_buffer("b0", self.constant(b))

    @staticmethod
    def start(config: MethodConfig, site: Site, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """``(B0, A0)``, shapes (out, r) and (r, in)."""
        raise NotImplementedError

    def starts(self) -> dict[str, Tensor]:
        return {"a": self.a0, "b": self.b0}

    def weight(self, W: Tensor) -> Tensor:
        return W + self.config.scale * (self.b @ self.a - self.b0 @ self.a0)

    def forward(self, x: Tensor, base: Operation) -> Tensor:
        return low_rank(x, base, self.a, self.b, scale=self.config.scale, start=(self.a0, self.b0))

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.config.scale * torch.cat([self.b, -self.b0], dim=1), torch.cat([self.a, self.a0])
