"""A linear place whose W is scaled block by block: ``y = x (EB * W * EA)^T``, W (out, in), a (r, in), b (r, out).

W falls into r x r blocks; block (c, k), rows of the c-th r-th of the outputs and columns of the k-th of the inputs, becomes
``diag(b[k, c]) W_ck diag(a[c, k])``. One function, two ways to run it:

- *tiles*: runs of output blocks of the scaled weight are made one after another, in forward and again in backward, where
  each gives ``dx += dy_c W'_c`` and ``G_c = dy_c^T x``, which is reduced to ``da[c]`` and ``db[:, c]`` at once: no whole weight
  and no whole gradient of it exist. Keeps ``x``. Three large products.
- *activations*: ``T_ck = (x_k * a[c, k]) W_ck^T``, ``y_c = sum_k b[k, c] * T_ck``; W is read as it is and two products of its size
  are enough, because T, (r, tokens, out), is kept; the price is r passes over the activations. For few blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trimtab.core.site import Operation, Site
from trimtab.kernels.gain import scaled
from trimtab.kernels.mode import compute_dtype, fused, given, if_learnt
from trimtab.kernels.rebuilt import readable

__all__ = ["block_scale", "blockscaled", "on_activations"]

_TILE = 1 << 20  # entries of the scaled weight that exist at once, at least one block of outputs
_LEAST = 64  # side of a block below which products on blocks are not worth it


def block_scale(W: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``EB * W * EA``: W (..., out, in), a (r, in), b (r, out); by differentiable operations."""
    r = len(a)
    blocks = W.unflatten(-1, (r, -1)).unflatten(-3, (r, -1))  # (..., c, out / r, k, in / r)
    return (blocks * a.view(r, 1, r, -1) * _outputs(b)).flatten(-2).flatten(-3, -2)


def _outputs(b: Tensor) -> Tensor:
    """b (r, out) beside blocks of W: (c, out / r, k, 1), a view."""
    return b.unflatten(-1, (len(b), -1)).permute(1, 2, 0)[..., None]


def on_activations(tokens: int, out: int, fan_in: int, r: int) -> bool:
    """Whether the form on activations is the faster one: r passes over them against a third product and eight passes over W.

    The weights (a multiply-add costs 1/128 of an entry moved) are fitted to widths 1024 and 2048 on a CPU.
    """
    moved, spared = 4 * r * tokens * (out + fan_in), out * fan_in * (tokens / 128 + 8)
    return min(out, fan_in) >= r * _LEAST and moved <= spared


def blockscaled(x: Tensor, base: Operation, a: Tensor, b: Tensor) -> Tensor | None:
    """``x (EB * W * EA)^T`` at a linear place, x (..., in), without the base's bias.

    None where only the plain operations are right: while compiling or mapping, and where W has a graph of its own.
    """
    if not fused(x, a, b):
        return None
    W, source = base.dense, None
    if W is None:
        source = readable(base)
        if source is None:
            return None
    elif W.requires_grad or not fused(W):
        return None
    rows = x.reshape(-1, x.shape[-1])
    form = _Activations if on_activations(len(rows), b.shape[1], a.shape[1], len(a)) else _Tiles
    return form.apply(source, compute_dtype(x), rows, W, a, b).view(*x.shape[:-1], -1)


def _blocks(W: Tensor | None, source: Site | None, r: int) -> Tensor:
    """W as (c, out / r, k, in / r), a view; read from ``source`` where none is given."""
    W = source.weight.detach() if W is None else W
    return W.unflatten(1, (r, -1)).unflatten(0, (r, -1))


class _Tiles(torch.autograd.Function):
    @staticmethod
    def runs(out: int, fan_in: int, r: int) -> Iterator[tuple[slice, slice]]:
        """Runs of output blocks of ``_TILE`` entries at most, or of one block; and their outputs."""
        step = max(1, _TILE * r // max(1, out * fan_in))
        for c in range(0, r, step):
            stop = min(r, c + step)
            yield slice(c, stop), slice(c * out // r, stop * out // r)

    @staticmethod
    def made(blocks: Tensor, a: Tensor, b: Tensor, run: slice, dtype: torch.dtype) -> Tensor:
        """The scaled weight's rows that belong to ``run``, (rows, in); formed in float32 or wider, as ``a`` is."""
        weight = blocks[run] * a.view(len(a), 1, len(a), -1)[run]
        return weight.mul_(_outputs(b)[run]).flatten(2).flatten(0, 1).to(dtype)

    @staticmethod
    def forward(ctx: Any, source: Site | None, dtype: torch.dtype, x: Tensor, W: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(if_learnt(x, ctx.needs_input_grad[4:]), W, a, b)
        ctx.source, ctx.dtype = source, dtype
        r, out = b.shape
        blocks, wide, x = _blocks(W, source, r), torch.promote_types(a.dtype, torch.float32), x.to(dtype)
        a, b = a.to(wide), b.to(wide)
        parts = [x @ _Tiles.made(blocks, a, b, run, dtype).t() for run, _ in _Tiles.runs(out, a.shape[1], r)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, W, *factors = ctx.saved_tensors
        needs_x, _, *needs = ctx.needs_input_grad[2:]
        (r, out), fan_in = factors[1].shape, x.shape[1]
        blocks, wide = _blocks(W, ctx.source, r), torch.promote_types(factors[0].dtype, torch.float32)
        a, b = (f.to(wide) for f in factors)
        x_, gx = x.to(ctx.dtype), torch.zeros_like(x, dtype=ctx.dtype) if needs_x else None
        ga, gb = a.new_empty(r, r, fan_in // r), b.new_empty(r, r, out // r)
        for run, rows in _Tiles.runs(out, fan_in, r):
            d = dy[:, rows]
            if needs_x:
                gx.addmm_(d, _Tiles.made(blocks, a, b, run, ctx.dtype))
            if any(needs):
                H = (d.t() @ x_).to(wide).view(-1, out // r, r, fan_in // r).mul_(blocks[run])
                ga[run] = torch.einsum("cjki,kcj->cki", H, b.view(r, r, -1)[:, run])
                gb[:, run] = torch.einsum("cjki,cki->kcj", H, a.view(r, r, -1)[run])
        grads = [g.view(f.shape).to(f.dtype) if need else None for g, f, need in zip((ga, gb), factors, needs, strict=True)]
        return None, None, gx.to(x.dtype) if needs_x else None, None, *grads


class _Activations(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, source: Site | None, dtype: torch.dtype, x: Tensor, W: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        r, out = b.shape
        blocks, X = _blocks(W, source, r), x.to(dtype).unflatten(1, (r, -1)).transpose(0, 1)  # (k, tokens, in / r)
        kept, y = x.new_empty(r, r, len(x), out // r, dtype=dtype), x.new_empty(len(x), r, out // r, dtype=dtype)
        for c in range(r):
            torch.bmm(scaled(X, a[c].view(r, 1, -1)), blocks[c].permute(1, 2, 0).to(dtype), out=kept[c])
            y[:, c] = (kept[c] * b.view(r, r, 1, -1)[:, c]).sum(0)
        kept = kept if ctx.needs_input_grad[5] else None
        ctx.save_for_backward(if_learnt(x, ctx.needs_input_grad[4:5]), W, a, b, kept)
        ctx.source, ctx.dtype = source, dtype
        return given(y, len(x), out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, W, a, b, kept = ctx.saved_tensors
        needs_x, _, needs_a, needs_b = ctx.needs_input_grad[2:]
        r, out = b.shape
        blocks, X = _blocks(W, ctx.source, r), x.to(ctx.dtype).unflatten(1, (r, -1)).transpose(0, 1)
        wide = torch.promote_types(a.dtype, torch.float32)
        gx = X.new_zeros(X.shape, dtype=torch.promote_types(ctx.dtype, a.dtype)) if needs_x else None
        ga, gb = a.new_empty(r, r, a.shape[1] // r), b.new_empty(r, r, out // r)
        for c in range(r):
            d = dy.unflatten(1, (r, -1))[:, c]
            if needs_b:
                gb[:, c] = (kept[c] * d).sum(1, dtype=wide)
            if needs_x or needs_a:
                Z = torch.bmm(scaled(d[None], b.view(r, r, 1, -1)[:, c]), blocks[c].transpose(0, 1).to(ctx.dtype))
            if needs_a:
                ga[c] = (Z * X).sum(1, dtype=wide)
            if needs_x:
                gx.addcmul_(Z.to(gx.dtype), a[c].view(r, 1, -1).to(gx.dtype))
        if needs_x:
            gx = gx.transpose(0, 1).flatten(1).to(x.dtype)
        return None, None, gx, None, ga.view(a.shape) if needs_a else None, gb.view(b.shape) if needs_b else None
