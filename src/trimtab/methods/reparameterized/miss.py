"""MiSS and Bone: one small matrix shared by all blocks of the input.

``W'[o, i] = W[o, i] + D[i mod r, o]`` with ``D`` (r, out) at zero, so training starts at the base; hence
``y = base(x) + S D`` with ``S`` the sum of ``x`` over its blocks of r features. The last block may be ragged. It is LoRA
with ``B = D^T`` and a frozen ``A = [I I ... I]``, of rank at most r. No scale. Source: arXiv 2409.15371, v12 Eq. 4-7 (MiSS);
v4 calls the same layer Bone. Trainable: ``r out``; with ``mini``: ``r mini``. Saved for backward: r numbers a token.

MiSS may share over the outputs instead (v12 Eq. 2-3): ``D`` (r, in), the outputs in r contiguous shards, and every output of
shard i gets row ``D_i``: ``y = base(x) + repeat(x D^T)``. Trainable: ``r in``. Saved for backward: ``x``. If r does not divide
``out``, the first ``out mod r`` shards are one output longer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core.contracts import MethodConfig, Reparameterization
from trimtab.core.errors import ShapeMismatch, TooSmall
from trimtab.core.registry import method
from trimtab.core.site import Operation, Site
from trimtab.kernels.beside import Rule, beside
from trimtab.kernels.blocksum import BlockSum, tile
from trimtab.kernels.divisors import nearest_divisors
from trimtab.kernels.dropout import draw_seed
from trimtab.kernels.mode import fused
from trimtab.kernels.shards import Shards, repeat_rows

__all__ = ["Bone", "BoneAdapter", "MiSS", "MiSSAdapter"]


@dataclass(frozen=True)
class Bone(MethodConfig):
    """One shared block of size (rank, out): a single matrix a layer, the least memory of the low-rank methods.

    Not for places with few outputs and many inputs when parameters are short: it costs ``rank * out`` whatever ``in`` is.

    Args:
        rank: r, the block size and the largest rank of the update; at most ``in``.
        dropout: probability of zeroing an entry of the branch's input while training.
    """

    search = {"rank": (4, 8, 16, 32, 64)}

    rank: int = 64
    dropout: float = 0.0

    def __post_init__(self) -> None:
        self.require_rank(self.rank)
        self.require_probability("dropout", self.dropout)


@dataclass(frozen=True)
class MiSS(Bone):
    """Matrix shard sharing: Bone's layer, with a ``mini`` form whose block repeats along the outputs too, or shared by outputs.

    Not with ``mini`` for hard tasks: it has few numbers, and all outputs of one residue learn the same. Not shared by outputs
    where memory is short: that keeps the whole input.

    Args:
        rank: r, the block size and the largest rank of the update; at most ``in``.
        dropout: probability of zeroing an entry of the branch's input while training.
        mini: period along the output axis; the trainable block is (rank, mini). None: no repetition. Must divide ``out``.
        shared: ``"inputs"``: blocks of ``rank`` inputs share; ``"outputs"``: ``rank`` shards of outputs, at most ``out``.
    """

    search = {"rank": (4, 8, 16, 32, 64), "shared": ("inputs", "outputs")}

    mini: int | None = None
    shared: str = "inputs"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.mini is None or (isinstance(self.mini, int) and self.mini >= 1),
                     f"mini must be None or an integer of at least 1, found {self.mini!r}")
        self.require_choice("shared", ("inputs", "outputs"))
        self.require(self.mini is None or self.shared == "inputs", 'mini repeats a block that is shared="inputs"')


@method(Bone, paper="arXiv:2409.15371 v4 (additive)", tests=({"rank": 5},))
class BoneAdapter(Reparameterization):
    """The shared block ``d`` (r, out), or (r, mini)."""

    fast = frozenset({"linear"})
    needs_weight = False

    def __init__(self, config: Bone, site: Site, *, rng: torch.Generator):
        super().__init__(config, site)
        self.d = self.zeros(config.rank, getattr(config, "mini", None) or site.out_features)

    @classmethod
    def check(cls, config: Bone, site: Site) -> None:
        out, fan_in = site.shape[-2:]
        if config.rank > fan_in:
            raise TooSmall(
                f"rank {config.rank} is larger than the {fan_in} inputs of {site.name}, so that rows of its block would "
                f"never learn; use at most {fan_in}"
            )
        mini = getattr(config, "mini", None)
        if mini and out % mini:
            raise ShapeMismatch(
                f"mini={mini} does not divide the {out} outputs of {site.name}; nearest divisors: {nearest_divisors(out, mini)}"
            )

    def block(self) -> Tensor:
        """``D`` as it acts, (r, out)."""
        out = self.site.out_features
        return self.d if self.d.shape[-1] == out else self.d.repeat(1, out // self.d.shape[-1])

    def weight(self, W: Tensor) -> Tensor:
        return W + tile(self.block(), W.shape[-1])

    def forward(self, x: Tensor, base: Operation) -> Tensor:
        p = self.config.dropout * self.training
        seed = draw_seed() if p and fused(x) else 0  # a seed is a number on the host: not for a traced graph
        return beside(self.rule(p, seed), x, base, self.block())

    def rule(self, p: float, seed: int) -> Rule:
        """How the update acts on activations, with dropout ``p``."""
        return BlockSum(self.config.rank, p, seed)

    def factors(self) -> tuple[Tensor, Tensor]:
        d = self.block()
        return d.t(), tile(torch.eye(d.shape[0], dtype=d.dtype, device=d.device), self.site.in_features)


@method(
    MiSS, paper="arXiv:2409.15371 v12 Eq. 2-7",
    tests=({"rank": 4}, {"rank": 3, "mini": 2}, {"rank": 5, "shared": "outputs"}),
)
class MiSSAdapter(BoneAdapter):
    """Bone's layer under its later name, or ``d`` (r, in) shared by outputs."""

    def __init__(self, config: MiSS, site: Site, *, rng: torch.Generator):
        super().__init__(config, site, rng=rng)
        self.over_outputs = config.shared == "outputs"
        if self.over_outputs:
            self.d = self.zeros(config.rank, site.in_features)

    @classmethod
    def check(cls, config: MiSS, site: Site) -> None:
        if config.shared == "inputs":
            super().check(config, site)
        elif config.rank > site.out_features:
            raise TooSmall(
                f"rank {config.rank} asks for more shards than the {site.out_features} outputs of {site.name}; "
                f"use at most {site.out_features}"
            )

    def weight(self, W: Tensor) -> Tensor:
        return W + repeat_rows(self.d, W.shape[-2], dim=-2) if self.over_outputs else super().weight(W)

    def rule(self, p: float, seed: int) -> Rule:
        return Shards(self.site.out_features, p, seed) if self.over_outputs else super().rule(p, seed)

    def block(self) -> Tensor:
        return self.d if self.over_outputs else super().block()

    def factors(self) -> tuple[Tensor, Tensor]:
        if not self.over_outputs:
            return super().factors()
        return repeat_rows(torch.eye(len(self.d), dtype=self.d.dtype, device=self.d.device), self.site.out_features, dim=0), self.d
