"""Bat's three fast forms of a block-affine update of a linear place, by where the blocks stand.

Columns, or any grid of blocks: ``W'_JI = W_JI + W_JI B + B`` is rebuilt as a weight in both directions (``BlockAffine``, a recipe
of ``rebuilt``), ``in out r`` multiplications whatever the number of tokens: fewer than on activations from ``r`` tokens on. One
batched product on views of W, with the blocks of rows leading, makes it.

Rows: ``u_I = B_I x_I``, ``y = W (x + u) + [s; ...; s] + bias``, ``s = sum_I u_I``: ``in r`` a token, W is not read
(``mixed``).

Left: ``y_J = z_J + B_J^T (z_J + S)``, ``z = W x``, ``S`` the block sum of x: ``out r`` a token, W is not read (``lifted``). Kept
for backward: ``z + S``, (tokens, out), and not ``x``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trimtab.core.site import Operation, Site
from trimtab.kernels.gain import Unbiased
from trimtab.kernels.mode import compute_dtype, fused, given, if_learnt
from trimtab.kernels.rebuilt import Pull, Recipe, readable, rebuilt

__all__ = ["BlockAffine", "block_affine", "lifted", "mixed", "reweighted"]


def block_affine(W: Tensor, b: Tensor) -> Tensor:
    """``dW_JI = W_JI b[J mod p, I mod q] + b[J mod p, I mod q]``: W (..., out, in), b (p, q, r, r) -> (..., out, in)."""
    p, q, r, _ = b.shape
    tiles = W.to(torch.promote_types(W.dtype, b.dtype)).unflatten(-1, (-1, q, r)).unflatten(-4, (-1, p, r))
    b = b.to(tiles.dtype)
    dW = torch.einsum("...ajkbil,jilm->...ajkbim", tiles, b) + b.permute(0, 2, 1, 3)[:, :, None]
    return dW.flatten(-3).flatten(-4, -2)


def _grouped(W: Tensor, p: int, q: int, r: int) -> Tensor:
    """(out, in) -> (p q, rows, r), the tiles that share a block beneath each other; a view where p is all of them and q is 1."""
    return W.reshape(-1, p, r, W.shape[1] // (q * r), q, r).permute(1, 4, 0, 2, 3, 5).reshape(p * q, -1, r)


def _ungrouped(T: Tensor, shape: torch.Size, p: int, q: int) -> Tensor:
    """What ``_grouped`` did, undone."""
    r = T.shape[-1]
    return T.view(p, q, -1, r, shape[1] // (q * r), r).permute(2, 0, 3, 4, 1, 5).reshape(shape)


@dataclass(frozen=True)
class BlockAffine(Recipe):
    """The weight form; its one parameter is ``b`` (p, q, r, r).

    Attributes:
        source: where W is read, in forward and again in backward, if ``rebuilt`` has no dense one: a quantised place, or
            rows of a fused matrix, whose dense W would otherwise have to be kept.
    """

    source: Site | None = None

    def delta(self, b: Tensor) -> Tensor:
        return block_affine(self._read(b), b)

    def remake(self, W: Tensor | None, needs: Sequence[bool], b: Tensor) -> tuple[Tensor, Pull]:
        p, q, r, _ = b.shape
        whole = self._read(b) if W is None else W
        tiles, blocks = _grouped(whole, p, q, r), b.view(p * q, r, r)
        made = torch.bmm(tiles, blocks) if W is None else torch.baddbmm(tiles, tiles, blocks)
        self._added(made, whole.shape, b).add_(b[:, :, None, :, None])

        def pull(G: Tensor) -> tuple[Tensor]:
            G = _grouped(G, p, q, r)
            gb = torch.bmm(tiles.transpose(1, 2), G).view(p, q, r, r)
            return (gb.add_(self._added(G, whole.shape, b).sum((2, 4))),)

        return _ungrouped(made, whole.shape, p, q), pull

    def _read(self, b: Tensor) -> Tensor:
        return self.source.weight.detach().to(b.dtype)

    @staticmethod
    def _added(T: Tensor, shape: torch.Size, b: Tensor) -> Tensor:
        """Grouped tiles with the axes of their rows apart: (p, q, tiles along out, r, tiles along in, r), a view."""
        p, q, r, _ = b.shape
        return T.view(p, q, -1, r, shape[1] // (q * r), r)


def reweighted(x: Tensor, base: Operation, b: Tensor) -> Tensor | None:
    """``x (W + dW)^T + bias`` in the weight form for a linear place; None where only the plain operations are right.

    That is while compiling or mapping, and where W has a graph of its own: learning, or adapted before.
    """
    if not fused(x, b):
        return None
    if base.dense is not None:
        return None if base.dense.requires_grad or not fused(base.dense) else rebuilt(BlockAffine(), x, base, b)
    source = readable(base)
    return None if source is None else rebuilt(BlockAffine(source), x, base, b)


def mixed(x: Tensor, base: Operation, b: Tensor) -> Tensor:
    """The row form at any linear place: ``base(x + u)`` and ``sum_I u_I`` on every block of outputs; b (in / r, r, r)."""
    r, dtype = b.shape[-1], compute_dtype(x)
    if fused(x, b):
        z, sums = _Mixed.apply(dtype, x, b)
    else:
        u = torch.einsum("...qr,qsr->...qs", x.to(dtype).unflatten(-1, (-1, r)), b.to(dtype))
        z, sums = x.to(dtype) + u.flatten(-2), u.sum(-2)
    y = base(z.to(x.dtype))
    return (y.unflatten(-1, (-1, r)) + sums[..., None, :].to(y.dtype)).flatten(-2)


class _Mixed(torch.autograd.Function):
    """``x + u`` (..., in) and ``sum_I u_I`` (..., r), ``u_I = b_I x_I``; keeps ``x``, in its own dtype and storage."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, x: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        q, r, _ = b.shape
        ctx.save_for_backward(if_learnt(x, ctx.needs_input_grad[2:]), b)
        blocks = x.to(dtype).reshape(-1, q, r).transpose(0, 1)  # (blocks, tokens, r)
        u = torch.bmm(blocks, b.to(dtype).transpose(1, 2))
        z = (blocks + u).transpose(0, 1).reshape(-1, x.shape[-1])
        return given(z, *x.shape), given(u.sum(0), *x.shape[:-1], r)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor, dsums: Tensor) -> tuple[Tensor | None, ...]:
        x, b = ctx.saved_tensors
        q, r, _ = b.shape
        _, needs_x, needs_b = ctx.needs_input_grad
        rows = dz.reshape(-1, q, r)
        du = (rows + dsums.reshape(-1, 1, r)).transpose(0, 1)
        gx = gb = None
        if needs_b:
            gb = torch.bmm(du.transpose(1, 2), x.to(dz.dtype).reshape(-1, q, r).transpose(0, 1)).to(b.dtype)
        if needs_x:
            gx = rows.clone()
            gx.transpose(0, 1).baddbmm_(du, b.to(dz.dtype))
            gx = gx.view(x.shape).to(x.dtype)
        return None, gx, gb


def lifted(x: Tensor, base: Operation, b: Tensor) -> Tensor:
    """The left form at any linear place: ``y_J = z_J + b_J^T (z_J + S) + bias_J``; b (out / r, r, r)."""
    z = Unbiased(base)(x)
    sums = x.unflatten(-1, (-1, b.shape[-1])).sum(-2).to(z.dtype)
    if fused(x, z, b):
        y = _Lifted.apply(z, sums, b)
    else:
        v = z.unflatten(-1, (-1, b.shape[-1])) + sums[..., None, :]
        y = z + torch.einsum("...pr,prs->...ps", v, b.to(z.dtype)).flatten(-2)
    return y if base.bias is None else y + base.bias.to(y.dtype)


class _Lifted(torch.autograd.Function):
    """``z + v b``, ``v = z + S``, block by block: z (..., out), S (..., r), b (p, r, r)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, sums: Tensor, b: Tensor) -> Tensor:
        p, r, _ = b.shape
        y = z.reshape(-1, p, r)
        v = y + sums.reshape(-1, 1, r)
        ctx.save_for_backward(v if ctx.needs_input_grad[2] else None, b)
        y = y.clone()
        y.transpose(0, 1).baddbmm_(v.transpose(0, 1), b.to(v.dtype))
        return given(y, *z.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        v, b = ctx.saved_tensors
        p, r, _ = b.shape
        needs_z, needs_sums, needs_b = ctx.needs_input_grad
        rows = dy.reshape(-1, p, r).transpose(0, 1)
        dz = dsums = gb = None
        if needs_z or needs_sums:
            dv = torch.bmm(rows, b.to(dy.dtype).transpose(1, 2))
            dz = (rows + dv).transpose(0, 1).reshape(dy.shape)
            dsums = dv.sum(0).view(*dy.shape[:-1], r)
        if needs_b:
            gb = torch.bmm(v.permute(1, 2, 0), rows).to(b.dtype)
        return dz, dsums, gb
