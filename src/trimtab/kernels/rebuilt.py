"""One autograd function for updates that are cheapest as a dense ``dW``: ``y = x (W + dW)^T + bias``, rebuilt in backward.

``W + dW`` exists only while a product runs. Forward is one product; backward rebuilds the sum for ``dx = dY (W + dW)`` and
forms ``G = dY^T x`` once, from which the method's ``Recipe`` reads its gradients: three large products, where adding
``x dW^T`` to the base's output takes five and keeps ``dW``. Saved for backward: ``x`` in its own dtype, nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from trimtab.core.site import Operation
from trimtab.kernels.mode import compute_dtype, fused

__all__ = ["Recipe", "rebuilt"]


class Recipe:
    """How one method makes ``dW`` from its parameters. Tensors are of the parameters' dtype."""

    def delta(self, *params: Tensor) -> Tensor:
        """A fresh ``dW`` (out, in), by differentiable operations."""
        raise NotImplementedError

    def pull(self, G: Tensor, needs: Sequence[bool], *params: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the parameters from ``G = dL/dW`` (out, in)."""
        raise NotImplementedError


def rebuilt(recipe: Recipe, x: Tensor, base: Operation, *params: Tensor) -> Tensor:
    """``base(x) + x dW^T`` for a linear place, by ``recipe``; ``x`` of shape ``(..., in)``."""
    W = base.dense
    if not fused(x, *params):
        y = base(x)
        return y + base.project(x, recipe.delta(*params)).to(y.dtype)
    if W is None or W.requires_grad or not fused(W):  # quantised, adapted before, sharded, or learning itself
        y = base(x)
        return y + _Rebuilt.apply(recipe, compute_dtype(x), x, None, None, *params).to(y.dtype)
    return _Rebuilt.apply(recipe, compute_dtype(x), x, W, base.bias, *params)


def _weight(recipe: Recipe, W: Tensor | None, dtype: torch.dtype, params: Sequence[Tensor]) -> Tensor:
    """``W + dW`` in ``dtype``; the sum is formed in the parameters' dtype, or ``W``'s if that is wider."""
    delta = recipe.delta(*params)
    if W is not None:
        delta = delta.add_(W) if torch.promote_types(delta.dtype, W.dtype) == delta.dtype else delta + W
    return delta.to(dtype)


class _Rebuilt(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, recipe: Recipe, dtype: torch.dtype, x: Tensor, W: Tensor | None, bias: Tensor | None, *params: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, W, *params)
        ctx.recipe, ctx.dtype, ctx.bias_dtype = recipe, dtype, None if bias is None else bias.dtype
        return F.linear(x.to(dtype), _weight(recipe, W, dtype, params), None if bias is None else bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, W, *params = ctx.saved_tensors
        _, _, needs_x, _, needs_bias, *needs = ctx.needs_input_grad
        flat = dy.reshape(-1, dy.shape[-1])
        gx = None
        if needs_x:
            gx = (flat @ _weight(ctx.recipe, W, ctx.dtype, params)).view(x.shape).to(x.dtype)
        grads: Sequence[Tensor | None] = [None] * len(params)
        if any(needs):
            G = flat.t() @ x.reshape(-1, x.shape[-1]).to(ctx.dtype)
            grads = ctx.recipe.pull(G.to(params[0].dtype), needs, *params)
        grads = [None if g is None or not need else g.to(p.dtype) for g, need, p in zip(grads, needs, params, strict=True)]
        gb = flat.sum(0).to(ctx.bias_dtype) if needs_bias else None
        return None, None, gx, None, gb, *grads
