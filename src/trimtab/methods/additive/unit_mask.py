"""UnitMask: one factor for every attention head and every feed-forward channel.

At the layer that reads the units (attn.o, mlp.down), ``W' = W diag(m repeated)``: unit ``u`` of ``size`` neighbouring inputs
is multiplied by ``m[u]``; ``m`` (units,) starts at one, so training starts at the base. For a head this equals a factor on its
attention probabilities, without a tensor of their size. Source: arXiv 2101.00063 (EarlyBERT) and 2406.03792 (Light-PEFT), the masks
of the estimation stage. Trainable: one number a head or channel. Saved for backward: the product, which the layer keeps anyway.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Generator, Tensor

from trimtab.core.contracts import MethodConfig, Reparameterization, Span
from trimtab.core.errors import ShapeMismatch
from trimtab.core.registry import method
from trimtab.core.site import Operation, Site
from trimtab.kernels.gate import gated

__all__ = ["UnitMask", "UnitMaskAdapter"]


@dataclass(frozen=True)
class UnitMask(MethodConfig):
    """Learned factors on heads and channels, or a fixed mask of them: shows what a task can spare (see LightPEFT).

    Not for quality, as a method of its own: it can only make units louder or quieter.

    Args:
        size: inputs that make up a unit; None: a head at ``attn.o``, one channel elsewhere. With grouped queries, a group of heads
            has the size of all its heads together.
        learn: False keeps the mask as it is: it is stored with the adapter and no parameter.
    """

    learning_rate = Span(1e-3, 1e-1, log=True)

    size: int | None = None
    learn: bool = True

    def __post_init__(self) -> None:
        self.require_count("size", optional=True)

    def unit(self, site: Site) -> int:
        """Inputs of a unit at ``site``."""
        return self.size or (site.head_size if site.role == "attn.o" and site.head_size else 1)


@method(UnitMask, paper="arXiv:2406.03792, estimation stage", tests=({}, {"size": 2}))
class UnitMaskAdapter(Reparameterization):
    """The factors ``m``, (in / size,)."""

    targets = "attn.o | mlp.down"
    kinds = frozenset({"linear"})
    fast = frozenset({"linear"})
    needs_weight = False
    additive = False
    in_axes = {"m": 0}

    def __init__(self, config: UnitMask, site: Site, *, rng: Generator):
        super().__init__(config, site)
        units = site.stored["m"][0] if site.stored else site.shape[-1] // config.unit(site)
        self.size = site.shape[-1] // units
        if config.learn:
            self.m = self.ones(units)
        else:
            self.register_buffer("m", self.ones(units).detach())

    @classmethod
    def layer(cls, config: UnitMask) -> str:
        return "units" if config.learn else "mask"

    @classmethod
    def check(cls, config: UnitMask, site: Site) -> None:
        if site.shape[-1] % config.unit(site):
            raise ShapeMismatch(f"the {site.shape[-1]} inputs of {site.name} are no multiple of a unit's {config.unit(site)}")

    def weight(self, W: Tensor) -> Tensor:
        return W * self.m.repeat_interleave(self.size)

    def forward(self, x: Tensor, base: Operation) -> Tensor:
        return base(gated(x, self.m, self.size))
