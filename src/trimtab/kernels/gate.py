"""A factor on every unit of ``size`` neighbouring features: ``z = m * x``, m (units,), x (..., units * size); keeps ``z`` alone.

``z`` is what the next layer keeps anyway, so that a gate costs no memory. Backward: ``dx = m * dz`` and, with ``x = z / m``,
``dm = sum over tokens and a unit's features of dz * z, over m``: the division loses no more than the product was rounded by. Where
m is exactly zero, x cannot be had back and ``dm`` is zero: a unit that is off stays off.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from trimtab.kernels.gain import scaled
from trimtab.kernels.mode import fused

__all__ = ["gated"]

_RUN = 1 << 20  # entries a run: bounds the temporary


def gated(x: Tensor, m: Tensor, size: int) -> Tensor:
    """``x`` (..., units * size) times ``m`` (units,) unit by unit, in ``x``'s dtype; gradients in the dtype of each."""
    if fused(x, m):
        return _Gate.apply(x, m, size)
    return (x * m.repeat_interleave(size)).to(x.dtype)


class _Gate(Function):
    @staticmethod
    def forward(ctx, x, m, size):
        z = scaled(x, m.repeat_interleave(size))
        ctx.size = size
        ctx.save_for_backward(z if ctx.needs_input_grad[1] else None, m)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx, G):
        z, m = ctx.saved_tensors
        dm = None
        if ctx.needs_input_grad[1]:
            G2, z2 = G.reshape(-1, G.shape[-1]), z.reshape(-1, z.shape[-1])
            total = torch.zeros(z.shape[-1], device=m.device, dtype=torch.promote_types(m.dtype, torch.float32))
            run = max(1, _RUN // max(1, G2.shape[1])) if G.device.type == "cpu" else max(1, G2.shape[0])
            for start in range(0, G2.shape[0], run):
                rows = slice(start, start + run)
                total += (G2[rows] * z2[rows]).sum(0, dtype=total.dtype)
            total = total.view(-1, ctx.size).sum(1)
            dm = torch.where(m == 0, 0, total / m).to(m.dtype)
        return scaled(G, m.repeat_interleave(ctx.size)) if ctx.needs_input_grad[0] else None, dm, None
