"""The block sum of MiSS and Bone: ``S[n, j] = sum_i x[n, i r + j]`` over the blocks of ``r`` features, ragged tail included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from trimtab.kernels.beside import Rule
from trimtab.kernels.dropout import keep_rate, masks

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


def _spread(gx: Tensor, u: Tensor) -> None:
    """The block sum's transpose, in place: every block of ``gx`` (tokens, in) gets ``u`` (tokens, r) added."""
    r = u.shape[1]
    blocks, tail = divmod(gx.shape[1], r)
    gx[:, : blocks * r].unflatten(1, (blocks, r)).add_(u[:, None, :])
    if tail:
        gx[:, blocks * r :].add_(u[:, :tail])


@dataclass(frozen=True)
class BlockSum(Rule):
    """``y += S D`` with ``D`` (r, out) and ``S`` the block sum of ``drop(x)``. Keeps ``S`` (tokens, r) and not ``x``.

    Attributes:
        r: block size.
        p: dropout of ``x``; its mask comes from ``seed`` in both directions and is never kept.
        seed: seed of the mask.
    """

    r: int
    p: float = 0.0
    seed: int = 0

    def map(self, x: Tensor, d: Tensor) -> Tensor:
        return block_sum(F.dropout(x, self.p) if self.p else x, self.r) @ d

    def keep(self, x: Tensor) -> Tensor:
        if self.p == 0:
            return block_sum(x, self.r)
        s = x.new_empty(x.shape[0], self.r)
        for rows, mask in masks(self.seed, self.p, x):
            s[rows] = block_sum(x[rows] * mask, self.r)
        return s.div_(keep_rate(self.p))

    def add_(self, y: Tensor, x: Tensor, kept: Tensor, d: Tensor) -> None:
        y.addmm_(kept, d)

    def pull(
        self, dy: Tensor, x: Tensor, gx: Tensor | None, needs: Sequence[bool], d: Tensor
    ) -> tuple[Tensor | None, ...]:
        if gx is not None:
            u = dy @ d.t()
            if self.p == 0:
                _spread(gx, u)
            else:
                u.div_(keep_rate(self.p))
                for rows, mask in masks(self.seed, self.p, gx):
                    gx[rows].addcmul_(u[rows].repeat(1, -(-gx.shape[1] // self.r))[:, : gx.shape[1]], mask)
        return (x.t() @ dy if needs[0] else None,)
