"""HUT: W is multiplied entry by entry by two thin factors, one for its inputs and one for its outputs.

With ``a`` (r, in), ``b`` (r, out) and W in r x r blocks, block (c, k) of outputs and inputs becomes
``diag(1 + b[k, c]) W_ck diag(1 + a[c, k])``; affine: then every output feature has a gain and a shift::

    W' = diag(1 + gamma) (EB * W * EA)      b' = (1 + gamma) bias + beta

Everything starts at zero, so training starts at the base; the factors are stored as deviations from one, so that weight decay
pulls towards the base and half precision keeps small steps. Entries of W that are zero stay zero.

Source: arXiv 2409.13501 v1. Its text was not at hand: formula and forward are known second-hand, in which "repeat for each of the
r columns" (``tile``) has two other readings. ``sum``: ``EA[i, :] = sum_k a[k, i]``, rank 1, r scales the learning rate alone;
``power``: ``EA[i, :] = a[i]^r``. At r = 1 all three are the same layer.

Trainable: ``r (in + out)``, affine ``+ 2 out``; power: as r = 1. Saved for backward: with vectors (r = 1, sum, power) ``x`` and
``W x``, and no tensor of W's size is made; with blocks see kernels/blockscale.py: ``x`` alone, or for few blocks ``r`` outputs too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from trimtab.core.contracts import MethodConfig, Reparameterization, Span
from trimtab.core.errors import CheckpointMismatch, ShapeMismatch
from trimtab.core.registry import method
from trimtab.core.site import Operation, Site
from trimtab.kernels.blockscale import block_scale, blockscaled
from trimtab.kernels.divisors import nearest_divisor, nearest_divisors
from trimtab.kernels.gain import Unbiased, gained

__all__ = ["HUT", "HUTAdapter"]

#: the number of blocks where nothing is said
USUAL = 8


@dataclass(frozen=True)
class HUT(MethodConfig):
    """Two thin factors that scale W's entries: an update in proportion to what was learnt before, and one that keeps zeros.

    Not where an entry of W that is zero or tiny must grow: it is only ever scaled. Not for a base that cannot be dequantised,
    unless ``rank`` is 1.

    Args:
        rank: r, number of blocks along inputs and along outputs; must divide both. Power: the exponent. None: 8, or what is
            nearest to it and divides both.
        affine: a gain and a shift of every output; the shift gives a layer without bias one when merged.
        reading: of the paper's formula: ``tile``, ``sum`` or ``power``, see above.
    """

    search = {"rank": (1, 2, 4, 8, 16), "affine": (False, True)}
    learning_rate = Span(1e-4, 1e-2, log=True)

    rank: int | None = None
    affine: bool = True
    reading: str = "tile"

    def __post_init__(self) -> None:
        self.require_count("rank", optional=True)
        self.require_choice("reading", ("tile", "sum", "power"))

    @property
    def thin(self) -> bool:
        """Whether the factors act as one vector each."""
        return self.rank == 1 or self.reading != "tile"


@method(
    HUT, paper="arXiv:2409.13501 v1",
    tests=({"rank": 2}, {"rank": 1}, {"rank": 4, "affine": False}, {"rank": 3, "reading": "sum"}, {"rank": 2, "reading": "power"}),
)  # fmt: skip
class HUTAdapter(Reparameterization):
    """``a`` (r, in), ``b`` (r, out), and where affine ``gamma``, ``beta`` (out,); all are deviations, zero at the start."""

    fast = frozenset({"linear"})
    additive = False

    def __init__(self, config: HUT, site: Site, *, rng: Generator):
        config = self.fit(config, site)
        super().__init__(config, site)
        out, fan_in = site.shape[-2:]
        rows = 1 if config.reading == "power" else config.rank
        self.a, self.b = self.zeros(rows, fan_in), self.zeros(rows, out)
        self.gamma = self.zeros(out) if config.affine else None
        self.beta = self.zeros(out) if config.affine and site.carries_bias else None
        self.needs_weight = not config.thin
        self.rebias = config.affine and site.carries_bias

    @classmethod
    def fit(cls, config: HUT, site: Site) -> HUT:
        if config.rank is not None:
            return config
        return replace(config, rank=nearest_divisor(math.gcd(*site.shape[-2:]), USUAL) if config.reading == "tile" else USUAL)

    @classmethod
    def check(cls, config: HUT, site: Site) -> None:
        config = cls.fit(config, site)
        if config.reading != "tile":
            return
        for size, what in zip(site.shape[-2:], ("outputs", "inputs"), strict=True):
            if size % config.rank:
                raise ShapeMismatch(
                    f"rank {config.rank} does not divide the {size} {what} of {site.name}; nearest divisors: "
                    f"{nearest_divisors(size, config.rank)}"
                )

    def rebuild(self) -> None:
        """After a load.

        Raises:
            CheckpointMismatch: a factor is zero everywhere, so that its partner could never learn.
        """
        for name in ("a", "b"):
            p = getattr(self, name)
            if not p.is_meta and bool((p == -1).all()):
                raise CheckpointMismatch(
                    f"{name} of the HUT adapter at {self.site.name} multiplies the weight by zero everywhere, a dead adapter; "
                    f"load one from a sound run"
                )

    def scales(self) -> tuple[Tensor, Tensor]:
        """The factors as they multiply, affine's gain laid into the second: (r, in) and (r, out), r = 1 where ``thin``."""
        wide = torch.promote_types(self.a.dtype, torch.float32)
        a, b = self.a.to(wide), self.b.to(wide)
        if self.config.reading == "sum":  # each row stands for 1 / r of the factor: their sum is 1 to the bit at the start
            a, b = a.sum(0, keepdim=True), b.sum(0, keepdim=True)
        a, b = 1 + a, 1 + b
        if self.config.reading == "power":
            a, b = a**self.config.rank, b**self.config.rank
        return a, b if self.gamma is None else b * (1 + self.gamma)

    def weight(self, W: Tensor) -> Tensor:
        return block_scale(W, *self.scales())

    def bias(self, b: Tensor | None) -> Tensor | None:
        if b is None or self.gamma is None:
            return self.beta if b is None else b
        b = b * (1 + self.gamma)
        return b if self.beta is None else b + self.beta

    def forward(self, x: Tensor, base: Operation) -> Tensor:
        a, b = self.scales()
        if self.config.thin:
            return gained(Unbiased(base)(gained(x, a[0], None)), b[0], self.bias(base.bias))
        y, bias = blockscaled(x, base, a, b), self.bias(base.bias)
        if y is None:
            return self.derived(x, base)
        return y if bias is None else y + bias.to(y.dtype)
