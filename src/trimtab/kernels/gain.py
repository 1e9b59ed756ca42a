"""A gain on every output feature: ``y = g * v + bias``, g (out,), v (..., out); keeps ``v``.

Backward: ``dv = g * dy``; ``dg = sum over tokens of dy * v``, summed in runs of rows, so that no product of ``v``'s size is formed.
A gain in float32 stays so until the product is rounded: in bfloat16 it would itself be off by up to 2^-9, for all tokens alike.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from trimtab.core.site import Operation
from trimtab.kernels.mode import fused

__all__ = ["Unbiased", "gained", "scaled"]

_RUN = 1 << 20  # entries a run: bounds the temporary


class Unbiased(Operation):
    """A linear base without its bias, which a gain on the matrix must not scale."""

    kind = "linear"

    def __init__(self, base: Operation):
        self.base, self.dense = base, base.dense
        self.out_features, self.in_features = base.out_features, base.in_features

    def __call__(self, x: Tensor) -> Tensor:
        return self.base.matmul(x)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    bias = None  # type: ignore[assignment]


def scaled(v: Tensor, g: Tensor) -> Tensor:
    """``v * g``, formed in the wider dtype of the two and rounded once to ``v``'s; outside of a graph."""
    shape = torch.broadcast_shapes(v.shape, g.shape)
    return torch.mul(v, g, out=torch.empty(shape, dtype=v.dtype, device=v.device))


def gained(v: Tensor, g: Tensor, bias: Tensor | None) -> Tensor:
    """``g * v + bias`` in ``v``'s dtype; gradients in the dtype of each."""
    if fused(v, g, bias):
        return _Gain.apply(v, g, bias)
    y = v * g
    return (y if bias is None else y + bias).to(v.dtype)


class _Gain(Function):
    @staticmethod
    def forward(ctx, v, g, bias):
        ctx.save_for_backward(v if ctx.needs_input_grad[1] else None, g)
        ctx.bias_dtype = None if bias is None else bias.dtype
        if bias is None:
            return scaled(v, g)
        if g.dtype == bias.dtype == v.dtype:
            return torch.addcmul(bias, v, g)
        return (v * g).add_(bias).to(v.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, G):
        v, g = ctx.saved_tensors
        need_v, need_g, need_bias = ctx.needs_input_grad
        dg = None
        if need_g:
            G2, v2 = G.reshape(-1, G.shape[-1]), v.reshape(-1, v.shape[-1])
            dg = torch.zeros(g.shape, device=g.device, dtype=torch.promote_types(g.dtype, torch.float32))
            run = max(1, _RUN // max(1, G2.shape[1])) if G.device.type == "cpu" else max(1, G2.shape[0])
            for start in range(0, G2.shape[0], run):
                rows = slice(start, start + run)
                dg += (G2[rows] * v2[rows]).sum(0, dtype=dg.dtype)
            dg = dg.to(g.dtype)
        dbias = G.reshape(-1, G.shape[-1]).sum(0).to(ctx.bias_dtype) if need_bias else None
        return scaled(G, g) if need_v else None, dg, dbias
