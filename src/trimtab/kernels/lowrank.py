"""A low-rank update beside a base: ``y = base(x) + scale * (drop(x) A^T) B^T``, A (r, in), B (out, r).

For linear bases two autograd Functions keep ``x``, in its own dtype and so shared by every layer on the same input, and
``u`` (N, r) where ``16 r <= in``, that is at most a sixteenth beside it; the dropout mask is computed again in backward, and
so is ``u`` where it is wider. With ``d`` the dropped input and ``G = dL/dy``::

    u = s d A^T          y  = u B^T + bias;  y += x W^T
    v = s G B            dx = mask * (v A);  dx += G W
    dA = v^T d           dB = (u^T G)^T

The thin product writes each large tensor and the large one adds to it in place: that is one pass less over the tensor than
the other order, and nothing waits in between.

Parameters may be wider than ``x`` (fp32 beside bf16): the thin factors are cast, never ``x``; gradients come back in the
parameter's dtype. Source: arXiv 2106.09685 Eq. 3; the saved set follows arXiv 2412.06289 Sec. 3.3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from trimtab.core.site import Operation, Site
from trimtab.kernels.dropout import draw_seed, keep_rate, masks
from trimtab.kernels.mode import compute_dtype, fused, given, if_learnt

__all__ = ["KEEP", "down", "low_rank", "narrow"]

KEEP = 16  # x A^T is kept where it is at most a sixteenth of x: making it again is a seventh of the update's work

Pair = tuple[Tensor, Tensor]


def low_rank(
    x: Tensor,
    base: Operation,
    a: Tensor,
    b: Tensor,
    *,
    scale: float = 1.0,
    dropout: float = 0.0,
    start: Pair | None = None,
) -> Tensor:
    """``base(x) + scale * drop(x) (B A - B0 A0)^T``.

    Args:
        x: what the base takes: ``(..., in)``, an image, or an embedding's indices.
        base: a linear, conv or embedding operation.
        a: (r, in), may need a gradient or not.
        b: (out, r), likewise.
        scale: factor of the update.
        dropout: probability of zeroing an entry of ``x`` for the update (rounded to 1/256 on the fused path); an
            embedding's input is one-hot, so there the update of a whole token is dropped.
        start: ``(a0, b0)``, constants that are subtracted (what PiSSA and its kind moved out of W); no gradient.
    """
    if base.kind != "linear":
        return _convolved(x, base, *_joined(a, b, start), scale, dropout)
    if not fused(x, a, b):
        return _plain(x, base, *_joined(a, b, start), scale, dropout)
    a0, b0 = (None, None) if start is None else start
    seed = draw_seed() if dropout else 0
    W = base.dense
    if W is not None and fused(W):
        return _Dense.apply(x, W, base.bias, a, b, a0, b0, scale, dropout, seed)
    y = base(x)
    if y.dtype != compute_dtype(x):
        return y + _plain(x, None, *_joined(a, b, start), scale, dropout).to(y.dtype)
    return _Beside.apply(y, x, a, b, a0, b0, scale, dropout, seed, _owned(y, base))


def _joined(a: Tensor, b: Tensor, start: Pair | None) -> Pair:
    """``B A - B0 A0`` as one pair of rank r + r0."""
    if start is None:
        return a, b
    a0, b0 = start
    return torch.cat([a, a0.to(a.dtype)]), torch.cat([b, -b0.to(b.dtype)], dim=1)


def _plain(x: Tensor, base: Operation | None, a: Tensor, b: Tensor, scale: float, dropout: float) -> Tensor:
    """The composition of torch operations that the Functions replace; without ``base`` the update alone."""
    dtype = compute_dtype(x)
    u = F.linear(F.dropout(x, dropout, training=dropout > 0).to(dtype), a.to(dtype))
    update = F.linear(u, b.to(dtype)) * scale
    if base is None:
        return update
    y = base(x)
    return y + update.to(y.dtype)


def _convolved(x: Tensor, base: Operation, a: Tensor, b: Tensor, scale: float, dropout: float) -> Tensor:
    """Any kind that has ``project`` and ``emit``: the base with the thin kernel ``a``, then ``b`` on the features."""
    y = base(x)
    if base.kind == "embedding":
        u = base.project(x, a)
        if dropout:
            u = u * F.dropout(u.new_ones(*u.shape[:-1], 1), dropout)
    else:
        u = base.project(F.dropout(x, dropout, training=dropout > 0), a)
    return y + base.emit(F.linear(u, b.to(u.dtype)) * scale).to(y.dtype)


def _owned(y: Tensor, base: Operation) -> bool:
    """Whether the base's output may be written in place: fresh from a site or from a Function of this file."""
    if y._is_view() or (y.requires_grad and y.is_leaf):
        return False
    return isinstance(base, Site) or type(y.grad_fn).__name__ in ("_DenseBackward", "_BesideBackward")


def down(x: Tensor, a: Tensor, p: float, seed: int) -> Tensor:
    """``drop(x) a^T`` without the division by the keep rate, ``(N, in) -> (N, r)``."""
    if p == 0:
        return x @ a.t()
    u = x.new_empty(x.shape[0], a.shape[0])
    for rows, mask in masks(seed, p, x):
        torch.mm(x[rows] * mask, a.t(), out=u[rows])
    return u


def narrow(G: Tensor, B: Tensor) -> Tensor:
    """``G B``, (N, out) and (out, r), for small r: a CPU's BLAS is two to four times faster with B's columns one by one."""
    return G @ (B if B.is_cuda else B.t().contiguous().t())


def _kept(u: Tensor, r: int, width: int, needed: bool) -> Tensor | None:
    """The columns of ``u`` that the gradient of B needs, if they are few beside ``x``; else they are made again."""
    if not needed or r * KEEP > width:
        return None
    return u if u.shape[1] == r else u[:, :r].clone()


def _gradients(
    ctx: Any, G: Tensor, x: Tensor, kept: Tensor | None, factors: tuple[Tensor | None, ...], need: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The update's part of dx (N, in), and dA, dB in their own dtypes; each only where ``need`` says so."""
    a, b = factors[:2]
    A, B = _cast(x.dtype, *factors)
    r, (need_x, need_a, need_b) = a.shape[0], need
    v = narrow(G, B).mul_(ctx.gain) if need_x or need_a else None
    if ctx.p == 0:
        if need_b and kept is None:
            kept = (x @ A[:r].t()).mul_(ctx.gain)
        gb = kept.t() @ G if need_b else None
        ga = v[:, :r].t() @ x if need_a else None
        gx = v @ A if need_x else None  # last: the large product finds it in the cache
    else:
        gx, ga, gb = _masked(ctx, v, G, x, A, kept, r, need)
    return gx, None if ga is None else ga.to(a.dtype), None if gb is None else gb.t().to(b.dtype)


def _masked(
    ctx: Any, v: Tensor | None, G: Tensor, x: Tensor, A: Tensor, kept: Tensor | None, r: int, need: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``(mask * (v A), v^T d, u^T G)`` with ``d = mask * x``, in runs of rows, so that neither is whole at any time."""
    need_x, need_a, need_b = need
    wide = torch.promote_types(x.dtype, torch.float32)  # sums over runs of rows
    gx = torch.empty_like(x) if need_x else None
    ga = torch.zeros(r, x.shape[1], device=x.device, dtype=wide) if need_a else None
    remade = need_b and kept is None
    u = x.new_empty(x.shape[0], r) if remade else kept
    for rows, mask in masks(ctx.seed, ctx.p, x):
        if need_x:
            torch.mm(v[rows], A, out=gx[rows])
            gx[rows].mul_(mask)
        if need_a or remade:
            d = x[rows] * mask
        if need_a:
            _accumulate(ga, v[rows, :r].t(), d)
        if remade:
            torch.mm(d, A[:r].t(), out=u[rows])
    if remade:
        u.mul_(ctx.gain)
    return gx, ga, u.t() @ G if need_b else None


def _accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``; the sum in ``total``'s dtype."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


def _begun(u: Tensor, B: Tensor, bias: Tensor | None) -> Tensor:
    """``u B^T + bias``: the bias as one more column, since adding it by itself is a pass over the output."""
    if bias is None:
        return u @ B.t()
    wide = u.new_ones(u.shape[0], u.shape[1] + 1)
    wide[:, :-1] = u
    return wide @ torch.cat([B, bias[:, None]], dim=1).t()


def _cast(dtype: torch.dtype, a: Tensor, b: Tensor, a0: Tensor | None, b0: Tensor | None) -> Pair:
    """The joined factors in the compute dtype."""
    return tuple(t.to(dtype) for t in _joined(a, b, None if a0 is None else (a0, b0)))  # type: ignore[return-value]


class _Dense(Function):
    """Frozen dense base and update in one node: keeps ``x`` and references to ``W`` and the factors."""

    @staticmethod
    def forward(ctx, x, W, bias, a, b, a0, b0, scale, p, seed):
        dtype = compute_dtype(x)
        ctx.gain, ctx.p, ctx.seed, ctx.dtype = scale / keep_rate(p), p, seed, dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        x2 = x.reshape(-1, x.shape[-1]).to(dtype)
        A, B = _cast(dtype, a, b, a0, b0)
        u = down(x2, A, p, seed).mul_(ctx.gain)
        y = _begun(u, B, None if bias is None else bias.to(dtype)).addmm_(x2, W.to(dtype).t())
        kept = _kept(u, a.shape[0], x2.shape[1], ctx.needs_input_grad[4])
        ctx.save_for_backward(if_learnt(x, ctx.needs_input_grad[3:5]), W, kept, a, b, a0, b0)
        return given(y, *x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, G):
        x, W, kept, *factors = ctx.saved_tensors
        need_x, need_w, need_bias, need_a, need_b = ctx.needs_input_grad[:5]
        x2, G2 = x.reshape(-1, x.shape[-1]).to(ctx.dtype), G.reshape(-1, G.shape[-1])
        gx, ga, gb = _gradients(ctx, G2, x2, kept, factors, (need_x, need_a, need_b))
        if need_x:
            gx = gx.addmm_(G2, W.to(ctx.dtype)).view(x.shape).to(x.dtype)
        gw = (G2.t() @ x2).to(W.dtype) if need_w else None
        gbias = G2.sum(0).to(ctx.bias_dtype) if need_bias else None
        return gx, gw, gbias, ga, gb, None, None, None, None, None


class _Beside(Function):
    """The update alone, on top of an output ``y`` of any base (quantised, or adapted already)."""

    @staticmethod
    def forward(ctx, y, x, a, b, a0, b0, scale, p, seed, in_place):
        ctx.gain, ctx.p, ctx.seed, ctx.dtype = scale / keep_rate(p), p, seed, y.dtype
        if in_place:
            ctx.mark_dirty(y)
        else:
            y = y.clone()
        x2 = x.reshape(-1, x.shape[-1]).to(ctx.dtype)
        A, B = _cast(ctx.dtype, a, b, a0, b0)
        u = down(x2, A, p, seed).mul_(ctx.gain)
        y.view(-1, y.shape[-1]).addmm_(u, B.t())
        kept = _kept(u, a.shape[0], x2.shape[1], ctx.needs_input_grad[3])
        ctx.save_for_backward(if_learnt(x, ctx.needs_input_grad[2:4]), kept, a, b, a0, b0)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, G):
        x, kept, *factors = ctx.saved_tensors
        need_y, need_x, need_a, need_b = ctx.needs_input_grad[:4]
        x2, G2 = x.reshape(-1, x.shape[-1]).to(ctx.dtype), G.reshape(-1, G.shape[-1])
        gx, ga, gb = _gradients(ctx, G2, x2, kept, factors, (need_x, need_a, need_b))
        gx = gx.view(x.shape).to(x.dtype) if need_x else None
        return G if need_y else None, gx, ga, gb, None, None, None, None, None, None
