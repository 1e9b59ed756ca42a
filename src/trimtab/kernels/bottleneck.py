"""A thin network beside an activation: ``y + s (drop(f(drop(x) A^T + a)) B^T + b)``, A (m, in), B (out, m); x may be y itself.

One autograd Function keeps ``x`` in its own dtype and storage, and ``u = drop(x) A^T + a`` (tokens, m) where ``16 m <= in``, that
is at most a sixteenth beside it; a wider ``u`` and the dropout masks are made again in backward. Where no factor learns it keeps
``u`` alone, and that only for a nonlinear f. With ``h = drop(f(u))``, ``G = dL/dy'``::

    v = s G B                     du = f'(u) * mask * v
    dx = mask * (du A)            (and dx = G + that where x is y: one product on top of G)
    dA = du^T drop(x)             da = sum du
    dB = s G^T h                  db = s sum G                     ds = <G B, h> + <sum G, b>

Biases are one more column of the thin products: adding them, or summing for them, would be a pass over the large tensors.

The matrices may be made from fewer numbers (``make``, from factors): they are then made again in backward, so that neither they
nor what lies between is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from trimtab.core.errors import ShapeMismatch
from trimtab.kernels.dropout import draw_seed, keep_mask, keep_rate, masks
from trimtab.kernels.lowrank import KEEP, down
from trimtab.kernels.mode import compute_dtype, fused, given, if_learnt

__all__ = ["ACTIVATIONS", "Make", "Parts", "bottleneck"]

_aten = torch.ops.aten

#: name -> (function, function(gradient, pre-activation) -> gradient of the pre-activation); None: the identity
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]] | None] = {
    "none": None,
    "relu": (F.relu, lambda g, u: _aten.threshold_backward(g, u, 0)),
    "gelu": (F.gelu, lambda g, u: _aten.gelu_backward(g, u)),
    "gelu_tanh": (lambda u: F.gelu(u, approximate="tanh"), lambda g, u: _aten.gelu_backward(g, u, approximate="tanh")),
    "silu": (F.silu, lambda g, u: _aten.silu_backward(g, u)),
    "tanh": (torch.tanh, lambda g, u: _aten.tanh_backward(g, torch.tanh(u))),
}

#: A (m, in), a (m,) or None, B (out, m), b (out,) or None
Parts = tuple[Tensor, Tensor | None, Tensor, Tensor | None]
Make = Callable[..., Parts]


def bottleneck(
    y: Tensor,
    x: Tensor | None,
    factors: Sequence[Tensor | None],
    *,
    make: Make | None = None,
    act: str = "none",
    scale: float | Tensor = 1.0,
    dropout: float = 0.0,
    hidden_dropout: float = 0.0,
) -> Tensor:
    """``y`` with the network's output on ``x`` added, in ``y``'s dtype and shape.

    Args:
        y: (..., out).
        x: (..., in) with the leading axes of ``y``; None: ``y`` itself.
        factors: the four ``Parts``, or what ``make`` takes.
        make: factors -> parts, by differentiable operations; None: they are the parts.
        act: a name in ``ACTIVATIONS``.
        scale: s, a number or a parameter of one entry.
        dropout: probability of zeroing an entry of ``x`` for the network; hidden_dropout: one of its hidden activation.

    Raises:
        ShapeMismatch: ``x`` and ``y`` have different leading axes.
    """
    if x is not None and x.shape[:-1] != y.shape[:-1]:
        raise ShapeMismatch(
            f"an adapter beside a module needs inputs and outputs of the same tokens, found an input of {tuple(x.shape)} and an "
            f"output of {tuple(y.shape)}; attach it where they agree, or put a series adapter at the output"
        )
    dtype = compute_dtype(y if x is None else x)
    learned = scale if isinstance(scale, Tensor) else None
    if not fused(y, x, learned, *factors):
        parts = factors if make is None else make(*factors)
        return _plain(y, x, parts, dtype, act, scale, dropout, hidden_dropout)
    seeds = draw_seed() if dropout else 0, draw_seed() if hidden_dropout else 0
    factor = 1.0 if learned is not None else float(scale)
    return _Bottleneck.apply(y, x, learned, factor, make, act, (dropout, hidden_dropout), seeds, dtype, *factors)


def _plain(
    y: Tensor,
    x: Tensor | None,
    parts: Sequence[Tensor | None],
    dtype: torch.dtype,
    act: str,
    scale: float | Tensor,
    p: float,
    q: float,
) -> Tensor:
    """The composition of torch operations that the Function replaces."""
    A, a, B, b = (None if t is None else t.to(dtype) for t in parts)
    x = F.dropout(y if x is None else x, p, training=p > 0).to(dtype)
    h = F.linear(x, A, a)
    if ACTIVATIONS[act] is not None:
        h = ACTIVATIONS[act][0](h)
    h = F.dropout(h, q, training=q > 0)
    scale = scale.to(dtype) if isinstance(scale, Tensor) else scale
    return y + (scale * F.linear(h, B, b)).to(y.dtype)


def _made(make: Make | None, factors: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """The parts in the compute dtype, outside of a graph."""
    parts = factors if make is None else make(*factors)
    return [None if t is None else t.detach().to(dtype) for t in parts]


def _hidden(u: Tensor, act: str, q: float, seed: int) -> tuple[Tensor, Tensor | None]:
    """``h = drop(f(u))`` without the division by the keep rate, and the mask."""
    h = u if ACTIVATIONS[act] is None else ACTIVATIONS[act][0](u)
    if not q:
        return h, None
    mask = keep_mask(seed, q, u)
    return h * mask, mask


def _column(h: Tensor, bias: Tensor | None) -> Tensor:
    """``h`` (N, m), with a column of ones where there is a bias."""
    if bias is None:
        return h
    wide = h.new_ones(h.shape[0], h.shape[1] + 1)
    wide[:, :-1] = h
    return wide


def _thin(x: Tensor, A: Tensor, a: Tensor | None, p: float, seed: int) -> Tensor:
    """``drop(x) A^T + a``, (N, in) -> (N, m)."""
    if not p:
        return F.linear(x, A, a)
    u = down(x, A, p, seed).div_(keep_rate(p))
    return u if a is None else u.add_(a)


class _Bottleneck(Function):
    @staticmethod
    def forward(ctx, y, x, s, factor, make, act, rates, seeds, dtype, *factors):
        ctx.factor, ctx.make, ctx.act, ctx.rates, ctx.seeds, ctx.dtype = factor, make, act, rates, seeds, dtype
        ctx.series = x is None
        x = y if x is None else x
        A, a, B, b = _made(make, factors, dtype)
        x2, y2 = x.reshape(-1, x.shape[-1]).to(dtype), y.reshape(-1, y.shape[-1])
        u = _thin(x2, A, a, rates[0], seeds[0])
        h, _ = _hidden(u, act, rates[1], seeds[1])
        right = B.t() / keep_rate(rates[1])
        right = (right if b is None else torch.cat([right, b[None]])) * _gain(s, factor, dtype)
        h = _column(h, b)
        new = torch.addmm(y2, h, right) if y.dtype == dtype else y2 + (h @ right).to(y.dtype)
        need, few = ctx.needs_input_grad, A.shape[0] * KEEP <= A.shape[1]
        # without x there is nothing to make u from again
        asked = (few and any(need)) if any(need[9:]) else need[2] or (need[0 if ctx.series else 1] and ACTIVATIONS[act] is not None)
        ctx.save_for_backward(if_learnt(x, need[9:]), s, u if asked else None, *factors)
        return given(new, *y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, G):
        x, s, u, *factors = ctx.saved_tensors
        need_y, need_x, need_s = ctx.needs_input_grad[:3]
        need = ctx.needs_input_grad[9:]
        need_x = need_y if ctx.series else need_x
        parts = _made(ctx.make, factors, ctx.dtype)
        x2, G2 = x.reshape(-1, x.shape[-1]).to(ctx.dtype), G.reshape(-1, G.shape[-1]).to(ctx.dtype)
        gx, gs, grads = _gradients(ctx, G2, x2, u, s, parts, need_x, any(need))
        if any(need):
            grads = grads if ctx.make is None else _through(ctx.make, factors, need, grads)
            grads = [g.to(f.dtype) if n else None for g, n, f in zip(grads, need, factors, strict=True)]
        else:
            grads = [None] * len(factors)
        gs = gs.reshape(s.shape).to(s.dtype) if need_s else None
        gx = gx.view(x.shape).to(x.dtype) if need_x else None
        first = (gx, None) if ctx.series else (G if need_y else None, gx)
        return *first, gs, None, None, None, None, None, None, *grads


def _gain(s: Tensor | None, factor: float, dtype: torch.dtype) -> float | Tensor:
    return factor if s is None else factor * s.to(dtype)


def _gradients(
    ctx: Any,
    G: Tensor,
    x: Tensor,
    u: Tensor | None,
    s: Tensor | None,
    parts: Sequence[Tensor | None],
    need_x: bool,
    learns: bool,
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """Gradients of x (with G on top where x is y), of s, and of the parts."""
    A, a, B, b = parts
    gain, keep = _gain(s, ctx.factor, ctx.dtype), keep_rate(ctx.rates[1])
    u = _thin(x, A, a, ctx.rates[0], ctx.seeds[0]) if u is None else u  # of a stand-in for x only where its values do not matter
    h, mask = _hidden(u, ctx.act, ctx.rates[1], ctx.seeds[1])
    gB = gb = gs = None
    if learns or s is not None:
        both = _column(h, b).t() @ G  # (m, out), and one more row for b
        gB, gb = both[: h.shape[1]].t() / keep, None if b is None else both[-1]
        if s is not None:
            gs = ctx.factor * ((gB * B).sum() + (0 if b is None else (gb * b).sum()))
        gB, gb = gB * gain, None if b is None else gb * gain
    v = (G @ B).mul_(gain / keep)
    v = v if mask is None else v.mul_(mask)
    du = v if ACTIVATIONS[ctx.act] is None else ACTIVATIONS[ctx.act][1](v, u)
    gx, gA = _thin_gradients(ctx, G, x, du, A, need_x, learns)
    return gx, gs, [gA, du.sum(0) if learns and a is not None else None, gB, gb]


def _thin_gradients(
    ctx: Any, G: Tensor, x: Tensor, du: Tensor, A: Tensor, need_x: bool, learns: bool
) -> tuple[Tensor | None, Tensor | None]:
    """``dx`` and ``dA``; with dropout in runs of rows, so that neither the mask nor the dropped input is whole at any time."""
    p = ctx.rates[0]
    if not p:
        gA = du.t() @ x if learns else None
        if not need_x:
            return None, gA
        return (torch.addmm(G, du, A) if ctx.series else du @ A), gA
    du = du / keep_rate(p)
    gx = torch.empty_like(x) if need_x else None
    gA = torch.zeros(A.shape, device=A.device, dtype=torch.promote_types(A.dtype, torch.float32)) if learns else None
    for rows, mask in masks(ctx.seeds[0], p, x):
        if need_x:
            torch.mm(du[rows], A, out=gx[rows])
            gx[rows].mul_(mask)
        if learns:
            gA += du[rows].t() @ (x[rows] * mask)
    return gx.add_(G) if need_x and ctx.series else gx, gA


def _through(
    make: Make, factors: Sequence[Tensor | None], need: Sequence[bool], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of the factors from those of the parts, by a graph that lives only here."""
    leaves = [None if f is None else f.detach().requires_grad_(n) for f, n in zip(factors, need, strict=True)]
    with torch.enable_grad():
        parts = make(*leaves)
    pairs = [(t, g.to(t.dtype)) for t, g in zip(parts, grads, strict=True) if t is not None and t.requires_grad]
    wanted = [leaf for leaf, n in zip(leaves, need, strict=True) if n]
    found = iter(torch.autograd.grad([t for t, _ in pairs], wanted, [g for _, g in pairs]))
    return [next(found) if n else None for n in need]
