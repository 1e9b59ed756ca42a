"""A frozen matrix on changed activations, with an update beside it: ``y = z W^T + bias + u b^T``, all of ``z, u, b`` from ``x``.

How they come from ``x`` and the parameters is a method's ``Parts``, thin beside the product with W. Saved for backward: ``x``
in its own dtype, nothing else; backward makes ``b`` and what is thin again, with a graph that lives for as long as they are
differentiated. Neither a product of two weight-sized matrices nor a weight's gradient is formed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trimtab.core.site import Operation
from trimtab.kernels.lowrank import narrow
from trimtab.kernels.mode import compute_dtype, fused, given, if_learnt

__all__ = ["Parts", "turned"]


class Parts:
    """How a method makes the parts. All tensors are of one dtype."""

    def prepare(self, *params: Tensor) -> tuple[Tensor | None, Sequence[Tensor]]:
        """``b`` (out, k) or None, and what ``make`` needs besides ``x``: once for all tokens, by differentiable operations."""
        raise NotImplementedError

    def make(self, x: Tensor, *prepared: Tensor) -> tuple[Tensor, Tensor | None]:
        """``(z, u)`` from ``x`` (tokens, in): (tokens, in) and (tokens, k), by differentiable operations.

        Without ``b``, ``u`` (tokens, out) itself is added; without ``u`` nothing is.
        """
        raise NotImplementedError

    def gradients(self, x: Tensor, prepared: Sequence[Tensor], dz: Tensor, du: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Gradients of ``x`` and of ``prepared`` from those of ``(z, u)``, without a graph."""
        raise NotImplementedError

    def beside(self, x: Tensor, *prepared: Tensor) -> Tensor:
        """``u`` of ``make`` alone; asked for where there is a ``b`` that learns."""
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


_RUN = 512  # tokens


def _runs(x: Tensor) -> list[slice]:
    """Rows of ``x`` (tokens, in) in runs whose parts stay in the cache and are never made for all tokens.

    One run on an accelerator.
    """
    step = max(x.shape[0], 1) if x.is_cuda else _RUN
    return [slice(i, min(i + step, x.shape[0])) for i in range(0, x.shape[0], step)]


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parts: Parts, dtype: torch.dtype, x: Tensor, W: Tensor, bias: Tensor | None, *params: Tensor) -> Tensor:
        ctx.save_for_backward(if_learnt(x, ctx.needs_input_grad[5:]), W, *params)
        ctx.parts, ctx.dtype, ctx.bias_dtype = parts, dtype, None if bias is None else bias.dtype
        b, prepared = parts.prepare(*(p.to(dtype) for p in params))
        flat, Wt, bias = x.reshape(-1, x.shape[-1]).to(dtype), W.to(dtype).t(), None if bias is None else bias.to(dtype)
        y = flat.new_empty(flat.shape[0], W.shape[0])
        for run in _runs(flat):
            z, u = parts.make(flat[run], *prepared)
            if u is None:
                torch.mm(z, Wt, out=y[run])
            elif b is None:
                torch.addmm(u, z, Wt, out=y[run])
            else:
                torch.mm(u, b.t(), out=y[run]).addmm_(z, Wt)
            if bias is not None:
                y[run] += bias
        return given(y, *x.shape[:-1], W.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, W, *params = ctx.saved_tensors
        _, _, needs_x, _, needs_bias, *needs = ctx.needs_input_grad
        dy, Wt = dy.reshape(-1, dy.shape[-1]), W.to(ctx.dtype).t()
        grads = _gradients(ctx, lambda run: (Wt @ dy[run].t()).t(), dy, x, params, (needs_x, *needs))
        gb = dy.sum(0).to(ctx.bias_dtype) if needs_bias else None
        return None, None, grads[0], None, gb, *grads[1:]


class _Parts(torch.autograd.Function):
    """``z``, and ``u b^T`` or None, for a base that runs by itself."""

    @staticmethod
    def forward(ctx: Any, parts: Parts, dtype: torch.dtype, x: Tensor, *params: Tensor) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(if_learnt(x, ctx.needs_input_grad[3:]), *params)
        ctx.parts, ctx.dtype = parts, dtype
        b, prepared = parts.prepare(*(p.to(dtype) for p in params))
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        made = [parts.make(flat[run], *prepared) for run in _runs(flat) or [slice(0)]]
        z = given(torch.cat([z for z, _ in made]), *x.shape).to(x.dtype)
        return z, None if made[0][1] is None else torch.cat([_added(u, b) for _, u in made])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *params = ctx.saved_tensors
        dz = dz.reshape(-1, dz.shape[-1]).to(ctx.dtype)
        return None, None, *_gradients(ctx, lambda run: dz[run], dy, x, params, ctx.needs_input_grad[2:])


def _gradients(
    ctx: Any, dz: Callable[[slice], Tensor], dy: Tensor | None, x: Tensor, params: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of ``x`` and the parameters, each in its own dtype; None where not needed."""
    flat = x.detach().reshape(-1, x.shape[-1]).to(ctx.dtype).contiguous()
    leaves = [p.detach().to(ctx.dtype).requires_grad_(need) for p, need in zip(params, needs[1:], strict=True)]
    with torch.enable_grad():
        b, prepared = ctx.parts.prepare(*leaves)
    thin = [t.detach() for t in prepared]
    gx = torch.empty_like(flat) if needs[0] else None
    wide = torch.promote_types(ctx.dtype, torch.float32)  # sums over runs of tokens
    sums = [torch.zeros_like(t, dtype=wide) for t in thin]
    gb = torch.zeros_like(b, dtype=wide) if b is not None and b.requires_grad else None
    for run in _runs(flat):
        part, end = flat[run], None if dy is None else dy[run]
        back, found = ctx.parts.gradients(part, thin, dz(run), end if b is None else narrow(end, b.detach()))
        if gx is not None:
            gx[run] = back
        if gb is not None:
            gb += (ctx.parts.beside(part, *thin).t() @ end).t()  # ten times faster than with ``end`` transposed
        for total, more in zip(sums, found, strict=True):
            total += more
    ends = [(out, g) for out, g in zip((*prepared, b), (*sums, gb), strict=True) if out is not None and out.requires_grad]
    learn = [leaf for leaf in leaves if leaf.requires_grad]
    made = iter(torch.autograd.grad([out for out, _ in ends], learn, [g.to(out.dtype) for out, g in ends]) if learn else ())
    grads = [next(made).to(p.dtype) if need else None for p, need in zip(params, needs[1:], strict=True)]
    return [None if gx is None else gx.view(x.shape).to(x.dtype), *grads]
