"""The block sum of MiSS and Bone: ``S[n, j] = sum_i x[n, i r + j]`` over the blocks of ``r`` features, ragged tail included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from trimtab.kernels.beside import Rule

__all__ = ["BlockSum", "block_sum", "tile"]


def block_sum(x: Tensor, r: int) -> Tensor:
    """``(..., in) -> (..., r)``: the whole blocks summed through a view, the tail added; no padded copy of ``x``."""
    blocks, tail = divmod(x.shape[-1], r)
    whole = x[..., : blocks * r].unflatten(-1, (blocks, r)).sum(-2)
    if tail:
        whole = whole + F.pad(x[..., blocks * r :], (0, r - tail))
    return whole


def tile(d: Tensor, width: int) -> Tensor:
    """``(r, out) -> (out, width)``: ``d^T`` repeated with period r along the input axis, cut at ``width``."""
    r = d.shape[-2]
    return d.transpose(-1, -2).repeat(*(1 for _ in d.shape[:-1]), -(-width // r))[..., :width]


@dataclass(frozen=True)
class BlockSum(Rule):
    """``y += S D`` with ``D`` (r, out). Keeps ``S`` (tokens, r) and not ``x``."""

    r: int

    def keep(self, x: Tensor) -> Tensor:
        return block_sum(x, self.r)

    def add_(self, y: Tensor, x: Tensor, kept: Tensor, d: Tensor) -> None:
        y.addmm_(kept, d)

    def pull(
        self, dy: Tensor, x: Tensor, gx: Tensor | None, needs: Sequence[bool], d: Tensor
    ) -> tuple[Tensor | None, ...]:
        if gx is not None:
            u = dy @ d.t()  # (tokens, r): the same vector goes to every block of the input
            blocks, tail = divmod(gx.shape[1], self.r)
            gx[:, : blocks * self.r].unflatten(1, (blocks, self.r)).add_(u[:, None, :])
            if tail:
                gx[:, blocks * self.r :].add_(u[:, :tail])
        return (x.t() @ dy if needs[0] else None,)
