"""Bat: every tile of W is multiplied by a small shared block, which is added to it as well.

With tiles ``W_JI`` (r, r) of block row J and block column I: ``W'_JI = W_JI + W_JI B + B``. Blocks B start at zero, so training
starts at the base; no scale. Which tiles share a block is the form:

======  =======================  ===========  =============================================  ===========
form    block of tile J, I       trainable    forward on a linear place                      keeps
======  =======================  ===========  =============================================  ===========
col     ``B_J``                  ``r out``    W' is rebuilt, in forward and in backward      ``x``
row     ``B_I``                  ``r in``     ``W (x + u) + [s; ...]``, ``u_I = B_I x_I``      ``x``
free    ``B[J mod p, I mod q]``  ``p q r^2``  as col                                         ``x``
left    ``B_J^T`` from the left  ``r out``    ``z = W x``, ``z_J + B_J^T (z_J + S)``         ``z + S``
======  =======================  ===========  =============================================  ===========

S is the sum of x over its blocks. ``left`` mixes outputs (``W'_JI = W_JI + B_J^T W_JI + B_J^T``), the others inputs: equal
shapes, another function. Source: arXiv 2409.15371, v1-v3 (there called Bone; v4 renames it Bat) and the drawings of its
repository; ``left`` is its Triton kernel. ``col`` is peft's ``init_weights="bat"``. The update has full rank in general.
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
from trimtab.kernels.blockaffine import block_affine, lifted, mixed, reweighted
from trimtab.kernels.blocksum import tile
from trimtab.kernels.divisors import nearest_divisor, nearest_divisors

__all__ = ["Bat", "BatAdapter"]

#: the side of a block where nothing is said
USUAL = 64


@dataclass(frozen=True)
class Bat(MethodConfig):
    """Blocks that multiply W's tiles and are added to them: an update of full rank from Bone's number of parameters.

    Not where time or memory are short, unless as ``row`` or ``left``: ``col`` takes a weight's gradient in every step. Not for a
    base that cannot be dequantised (``col`` and ``free`` read W), nor for widths that share no divisor.

    Args:
        rank: r, side of a block; must divide ``in`` and ``out``. None: 64, or what is nearest to it and divides both.
        form: which tiles share a block, see above: ``col``, ``row``, ``free`` or ``left``.
        grid: ``(p, q)`` of the form ``free``; they must divide ``out / rank`` and ``in / rank``.
    """

    search = {"rank": (4, 8, 16, 32, 64), "form": ("col", "left", "row")}
    learning_rate = Span(2e-5, 5e-3, log=True)

    rank: int | None = None
    form: str = "col"
    grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        self.require_count("rank", optional=True)
        self.require_choice("form", ("col", "row", "free", "left"))
        if self.form != "free":
            self.require(self.grid is None, f'grid belongs to the form "free", not to {self.form!r}')
            return
        if isinstance(self.grid, list):  # as a manifest stores it
            object.__setattr__(self, "grid", tuple(self.grid))
        self.require(
            isinstance(self.grid, tuple)
            and len(self.grid) == 2
            and all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in self.grid),
            f'the form "free" needs grid=(p, q), two integers of at least 1, found {self.grid!r}',
        )

    def blocks(self, out: int, fan_in: int) -> tuple[int, int]:
        """``(p, q)``: how many blocks stand along the outputs and the inputs."""
        if self.form == "free":
            return self.grid
        return (1, fan_in // self.rank) if self.form == "row" else (out // self.rank, 1)


@method(
    Bat,
    paper="arXiv:2409.15371 v1-v3 (block affine)",
    tests=({"rank": 4}, {"rank": 2, "form": "row"}, {"rank": 4, "form": "left"}, {"rank": 2, "form": "free", "grid": (2, 2)}),
)
class BatAdapter(Reparameterization):
    """The blocks ``b`` (p q, r, r)."""

    fast = frozenset({"linear"})
    additive = False

    def __init__(self, config: Bat, site: Site, *, rng: torch.Generator):
        config = self.fit(config, site)
        super().__init__(config, site)
        self.grid = config.blocks(*site.shape[-2:])
        self.b = self.zeros(self.grid[0] * self.grid[1], config.rank, config.rank)

    @classmethod
    def fit(cls, config: Bat, site: Site) -> Bat:
        if config.rank is not None:
            return config
        out, fan_in = site.shape[-2:]
        p, q = config.grid or (1, 1)
        rank = nearest_divisor(math.gcd(out, fan_in), USUAL, where=lambda r: (out // r) % p == 0 and (fan_in // r) % q == 0)
        return replace(config, rank=rank or USUAL)

    @classmethod
    def check(cls, config: Bat, site: Site) -> None:
        config = cls.fit(config, site)
        out, fan_in = site.shape[-2:]
        for name, width in (("outputs", out), ("inputs", fan_in)):
            if width % config.rank:
                raise ShapeMismatch(
                    f"rank {config.rank} does not divide the {width} {name} of {site.name}, shape ({out}, {fan_in}); nearest "
                    f"divisors: {nearest_divisors(width, config.rank)}"
                )
        tiles = out // config.rank, fan_in // config.rank
        for count, n, name in zip(config.blocks(out, fan_in), tiles, ("outputs", "inputs"), strict=True):
            if n % count:
                raise ShapeMismatch(
                    f"grid={config.grid}: {count} does not divide the {n} blocks of {config.rank} {name} of {site.name}; "
                    f"nearest divisors: {nearest_divisors(n, count)}"
                )

    def _blocks(self) -> Tensor:
        """``b`` as (p, q, r, r)."""
        return self.b.unflatten(0, self.grid)

    def weight(self, W: Tensor) -> Tensor:
        if self.config.form != "left":
            return W + block_affine(W, self._blocks())
        r = self.config.rank
        ones = tile(torch.eye(r, dtype=self.b.dtype, device=self.b.device), W.shape[-1])
        rows = W.unflatten(-2, (-1, r))
        summed = rows + ones  # in the wider dtype of the two
        return (rows + self.b.to(summed.dtype).transpose(-1, -2) @ summed).flatten(-3, -2)

    def forward(self, x: Tensor, base: Operation) -> Tensor:
        if self.config.form == "left":
            return lifted(x, base, self.b)
        if self.config.form == "row":
            return mixed(x, base, self.b)
        y = reweighted(x, base, self._blocks())
        return self.derived(x, base) if y is None else y
