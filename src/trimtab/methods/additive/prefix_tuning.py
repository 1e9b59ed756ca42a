"""Prefix tuning: every attention gets a few learned keys and values, which all queries see.

``Attn(q, [K_p; K], [V_p; V])`` with ``K_p`` (p, key width), ``V_p`` (p, value width), in each block's self-attention. With
``l = sum exp(q K_p^T) / sum exp(q [K_p; K]^T)`` this is ``(1 - l) Attn(q, K, V) + l Attn(q, K_p, V_p)``. The keys have no
position: they are not rotated, and the sequence keeps its own positions. Source: arXiv 2101.00190, Sec. 4.2.

With ``hidden``, ``[K_p; V_p]`` of all blocks come from one embedding, ``W_2 tanh(W_1 E + b_1) + b_2`` with E (p, width) and W_1
(hidden, width) shared and a W_2 (key width + value width, hidden) for each block (Sec. 4.3).

Gated (LLaMA-Adapter, arXiv 2303.16199, Eq. 4-6): ``Attn(q, K, V) + tanh(g) Attn(q, K_p, V_p)``, a softmax of its own and one g a
block that starts at zero, so training starts at the base. There K_p and V_p are projections of learned tokens; here they are free.

Trainable: ``p (key width + value width)`` a block, gated 1 more; with ``hidden``, ``h (width + 1) + p width`` once and
``(h + 1)(key width + value width)`` a block. Saved for backward: p rows of keys and values a batch entry and block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from trimtab.core.contracts import MethodConfig, Span, TokenAdapter
from trimtab.core.errors import Unsupported
from trimtab.core.registry import method
from trimtab.core.site import Site
from trimtab.core.stacks import key_value_widths, separable

__all__ = ["PrefixTuning", "PrefixTuningAdapter"]


@dataclass(frozen=True)
class PrefixTuning(MethodConfig):
    """Learned keys and values in every block's attention; nothing enters the cache, and no position moves.

    Not for tasks that need much capacity: it cannot change what the model's attention makes of its own tokens, only add to it.
    Nor where adapters must merge: keys and values are no weights.

    Args:
        tokens: p, their number.
        hidden: width of the network that makes them while training (it steadies training at large learning rates); None: they
            are parameters themselves. ``trimtab.artifacts.fold`` takes the network out again; until then it is saved, too.
        gated: give them a softmax of their own and a gate that starts at zero.
        std: standard deviation of their start; of the embedding's with ``hidden``.
    """

    search = {"tokens": (5, 10, 20, 30, 50, 100), "gated": (False, True)}
    learning_rate = Span(1e-3, 1e-1, log=True)

    tokens: int = 20
    hidden: int | None = None
    gated: bool = False
    std: float = 0.02

    def __post_init__(self) -> None:
        self.require_count("tokens")
        self.require_count("hidden", optional=True)
        self.require(self.std > 0, f"std must be above 0, found {self.std!r}: equal tokens would stay equal")


@method(
    PrefixTuning, paper="arXiv:2101.00190 Sec. 4",
    tests=({"tokens": 3, "std": 1.0}, {"tokens": 2, "hidden": 4, "std": 1.0}, {"tokens": 3, "gated": True, "std": 1.0}),
)  # fmt: skip
class PrefixTuningAdapter(TokenAdapter):
    """``k`` (p, key width) and ``v`` (p, value width), or ``e``, ``down``, ``up`` that make them; gated, ``g`` (1,)."""

    def __init__(self, config: PrefixTuning, site: Site, *, rng: Generator):
        super().__init__(config, site)
        p, h, width = config.tokens, config.hidden, site.in_features
        self.widths = key_value_widths(site.module)
        if h is None:
            self.k, self.v = (self.normal(p, each, std=config.std, rng=rng) for each in self.widths)
        else:
            share = site.cohort.share
            self.e = share("embedding", lambda: self.normal(p, width, std=config.std, rng=rng))
            self.down = share("down", lambda: self.kaiming(h, width, rng=rng))
            self.down_bias = share("down bias", lambda: self.zeros(h))
            self.up, self.up_bias = self.kaiming(sum(self.widths), h, rng=rng), self.zeros(sum(self.widths))
        self.g = self.zeros(1) if config.gated else None

    @classmethod
    def entry(cls, config: PrefixTuning) -> str:
        return "attention"

    @classmethod
    def check(cls, config: PrefixTuning, site: Site) -> None:
        if config.gated and not separable(site.module):
            raise Unsupported(
                f"{site.path} writes its scores out, so that a gated prefix cannot have a softmax of its own there; use gated=False"
            )

    @classmethod
    def identity(cls, config: PrefixTuning) -> bool:
        return config.gated

    def keys_values(self) -> tuple[Tensor, Tensor]:
        if self.config.hidden is None:
            return self.k, self.v
        made = F.linear(torch.tanh(F.linear(self.e, self.down, self.down_bias)), self.up, self.up_bias)
        key, value = made.split(self.widths, -1)
        return key, value

    def folded(self) -> tuple[PrefixTuning, dict[str, Tensor]] | None:
        if self.config.hidden is None:
            return None
        found = dict(zip("kv", self.keys_values(), strict=True))
        return replace(self.config, hidden=None), found if self.g is None else {**found, "g": self.g}

    def gate(self) -> Tensor | None:
        return None if self.g is None else torch.tanh(self.g)
