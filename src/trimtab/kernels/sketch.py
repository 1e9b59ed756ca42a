"""One autograd function for a linear layer whose weights share few values.

``y = x W^T + bias`` with ``W[o, g s + j] = T[o, g, C[o, g, j]]``.

``W`` is looked up a run of rows at a time, in forward and again in backward, so that nothing of size out x in exists as floats::

    dx = sum over runs of dY_run W_run        dW_run = dY_run^T x        dT[o, g, c] = sum of dW[o, g s + j] where C[o, g, j] = c

The sum into the table is formed in float32; where deterministic algorithms are asked for, by one masked sum an entry instead of a
scattered addition, which on a CPU is deterministic anyway. Saved for backward: ``x`` in its own dtype and storage, and only if the
table learns; the packed codes and the table by reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from trimtab.kernels.codes import gather, unpack
from trimtab.kernels.mode import compute_dtype, fused, given

__all__ = ["dense_weight", "sketched", "to_table"]

_RUN = 1 << 21  # weights of a run: 512 rows of 4,096


def dense_weight(table: Tensor, codes: Tensor, bits: int) -> Tensor:
    """The weight by plain operations, differentiable in the table: (out, groups, 2^bits) and packed codes -> (out, in)."""
    index = unpack(codes, bits).view(*table.shape[:2], -1).long()
    return table.gather(-1, index).flatten(-2)


def sketched(x: Tensor, table: Tensor, codes: Tensor, bits: int, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias`` with ``x`` (..., in), in ``x``'s compute dtype.

    Args:
        table: (out, groups, 2^bits); may be wider than ``x``: it is cast for the look-up.
        codes: packed, (out, groups, s * bits / 8) uint8.
        bias: (out,).
    """
    dtype = compute_dtype(x)
    if fused(x, table, codes, bias):
        return _Sketched.apply(x, table, codes, bits, bias, dtype)
    return F.linear(x.to(dtype), dense_weight(table, codes, bits).to(dtype), None if bias is None else bias.to(dtype))


def to_table(dW: Tensor, codes: Tensor, bits: int) -> Tensor:
    """Sums of ``dW`` (rows, in) over equal codes of each group, ``(rows, groups, 2^bits)``, in float32 or wider."""
    rows, groups, _ = codes.shape
    size, wide = 1 << bits, torch.promote_types(dW.dtype, torch.float32)
    dW, found = dW.to(wide), unpack(codes, bits)
    if torch.are_deterministic_algorithms_enabled() and dW.device.type != "cpu":
        return _masked_sums(dW.view(found.shape), found, size)
    cells = torch.arange(rows * groups, dtype=torch.int32, device=dW.device).view(rows, groups, 1)
    index = (found + cells * size).view(-1)
    return dW.new_zeros(rows * groups * size).index_add_(0, index, dW.reshape(-1)).view(rows, groups, size)


def _masked_sums(dW: Tensor, found: Tensor, size: int) -> Tensor:
    """One sum a table entry, in an order that is always the same: (rows, groups, s) -> (rows, groups, size)."""
    return torch.stack([torch.where(found == c, dW, 0).sum(-1) for c in range(size)], -1)


def _runs(table: Tensor, codes: Tensor, bits: int) -> list[slice]:
    """Runs of output rows."""
    out, fan_in = table.shape[0], codes.shape[1] * codes.shape[2] * 8 // bits
    step = max(1, _RUN // max(1, fan_in))
    return [slice(start, min(start + step, out)) for start in range(0, out, step)]


class _Sketched(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, codes: Tensor, bits: int, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        y = flat.new_empty(flat.shape[0], table.shape[0])
        for rows in _runs(table, codes, bits):
            W = gather(table[rows].to(dtype), codes[rows], bits)
            if bias is None:
                torch.mm(flat, W.t(), out=y[:, rows])
            else:
                torch.addmm(bias[rows].to(dtype), flat, W.t(), out=y[:, rows])
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, table, codes)
        ctx.bits, ctx.dtype, ctx.shape, ctx.x_dtype = bits, dtype, x.shape, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return given(y, *x.shape[:-1], table.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, table, codes = ctx.saved_tensors
        needs_x, needs_table, _, _, needs_bias, _ = ctx.needs_input_grad
        dy = dy.reshape(-1, dy.shape[-1])
        gx = dy.new_zeros(dy.shape[0], ctx.shape[-1]) if needs_x else None
        gT = torch.empty_like(table) if needs_table else None
        if needs_table:
            x = x.reshape(-1, x.shape[-1]).to(ctx.dtype)
        for rows in _runs(table, codes, ctx.bits) if needs_x or needs_table else ():
            part = dy[:, rows]
            if needs_x:
                gx.addmm_(part, gather(table[rows].to(ctx.dtype), codes[rows], ctx.bits))
            if needs_table:
                gT[rows] = to_table(part.t() @ x, codes[rows], ctx.bits).to(gT.dtype)
        gx = None if gx is None else gx.view(ctx.shape).to(ctx.x_dtype)
        return gx, gT, None, None, dy.sum(0).to(ctx.bias_dtype) if needs_bias else None, None
