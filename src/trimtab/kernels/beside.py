"""One autograd function for every additive update ``y = x W^T + bias + f(x; p)`` beside a frozen matrix.

What differs between methods is a ``Rule``: how ``f`` is added into an output, how its gradients are read off, and what of
``x`` must be kept. Shared here: fusing with the dense base (the update is added in place into the base's output, and
its input gradient into ``dY W``), the compute dtype, autocast, and the shapes of activations.

Saved for backward: ``rule.keep(x)`` alone; by default that is ``x`` itself, in its own dtype and its own storage, so that
layers on the same input share it. Everything else is a parameter or recomputed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from trimtab.core.site import Operation
from trimtab.kernels.mode import compute_dtype, fused, given, if_learnt

__all__ = ["Rule", "beside"]


class Rule:
    """How one method adds to an output. All tensors are of the compute dtype; activations are ``(tokens, features)``."""

    def map(self, x: Tensor, *params: Tensor) -> Tensor:
        """``f(x; params)`` on ``(..., in)`` by plain operations out of place: what compiles and maps over rows."""
        raise NotImplementedError

    def keep(self, x: Tensor) -> Tensor | None:
        """What of ``x`` backward needs; None keeps ``x`` itself."""
        return None

    def add_(self, y: Tensor, x: Tensor, kept: Tensor | None, *params: Tensor) -> None:
        """``y += f(x; params)`` in place."""
        raise NotImplementedError

    def pull(
        self, dy: Tensor, x: Tensor, gx: Tensor | None, needs: Sequence[bool], *params: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Gradients of the parameters; adds the input's to ``gx`` in place unless it is None.

        Args:
            dy: gradient of the output.
            x: the input, or what ``keep`` returned.
            gx: gradient of the input so far.
            needs: which of the parameters need a gradient; the others may be answered by None.
        """
        raise NotImplementedError


def beside(rule: Rule, x: Tensor, base: Operation, *params: Tensor) -> Tensor:
    """``base(x) + f(x; params)`` for a linear place, by ``rule``; ``x`` of shape ``(..., in)``."""
    dtype = compute_dtype(x)
    if not fused(x, *params):
        y = base(x)
        return y + rule.map(x.to(dtype), *(p.to(dtype) for p in params)).to(y.dtype)
    W = base.dense
    if W is None or W.requires_grad or not fused(W):  # quantised, adapted before, sharded, or learning itself
        y = base(x)
        return y + _Beside.apply(rule, dtype, base.out_features, x, None, None, *params).to(y.dtype)
    return _Beside.apply(rule, dtype, base.out_features, x, W, base.bias, *params)


class _Beside(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rule: Rule, dtype: torch.dtype, out: int, x: Tensor, W: Tensor | None, bias: Tensor | None, *params: Tensor
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1]).to(dtype).contiguous()
        if W is None:
            y = flat.new_zeros(flat.shape[0], out)
        else:
            y = F.linear(flat, W.to(dtype), None if bias is None else bias.to(dtype))
        kept = rule.keep(flat)
        rule.add_(y, flat, kept, *(p.to(dtype) for p in params))
        ctx.save_for_backward(if_learnt(x if kept is None else kept, ctx.needs_input_grad[6:]), W, *params)
        ctx.rule, ctx.shape, ctx.dtypes = rule, x.shape, (dtype, x.dtype, None if bias is None else bias.dtype)
        return given(y, *x.shape[:-1], out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, W, *params = ctx.saved_tensors
        dtype, x_dtype, bias_dtype = ctx.dtypes
        dy = dy.reshape(-1, dy.shape[-1]).contiguous()
        _, _, _, needs_x, _, needs_bias, *needs = ctx.needs_input_grad
        x = x.reshape(-1, x.shape[-1])
        x = x.to(dtype).contiguous() if any(needs) else x
        gx = None
        if needs_x:
            gx = dy.new_zeros(dy.shape[0], ctx.shape[-1]) if W is None else dy @ W.to(dtype)
        grads = ctx.rule.pull(dy, x, gx, needs, *(p.to(dtype) for p in params))
        grads = [None if g is None or not need else g.to(p.dtype) for g, need, p in zip(grads, needs, params, strict=True)]
        gb = dy.sum(0).to(bias_dtype) if needs_bias else None
        gx = None if gx is None else gx.view(ctx.shape).to(x_dtype)
        return None, None, None, gx, None, gb, *grads
