"""A frozen matrix on changed activations, with an update beside it: ``y = z W^T + bias + u b^T``, all of ``z, u, b`` from ``x``.

How they come from ``x`` and the parameters is a method's ``Parts``, plain differentiable operations, thin beside the product
with W. Saved for backward: ``x`` in its own dtype, nothing else; backward makes the parts again, with a graph that
lives for as long as they are differentiated. Neither a product of two weight-sized matrices nor a weight's gradient is formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from trimtab.core.site import Operation
from trimtab.kernels.mode import compute_dtype, fused, if_learnt

__all__ = ["Parts", "turned"]


class Parts:
    """How a method makes the parts, in two steps of differentiable operations. All tensors are of one dtype."""

    def prepare(self, *params: Tensor) -> tuple[Tensor | None, Sequence[Tensor]]:
        """``b`` (out, k) or None, and what ``make`` needs besides ``x``: once for all tokens."""
        raise NotImplementedError

    def make(self, x: Tensor, *prepared: Tensor) -> tuple[Tensor, Tensor | None]:
        """``(z, u)`` from ``x`` (tokens, in): (tokens, in) and (tokens, k).

        Without ``b``, ``u`` (tokens, out) itself is added; without ``u`` nothing is.
        """
        raise NotImplementedError


def turned(parts: Parts, x: Tensor, base: Operation, *params: Tensor) -> Tensor:
    """``base(z) + u b^T`` for a linear place; ``x`` of shape ``(..., in)``."""
    dtype = compute_dtype(x)
    if not fused(x, *params):
        b, prepared = parts.prepare(*(p.to(dtype) for p in params))
        z, u = parts.make(x.reshape(-1, x.shape[-1]).to(dtype), *prepared)
        y = base(z.reshape(x.shape).to(x.dtype))
        return y if u is None else y + _added(u, b).view(y.shape).to(y.dtype)
    W = base.dense
    if W is None or W.requires_grad or not fused(W):  # quantised, adapted before, sharded, or learning itself
        z, added = _Parts.apply(parts, dtype, x, *params)
        y = base(z)
        return y if added is None else y + added.view(y.shape).to(y.dtype)
    return _Turned.apply(parts, dtype, x, W, base.bias, *params)


def _added(u: Tensor, b: Tensor | None) -> Tensor:
    return u if b is None else u @ b.t()


_RUN = 1 << 18  # entries of x in one run of tokens


def _runs(x: Tensor) -> list[slice]:
    """Rows of ``x`` (tokens, in) in runs whose temporaries stay in the cache; one run on an accelerator."""
    step = max(x.shape[0], 1) if x.is_cuda else max(32, _RUN // max(x.shape[1], 1) // 32 * 32)  # whole vectors
    return [slice(i, i + step) for i in range(0, x.shape[0], step)] or [slice(0, 0)]


def _made(parts: Parts, x: Tensor, params: Sequence[Tensor]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``(z, u, b)``, made run by run."""
    b, prepared = parts.prepare(*params)
    if len(_runs(x)) == 1:
        return *parts.make(x, *prepared), b
    z, u = x.new_empty(x.shape[::-1]).t(), None  # tokens adjacent, as the parts come, and as a product with W takes them too
    for run in _runs(x):
        z[run], part = parts.make(x[run], *prepared)
        if part is not None:
            u = part.new_empty(x.shape[0], part.shape[1]) if u is None else u
            u[run] = part
    return z, u, b


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parts: Parts, dtype: torch.dtype, x: Tensor, W: Tensor, bias: Tensor | None, *params: Tensor) -> Tensor:
        ctx.save_for_backward(if_learnt(x, ctx.needs_input_grad[5:]), W, *params)
        ctx.parts, ctx.dtype, ctx.bias_dtype = parts, dtype, None if bias is None else bias.dtype
        z, u, b = _made(parts, x.reshape(-1, x.shape[-1]).to(dtype), [p.to(dtype) for p in params])
        bias = None if bias is None else bias.to(dtype)
        if b is None:
            y = F.linear(z, W.to(dtype), bias)
            y = y if u is None else y.add_(u)
        else:
            y = F.linear(u, b, bias).addmm_(z, W.to(dtype).t())
        return y.view(*x.shape[:-1], W.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, W, *params = ctx.saved_tensors
        _, _, needs_x, _, needs_bias, *needs = ctx.needs_input_grad
        dy = dy.reshape(-1, dy.shape[-1])
        grads = _gradients(ctx, (W.to(ctx.dtype).t() @ dy.t()).t(), dy, x, params, (needs_x, *needs))
        gb = dy.sum(0).to(ctx.bias_dtype) if needs_bias else None
        return None, None, grads[0], None, gb, *grads[1:]


class _Parts(torch.autograd.Function):
    """``z``, and ``u b^T`` or None, for a base that runs by itself."""

    @staticmethod
    def forward(ctx: Any, parts: Parts, dtype: torch.dtype, x: Tensor, *params: Tensor) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(if_learnt(x, ctx.needs_input_grad[3:]), *params)
        ctx.parts, ctx.dtype = parts, dtype
        z, u, b = _made(parts, x.reshape(-1, x.shape[-1]).to(dtype), [p.to(dtype) for p in params])
        return z.reshape(x.shape).to(x.dtype), None if u is None else _added(u, b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *params = ctx.saved_tensors
        dz = dz.reshape(-1, dz.shape[-1]).to(ctx.dtype)
        return None, None, *_gradients(ctx, dz, dy, x, params, ctx.needs_input_grad[2:])


def _gradients(
    ctx: Any, dz: Tensor, dy: Tensor | None, x: Tensor, params: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of ``x`` and the parameters, each in its own dtype; None where not needed."""
    flat = x.detach().reshape(-1, x.shape[-1]).to(ctx.dtype).contiguous()
    leaves = [p.detach().to(ctx.dtype).requires_grad_(need) for p, need in zip(params, needs[1:], strict=True)]
    with torch.enable_grad():
        b, prepared = ctx.parts.prepare(*leaves)
    thin = [t.detach().requires_grad_(t.requires_grad) for t in prepared]
    gx = torch.empty_like(flat) if needs[0] else None
    wide = torch.promote_types(ctx.dtype, torch.float32)  # sums over runs of tokens
    sums = [torch.zeros_like(t, dtype=wide) for t in thin]
    gb = None if b is None else torch.zeros_like(b, dtype=wide)
    for run in _runs(flat):
        part = flat[run].requires_grad_(needs[0])
        with torch.enable_grad():
            z, u = ctx.parts.make(part, *thin)
        ends = [(z, dz[run])]
        if u is not None:
            ends.append((u, dy[run] if b is None else dy[run] @ b.detach()))
        if b is not None and b.requires_grad:
            gb += dy[run].t() @ u.detach()
        ends = [(out, g) for out, g in ends if out.requires_grad]
        into = [t for t in (part, *thin) if t.requires_grad]
        found = iter(torch.autograd.grad([out for out, _ in ends], into, [g for _, g in ends]) if ends else ())
        if gx is not None:
            gx[run] = next(found)
        for total, t in zip(sums, thin, strict=True):
            if t.requires_grad:
                total += next(found)
    ends = [(out, g) for out, g in zip((b, *prepared), (gb, *sums), strict=True) if out is not None and out.requires_grad]
    learn = [leaf for leaf in leaves if leaf.requires_grad]
    found = iter(torch.autograd.grad([out for out, _ in ends], learn, [g.to(ctx.dtype) for _, g in ends]) if learn else ())
    grads = [next(found).to(p.dtype) if need else None for p, need in zip(params, needs[1:], strict=True)]
    return [None if gx is None else gx.view(x.shape).to(x.dtype), *grads]
