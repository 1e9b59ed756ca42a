"""BOFT: the input is rotated by a product of butterfly factors, the output scaled.

``W' = diag(s) W R^T`` with ``R = B_{m-1} ... B_0``; each factor has ``in / b`` orthogonal blocks ``(I - S)(I + S)^{-1}``,
``S = (X - X^T) / 2``, at shuffled positions (kernels/rotation.py), so that m factors mix ``b 2^(m-1)`` features. ``X`` starts at
zero and ``s`` at one, so training starts at the base. ``y = s * (W (x R)) + bias``. Source: arXiv 2311.06243, Sec. 4; the
full-stored ``X`` and the order of the factors are the authors' code's. Trainable: ``m (in / b) b^2 + out``, of which
``m (in / b) b (b - 1) / 2`` move the rotation. Saved for backward: ``x``, and the unscaled output for the gradient of ``s``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trimtab.core.contracts import MethodConfig, Reparameterization
from trimtab.core.errors import ShapeMismatch, TooSmall
from trimtab.core.registry import method
from trimtab.core.site import Operation, Site
from trimtab.kernels.divisors import nearest_divisor, nearest_divisors
from trimtab.kernels.rotation import CayleyBlocks, dense_rotation, rotated_linear

__all__ = ["BOFT", "BOFTAdapter"]

#: side of a block and number of factors where nothing is said
USUAL = 8, 2


@dataclass(frozen=True)
class BOFT(MethodConfig):
    """Orthogonal butterfly rotation of the inputs and a scale of the outputs: denser than OFT for the same block size.

    Not for widths with few factors of two: m factors need ``in`` to be a multiple of ``b 2^(m-1)``.

    Args:
        block_size: b, side of a block. None: from ``blocks``, or the side nearest to 8 that fits if that is None too.
        blocks: number of blocks of a factor, as the alternative to ``block_size``.
        factors: m; 1 is OFT with full-stored blocks (and the scale). None: 2, or 1 where the width allows no more.
        dropout: probability of replacing a block by the identity for one forward while training.
    """

    search = {"block_size": (2, 4, 8), "factors": (1, 2, 3)}

    block_size: int | None = None
    blocks: int | None = None
    factors: int | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        self.require_count("block_size", "blocks", optional=True)
        self.require(self.block_size is None or self.blocks is None,
                     "give block_size or blocks, not both: their product is the width")
        self.require(self.block_size != 1, "blocks of size 1 have nothing to rotate; use at least 2")
        self.require_count("factors", optional=True)
        self.require_probability("dropout", self.dropout)

    def size(self, width: int) -> int:
        """b for a place of this width."""
        return width // self.blocks if self.blocks else self.block_size or USUAL[0]


def _most(count: int, size: int) -> int:
    """How many factors of ``count`` blocks of ``size`` there can be: the powers of two in their number, plus 1."""
    return 1 if size % 2 else (count & -count).bit_length()


class _Stored(CayleyBlocks):
    """Blocks stored in full, of which the skew part counts."""

    def skew(self, X: Tensor) -> Tensor:
        X = X.to(torch.promote_types(X.dtype, torch.float32))
        return 0.5 * (X - X.transpose(-1, -2))

    def skew_gradient(self, g: Tensor) -> Tensor:
        return 0.5 * g


@method(BOFT, paper="arXiv:2311.06243 Sec. 4", tests=({"block_size": 2, "factors": 2}, {"block_size": 4, "factors": 1}))
class BOFTAdapter(Reparameterization):
    """The blocks ``x`` (factors, blocks, b, b) and the scale ``s`` (out, 1)."""

    # an embedding's "inputs" are its entries: mixing rows of the vocabulary by index means nothing
    kinds = Reparameterization.kinds - {"embedding"}
    fast = frozenset({"linear"})
    needs_weight = False
    additive = False

    def __init__(self, config: BOFT, site: Site, *, rng: torch.Generator):
        config = self.fit(config, site)
        super().__init__(config, site)
        out, width = site.shape
        size = config.size(width)
        self.x = self.zeros(config.factors, width // size, size, size)
        self.s = self.ones(out, 1)
        self.maker = _Stored()

    @classmethod
    def fit(cls, config: BOFT, site: Site) -> BOFT:
        width = site.shape[-1]
        given = config.block_size or (config.blocks and width // config.blocks)
        for factors in (config.factors,) if config.factors else (USUAL[1], 1):
            size = given or nearest_divisor(width, USUAL[0], least=2, where=lambda b, m=factors: m <= _most(width // b, b))
            if size and width % size == 0 and factors <= _most(width // size, size):
                return replace(config, factors=factors, block_size=None if config.blocks else size)
        return config if config.factors else replace(config, factors=USUAL[1])

    @classmethod
    def check(cls, config: BOFT, site: Site) -> None:
        config = cls.fit(config, site)
        width = site.shape[-1]
        if width < 2:
            raise TooSmall(f"{site.name} has a width of {width}, in which nothing can be rotated")
        name, value = ("blocks", config.blocks) if config.blocks else ("block_size", config.size(width))
        if width % value or value > width:
            raise ShapeMismatch(
                f"{name}={value} does not divide the width {width} of {site.name}; nearest divisors: "
                f"{nearest_divisors(width, value)}"
            )
        size = config.size(width)
        count = width // size
        most = _most(count, size)
        if size < 2 or config.factors > most:
            reason = (
                "blocks of size 1 have nothing to rotate" if size < 2
                else f"m factors need an even block size and a number of blocks divisible by 2^(m-1), so use at most {most} here"
            )
            raise ShapeMismatch(f"factors={config.factors} with {count} blocks of size {size} at {site.name}: {reason}")

    def weight(self, W: Tensor) -> Tensor:
        return self.s * dense_rotation(W, self.maker.blocks(self.x))

    def forward(self, x: Tensor, base: Operation) -> Tensor:
        X = self.x
        if self.training and self.config.dropout:
            X = X * (torch.rand(*X.shape[:2], 1, 1, device=X.device) >= self.config.dropout)  # X = 0 gives the identity
        z = rotated_linear(x, base, self.maker, X, bias=False)
        s = self.s[:, 0].to(z.dtype)
        return z * s if base.bias is None else torch.addcmul(base.bias.to(z.dtype), z, s)
