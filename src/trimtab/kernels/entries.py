"""A few single entries of a frozen matrix that learn: ``y = x (W + D)^T + bias``, D (out, in) zero but at n places.

``index`` (n,) holds the places as ``row * in + column``, each once, rows ascending; ``values`` (n,) what is added there. With many
tokens the sum is written into a scratch copy of W, once for the product of forward and once for ``dx = dY (W + D)`` of
backward; with few (generation) the entries act on the activations. The gradient of the values is read without
``dY^T x`` and without a product of their number squared::

    g_j = sum over tokens of dY[t, row_j] x[t, column_j]

Saved for backward: ``x`` in its own dtype; the index is asked for again. Milliseconds on one CPU core, width 1024, 1,024 tokens,
fp32, K entries a row (the frozen product takes 13.5, ``dY^T x`` the same, a copy of W 0.3):

=================================  ====  ====  ====  ====  ====
K                                     1     2     4     8    16
=================================  ====  ====  ====  ====  ====
writing the entries into the copy   0.1   0.1   0.1   0.1   0.2
g, columns gathered in runs         0.9   2.5   5.7  12.6  28.0
g, sampled product in runs          2.8   2.8   2.8   3.2   3.9
=================================  ====  ====  ====  ====  ====
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from trimtab.core.site import Operation
from trimtab.kernels.beside import Rule, beside
from trimtab.kernels.mode import compute_dtype, fused, given, if_learnt

__all__ = ["added", "entries", "entry_gradients"]

Places = Callable[[], Tensor]

_RUN = 1 << 16  # numbers of one run of gathered columns: they stay in the second-level cache
_COPY = 1 << 18  # numbers of one transposed copy
_ENTRY = 12  # an entry and token on activations takes as long as copying so many entries of W
_LARGE = 256  # ... and as long as so many multiply-adds of a large product
_SAMPLED = 16  # above a sixteenth of all places, the whole of dY^T x is as fast as the sampled product


def added(W: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """``W + D`` by plain operations: the definition. All other entries keep their value to the bit."""
    wide = torch.promote_types(W.dtype, values.dtype)
    return W.to(wide).flatten().index_add(0, index, values.to(wide)).view(W.shape)


def entries(x: Tensor, base: Operation, places: Places, values: Tensor) -> Tensor:
    """``base(x) + x D^T`` for a linear place, ``x`` of shape ``(..., in)``.

    Args:
        places: gives the index (n,).
        values: (n,).
    """
    W = base.dense
    if not fused(x, values):
        if W is None:
            return beside(_Entries(places, base.out_features), x, base, values)
        return base.apply(x, added(base.weight, places(), values))
    tokens = x.numel() // max(base.in_features, 1)
    few = tokens * values.numel() * _ENTRY < base.out_features * base.in_features
    if few or W is None or W.requires_grad or not fused(W):  # or quantised, adapted before, sharded, learning itself
        return beside(_Entries(places, base.out_features), x, base, values)
    return _Patched.apply(places, compute_dtype(x), x, W, base.bias, values)


def entry_gradients(dy: Tensor, x: Tensor, index: Tensor) -> Tensor:
    """``(dy^T x)`` at the places ``index``, (n,): ``dy`` (tokens, out), ``x`` (tokens, in), both of one dtype."""
    n, width = index.numel(), x.shape[1]
    rows, columns = index // width, index % width
    wide = torch.promote_types(x.dtype, torch.float32)
    if n <= 2 * max(dy.shape[1], width):
        found = torch.zeros(n, dtype=wide, device=x.device)
        step, one_each = max(1, _RUN // max(n, 1)), torch.equal(rows, torch.arange(dy.shape[1], device=rows.device))
        for start in range(0, x.shape[0], step):
            run = slice(start, start + step)
            dys = dy[run] if one_each else dy[run].index_select(1, rows)
            found += x[run].index_select(1, columns).to(wide).mul_(dys).sum(0)
        return found
    if n * _SAMPLED > dy.shape[1] * width or x.dtype not in (torch.float32, torch.float64) or x.device.type != "cpu":
        return (dy.t() @ x)[rows, columns].to(wide)
    return _sampled(dy, x, rows, columns)


def _sampled(dy: Tensor, x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The same by torch's sampled product, in runs of tokens: it works on transposed copies, which then stay small."""
    ends = F.pad(torch.bincount(rows, minlength=dy.shape[1]).cumsum(0), (1, 0))
    with warnings.catch_warnings():  # torch announces once that its compressed rows are in beta
        warnings.simplefilter("ignore", UserWarning)
        found = torch.sparse_csr_tensor(ends, columns, x.new_zeros(len(rows)), (dy.shape[1], x.shape[1]), check_invariants=False)
    step = max(1, _COPY // x.shape[1])
    for start in range(0, x.shape[0], step):
        run = slice(start, start + step)
        found = torch.sparse.sampled_addmm(found, dy[run].t(), x[run], beta=1.0 if start else 0.0)
    return found.values()


def _patched(W: Tensor, index: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of W in ``dtype`` with the entries added; their sum is formed in the wider of W's dtype and the values'."""
    wide = torch.promote_types(W.dtype, values.dtype)
    places = index // W.shape[1], index % W.shape[1]
    # not put_, which deterministic mode refuses
    return W.to(dtype, copy=True).index_put_(places, (W[places].to(wide) + values).to(dtype))


class _Patched(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, places: Places, dtype: torch.dtype, x: Tensor, W: Tensor, bias: Tensor | None, values: Tensor) -> Tensor:
        ctx.save_for_backward(if_learnt(x, ctx.needs_input_grad[5:]), W, values)
        ctx.places, ctx.dtype, ctx.bias_dtype = places, dtype, None if bias is None else bias.dtype
        y = F.linear(x.to(dtype), _patched(W, places(), values, dtype), None if bias is None else bias.to(dtype))
        return given(y, *y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, W, values = ctx.saved_tensors
        _, _, needs_x, _, needs_bias, needs_values = ctx.needs_input_grad
        flat, index = dy.reshape(-1, dy.shape[-1]), ctx.places()
        gx = (flat @ _patched(W, index, values, ctx.dtype)).view(x.shape).to(x.dtype) if needs_x else None
        gv = None
        if needs_values:
            gv = entry_gradients(flat, x.reshape(-1, x.shape[-1]).to(ctx.dtype), index).to(values.dtype)
        gb = flat.sum(0).to(ctx.bias_dtype) if needs_bias else None
        return None, None, gx, None, gb, gv


class _Entries(Rule):
    """The entries on activations: gathered columns, or a dense D where that is cheaper. Parameter: ``values`` (n,)."""

    def __init__(self, places: Places, out: int):
        self.places, self.out = places, out

    def map(self, x: Tensor, values: Tensor) -> Tensor:
        return x @ added(values.new_zeros(self.out, x.shape[-1]), self.places(), values).transpose(-1, -2)

    def add_(self, y: Tensor, x: Tensor, kept: Tensor | None, values: Tensor) -> None:
        index, width = self.places(), x.shape[1]
        if self._many(values, width):
            y.addmm_(x, self._dense(index, values, width).t())
        else:
            _spread(y, x, values, index // width, index % width)

    def pull(self, dy: Tensor, x: Tensor, gx: Tensor | None, needs: Sequence[bool], values: Tensor) -> tuple[Tensor | None, ...]:
        index, width = self.places(), x.shape[1]
        if gx is not None and self._many(values, width):
            gx.addmm_(dy, self._dense(index, values, width))
        elif gx is not None:
            _spread(gx, dy, values, index % width, index // width)
        return (entry_gradients(dy, x, index) if needs[0] else None,)

    def _many(self, values: Tensor, width: int) -> bool:
        return values.numel() * _LARGE > self.out * width

    def _dense(self, index: Tensor, values: Tensor, width: int) -> Tensor:
        return values.new_zeros(self.out * width).index_copy_(0, index, values).view(self.out, width)


def _spread(to: Tensor, source: Tensor, values: Tensor, into: Tensor, of: Tensor) -> None:
    """``to[:, into_j] += values_j source[:, of_j]`` for all j."""
    step = max(1, _RUN // max(values.numel(), 1))
    for start in range(0, to.shape[0], step):
        run = slice(start, start + step)
        to[run].index_add_(1, into, source[run].index_select(1, of) * values)
