"""One autograd function for updates that are cheapest as a dense ``dW``: ``y = x (W + dW)^T + bias``, rebuilt in backward.

``W + dW`` exists only while a product runs. Forward is one product; backward rebuilds the sum for ``dx = dY (W + dW)`` and
forms ``G = dY^T x`` once, from which the method's ``Recipe`` reads its gradients: three large products, where adding
``x dW^T`` to the base's output takes five and keeps ``dW``. Saved for backward: ``x`` in its own dtype, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from trimtab.core.kinds import PartOperation
from trimtab.core.site import Operation, Site
from trimtab.kernels.mode import compute_dtype, fused, given, if_learnt

__all__ = ["Pull", "Recipe", "readable", "rebuilt"]


Pull = Callable[[Tensor], Sequence[Tensor | None]]


class Recipe:
    """How one method makes ``dW`` from its parameters. All tensors are of one dtype, the parameters' or a wider ``W``'s."""

    def delta(self, *params: Tensor) -> Tensor:
        """``dW`` (out, in) by differentiable operations: the definition."""
        raise NotImplementedError

    def remake(self, W: Tensor | None, needs: Sequence[bool], *params: Tensor) -> tuple[Tensor, Pull]:
        """A fresh ``W + dW`` (``dW`` alone without ``W``), and the map from ``G = dL/dW`` to the parameters' gradients.

        Runs without a graph, in forward and again in backward. ``G`` may be overwritten; of the gradients only those in
        ``needs`` are read.
        """
        raise NotImplementedError


def readable(base: Operation) -> Site | None:
    """Where a frozen W may be read in forward and again in backward if ``base`` has no dense one to keep; None if nowhere.

    That is a quantised place or rows of a fused matrix; not one that other adapters changed, or whose W learns.
    """
    source, whole = (base.site, base.whole) if isinstance(base, PartOperation) else (base, base)
    if not isinstance(whole, Site):
        return None
    W = source.weight
    return None if W.requires_grad or not fused(W) else source


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


def _remake(
    recipe: Recipe, W: Tensor | None, needs: Sequence[bool], params: Sequence[Tensor], dtype: torch.dtype
) -> tuple[Tensor, Pull, torch.dtype]:
    """``W + dW`` in ``dtype``; the sum is formed in the widest dtype of ``W`` and the parameters, float32 at least."""
    wide = torch.promote_types(params[0].dtype, torch.float32 if W is None else torch.promote_types(W.dtype, torch.float32))
    weight, pull = recipe.remake(None if W is None else W.to(wide), needs, *(p.to(wide) for p in params))
    return weight.to(dtype), pull, wide


class _Rebuilt(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, recipe: Recipe, dtype: torch.dtype, x: Tensor, W: Tensor | None, bias: Tensor | None, *params: Tensor
    ) -> Tensor:
        ctx.save_for_backward(if_learnt(x, ctx.needs_input_grad[5:]), W, *params)
        ctx.recipe, ctx.dtype, ctx.bias_dtype = recipe, dtype, None if bias is None else bias.dtype
        weight = _remake(recipe, W, (False,) * len(params), params, dtype)[0]
        return given(F.linear(x.to(dtype), weight, None if bias is None else bias.to(dtype)), *x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, W, *params = ctx.saved_tensors
        _, _, needs_x, _, needs_bias, *needs = ctx.needs_input_grad
        flat = dy.reshape(-1, dy.shape[-1])
        gx = None
        weight, pull, wide = _remake(ctx.recipe, W, needs, params, ctx.dtype)
        if needs_x:
            gx = (flat @ weight).view(x.shape).to(x.dtype)
        del weight
        grads: Sequence[Tensor | None] = [None] * len(params)
        if any(needs):
            G = flat.t() @ x.reshape(-1, x.shape[-1]).to(ctx.dtype)
            grads = pull(G.to(wide))
        grads = [None if g is None or not need else g.to(p.dtype) for g, need, p in zip(grads, needs, params, strict=True)]
        gb = flat.sum(0).to(ctx.bias_dtype) if needs_bias else None
        return None, None, gx, None, gb, *grads
