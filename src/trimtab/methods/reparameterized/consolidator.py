"""Consolidator: a grouped linear layer beside each linear one, merged into it as blocks.

``y = W x + bias + G s(x)``: the inputs, shuffled or not, in g groups, each with its own ``(out / g, in / g)`` block. As one matrix:
``W'[o, i] = W[o, i] + G[o, c]``, where ``i`` is the input at position ``p = (o // (out / g)) (in / g) + c`` of ``s(x)``: ``i = p``
unshuffled, ``i = (p mod g) (in / g) + p // g`` shuffled. ``G`` (out, in / g) starts uniform in +-0.001, so close to the base
and not at it. Source: arXiv 2305.00603, Sec. 3. Trainable: ``out in / g``. Saved for backward: ``x`` alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trimtab.core.contracts import MethodConfig, Reparameterization, Span
from trimtab.core.errors import ShapeMismatch
from trimtab.core.registry import method
from trimtab.core.site import Operation, Site
from trimtab.kernels.divisors import nearest_divisor, nearest_divisors
from trimtab.kernels.entries import added, entries

__all__ = ["Consolidator", "ConsolidatorAdapter"]

START = 1e-3
#: the number of groups where nothing is said
USUAL = 384


@dataclass(frozen=True)
class Consolidator(MethodConfig):
    """Block-diagonal update of ``groups`` blocks; a full-rank update for ``out in / groups`` numbers.

    The paper trains the biases and norms with it: attach ``BitFit`` and ``NormTuning`` under the same name. Not where a few
    directions of the whole input matter, which a block cannot see: there LoRA is the choice.

    Args:
        groups: g; must divide ``in`` and ``out``. None: 384, or what is nearest to it and divides both.
        shuffle: deal the inputs to the groups in turn, as in the paper; the released training code leaves them in order.
    """

    search = {"groups": (96, 192, 384), "shuffle": (False, True)}
    learning_rate = Span(5e-4, 1e-2, log=True)

    groups: int | None = None
    shuffle: bool = False

    def __post_init__(self) -> None:
        self.require_count("groups", optional=True)


@method(Consolidator, paper="arXiv:2305.00603 Sec. 3", tests=({"groups": 4}, {"groups": 2, "shuffle": True}))
class ConsolidatorAdapter(Reparameterization):
    """The blocks ``g`` (out, in / groups)."""

    kinds = frozenset({"linear", "conv", "bare"})
    fast = frozenset({"linear"})
    needs_weight = False
    identity_at_start = False

    def __init__(self, config: Consolidator, site: Site, *, rng: torch.Generator):
        config = self.fit(config, site)
        super().__init__(config, site)
        out, fan_in = site.shape
        self.g = self.uniform(out, fan_in // config.groups, bound=START, rng=rng)

    @classmethod
    def fit(cls, config: Consolidator, site: Site) -> Consolidator:
        return replace(config, groups=config.groups or nearest_divisor(math.gcd(*site.shape[-2:]), USUAL))

    @classmethod
    def check(cls, config: Consolidator, site: Site) -> None:
        config = cls.fit(config, site)
        for size, what in zip(site.shape[-2:], ("outputs", "inputs"), strict=True):
            if size % config.groups:
                raise ShapeMismatch(
                    f"groups={config.groups} does not divide the {size} {what} of {site.name}; nearest divisors: "
                    f"{nearest_divisors(size, config.groups)}"
                )

    def index(self) -> Tensor:
        """(out in / groups,) places of the blocks' entries in the flattened matrix."""
        out, fan_in = self.site.shape[-2:]
        groups, width = self.config.groups, fan_in // self.config.groups
        position = torch.arange(fan_in, device=self.g.device)
        if self.config.shuffle:
            position = (position % groups) * width + position // groups
        columns = position.view(groups, width).repeat_interleave(out // groups, 0)
        return (columns + torch.arange(0, out * fan_in, fan_in, device=self.g.device)[:, None]).flatten()

    def weight(self, W: Tensor) -> Tensor:
        return added(W, self.index(), self.g.flatten())

    def forward(self, x: Tensor, base: Operation) -> Tensor:
        return entries(x, base, self.index, self.g.flatten())
