"""OFT: the input is rotated by small orthogonal blocks.

``W' = W R^T`` with ``R = diag(R_1, ..., R_n)`` and ``R_k = (I - Q_k)(I + Q_k)^{-1}`` orthogonal (Cayley); ``Q_k`` is skew and
zero at the start, so training starts at the base. ``y = W (x R) + bias``. Norms of the neurons and angles between them are
kept: ``W' W'^T = W W^T``. Sources: arXiv 2306.07280, Sec. 3 (OFT, COFT); arXiv 2506.19847 (OFTv2: rotate activations; Neumann
series). Trainable: ``blocks b (b - 1) / 2``. Saved for backward: ``x`` alone.
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
from trimtab.kernels.rotation import BoundedBlocks, TriangleBlocks, dense_rotation, rotate, rotated_linear

__all__ = ["OFT", "OFTAdapter"]

#: the side of a block where nothing is said
USUAL = 32


@dataclass(frozen=True)
class OFT(MethodConfig):
    """Orthogonal rotation of the inputs: keeps the geometry of the neurons; for style and subject transfer.

    Not where the scale of the weights must change, and not for widths without a small divisor, whose blocks are large.

    Args:
        block_size: b, side of a block; must divide the width. None: from ``blocks``, or the divisor nearest to 32 if that is
            None too.
        blocks: number of blocks, as the alternative to ``block_size``.
        block_share: one block for all positions.
        neumann: number of terms of the Neumann series in place of the exact inverse (5 in OFTv2); None: exact. The sign
            is the exact branch's, so that switching changes the rotation by the truncation error alone.
        eps: COFT: keep the Frobenius norm of every ``Q_k`` below ``eps / sqrt(blocks)`` (paper: 6e-5); None: free.
        dropout: probability of replacing a block by the identity for one forward while training.
    """

    search = {"block_size": (8, 16, 32, 64)}

    block_size: int | None = None
    blocks: int | None = None
    block_share: bool = False
    neumann: int | None = None
    eps: float | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        self.require_count("block_size", "blocks", optional=True)
        self.require(self.block_size is None or self.blocks is None,
                     "give block_size or blocks, not both: their product is the width")
        self.require(self.block_size != 1, "blocks of size 1 have nothing to rotate; use at least 2")
        self.require(self.neumann is None or self.neumann >= 3, f"neumann needs at least 3 terms, found {self.neumann!r}")
        self.require(self.eps is None or self.eps > 0, f"eps must be None or above 0, found {self.eps!r}")
        self.require_probability("dropout", self.dropout)
        self.require(not (self.block_share and self.dropout), "dropout of a shared block would drop all of it; choose one")

    def size(self, width: int) -> int:
        """b for a place of this width."""
        return width // self.blocks if self.blocks else self.block_size or USUAL


@method(
    OFT, paper="arXiv:2306.07280 Sec. 3",
    tests=({"block_size": 4}, {"block_size": 2, "block_share": True}, {"blocks": 2, "eps": 0.05}),
)
class OFTAdapter(Reparameterization):
    """The blocks' strict upper triangles ``q`` (blocks or 1, b (b - 1) / 2). An embedding's rows are rotated, not its entries."""

    fast = frozenset({"linear", "embedding"})
    needs_weight = False
    additive = False

    def __init__(self, config: OFT, site: Site, *, rng: torch.Generator):
        config = self.fit(config, site)
        super().__init__(config, site)
        width = self.width(site)
        size = config.size(width)
        self.q = self.zeros(1 if config.block_share else width // size, size * (size - 1) // 2)
        exact = config.neumann is None and config.eps is None
        self.maker = TriangleBlocks(size) if exact else BoundedBlocks(size, config.neumann, config.eps)

    @staticmethod
    def width(site: Site) -> int:
        """The number of features that are rotated."""
        return site.shape[-2] if site.kind == "embedding" else site.shape[-1]

    @classmethod
    def fit(cls, config: OFT, site: Site) -> OFT:
        size = None if config.block_size or config.blocks else nearest_divisor(cls.width(site), USUAL, least=2)
        return config if size is None else replace(config, block_size=size)

    @classmethod
    def check(cls, config: OFT, site: Site) -> None:
        config = cls.fit(config, site)
        width = cls.width(site)
        if width < 2:
            raise TooSmall(f"{site.name} has a width of {width}, in which nothing can be rotated")
        name, value = ("blocks", config.blocks) if config.blocks else ("block_size", config.size(width))
        if width % value or value > width:
            raise ShapeMismatch(
                f"{name}={value} does not divide the width {width} of {site.name}; nearest divisors: "
                f"{nearest_divisors(width, value)}"
            )
        if config.size(width) < 2:
            raise ShapeMismatch(
                f"blocks={config.blocks} cuts the width {width} of {site.name} into blocks of size 1, which have nothing "
                f"to rotate; use at most {width // 2}"
            )

    def weight(self, W: Tensor) -> Tensor:
        R = self.maker.blocks(self.q)
        return dense_rotation(W.t(), R.transpose(-1, -2)).t() if self.site.kind == "embedding" else dense_rotation(W, R)

    def forward(self, x: Tensor, base: Operation) -> Tensor:
        q = self.q
        if self.training and self.config.dropout:
            q = q * (torch.rand(q.shape[0], 1, device=q.device) >= self.config.dropout)  # Q = 0 gives R = I
        if base.kind == "embedding":
            return rotate(base(x), self.maker, q)
        return rotated_linear(x, base, self.maker, q)
