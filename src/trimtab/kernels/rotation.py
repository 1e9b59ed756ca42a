"""Rotations of activations by small orthogonal blocks (OFT, BOFT): ``x -> x R`` without a weight-sized or dense rotation.

``R`` is a product of factors ``B_{m-1} ... B_0``; factor i is block-diagonal after a fixed shuffle: within groups of 2^(i+1) half
blocks, half block k of the first half is paired with half block k of the second (factor 0: neighbours, so no shuffle).
The shuffle is a strided view of the activation, never an index or a permutation matrix.

Cayley, in one sign convention for both forms: ``R = (I - Q)(I + Q)^{-1}`` with ``Q`` skew, hence ``R R^T = I`` exactly; cut after
its Neumann series (OFTv2, arXiv 2506.19847) ``I - 2Q + 2Q^2 - ... +- Q^K``, whose distance from the exact map is ``||Q||^K``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from trimtab.kernels.mode import compute_dtype, fused

__all__ = ["Blocks", "cayley", "dense_rotation", "neumann", "rotate", "skew", "turn"]


def skew(vector: Tensor, size: int) -> Tensor:
    """Skew matrices (n, size, size) from their strict upper triangles, row by row, (n, size (size - 1) / 2)."""
    index = torch.zeros(size, size, dtype=torch.long, device=vector.device)
    rows, columns = torch.triu_indices(size, size, 1, device=vector.device)
    index[rows, columns] = torch.arange(1, len(rows) + 1, device=vector.device)
    upper = F.pad(vector, (1, 0))[..., index]  # entry 0, a zero, fills the rest
    return upper - upper.transpose(-1, -2)


def cayley(Q: Tensor) -> Tensor:
    """``(I - Q)(I + Q)^{-1} = 2 (I + Q)^{-1} - I``, batched; ``I + Q`` is never singular for skew ``Q``."""
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    return 2 * torch.linalg.inv(eye + Q) - eye


def neumann(Q: Tensor, terms: int) -> Tensor:
    """``(I + P)(I + P + ... + P^(terms - 2))`` with ``P = -Q``: Cayley's map without an inverse, for small ``Q``."""
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    total = eye - Q  # Horner: I + P (I + P (...))
    for _ in range(terms - 3):
        total = eye - Q @ total
    return total - Q @ total


class Blocks:
    """How a method makes its orthogonal blocks ``(factors, blocks or 1, size, size)`` from its parameters."""

    def blocks(self, *params: Tensor) -> Tensor:
        """By differentiable operations, in the parameters' dtype (at least float32)."""
        raise NotImplementedError


def rotate(x: Tensor, maker: Blocks, *params: Tensor) -> Tensor:
    """``x R`` for ``x`` (..., width); keeps ``x`` alone and makes the blocks again in backward."""
    dtype = compute_dtype(x)
    if fused(x, *params):
        return _Rotate.apply(maker, dtype, x, *params)
    flat, R = x.reshape(-1, x.shape[-1]).to(dtype), maker.blocks(*params).to(dtype)
    for level in reversed(range(R.shape[0])):
        flat = turn(flat, R[level], level)
    return flat.reshape(x.shape)


def dense_rotation(W: Tensor, R: Tensor) -> Tensor:
    """``W R^T``: the weight whose layer maps ``x`` as ``W`` maps ``x R``; in the wider dtype of the two."""
    dtype = torch.promote_types(W.dtype, R.dtype)
    W, R = W.to(dtype), R.to(dtype)
    for level in range(R.shape[0]):
        W = turn(W, R[level].transpose(-1, -2), level)
    return W


def turn(x: Tensor, R: Tensor, level: int) -> Tensor:
    """``x B`` for one factor: ``x`` (n, width), ``R`` (blocks or 1, size, size)."""
    size = R.shape[-1]
    if level == 0 and R.shape[0] == 1:
        return (x.reshape(-1, size) @ R[0]).reshape(x.shape)
    return _join(torch.bmm(_split(x, size, level), R), level)


def _split(x: Tensor, size: int, level: int) -> Tensor:
    """``(n, width) -> (blocks, n, size)``, the factor's shuffle done; a view at level 0."""
    if level == 0:
        return x.unflatten(1, (-1, size)).transpose(0, 1)
    pairs = 2**level
    halves = x.reshape(x.shape[0], -1, 2, pairs, size // 2)  # (n, group, half, pair, entry)
    return halves.permute(1, 3, 0, 2, 4).reshape(-1, x.shape[0], size)


def _join(blocks: Tensor, level: int) -> Tensor:
    """Inverse of ``_split``: ``(blocks, n, size) -> (n, width)``."""
    count, n, size = blocks.shape
    if level == 0:
        return blocks.transpose(0, 1).reshape(n, count * size)
    pairs = 2**level
    halves = blocks.reshape(count // pairs, pairs, n, 2, size // 2)
    return halves.permute(2, 0, 3, 1, 4).reshape(n, count * size)


def _block_gradient(x: Tensor, g: Tensor, R: Tensor, level: int) -> Tensor:
    """Gradient of ``turn``'s blocks: ``x^T g``, block by block."""
    size = R.shape[-1]
    if R.shape[0] == 1 and level == 0:
        return (x.view(-1, size).t() @ g.view(-1, size))[None]
    return torch.bmm(_split(x, size, level).transpose(1, 2), _split(g, size, level))


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maker: Blocks, dtype: torch.dtype, x: Tensor, *params: Tensor) -> Tensor:
        ctx.save_for_backward(x, *params)
        ctx.maker, ctx.dtype = maker, dtype
        flat, R = x.reshape(-1, x.shape[-1]).to(dtype), maker.blocks(*params).to(dtype)
        for level in reversed(range(R.shape[0])):
            flat = turn(flat, R[level], level)
        return flat.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, *params = ctx.saved_tensors
        _, _, needs_x, *needs = ctx.needs_input_grad
        learn = any(needs)
        with torch.enable_grad():  # the blocks again, with a graph of their own small size
            leaves = [p.detach().requires_grad_(need) for p, need in zip(params, needs, strict=True)]
            made = ctx.maker.blocks(*leaves)
        R = made.detach().to(ctx.dtype)
        inputs = {R.shape[0] - 1: x.reshape(-1, x.shape[-1]).to(ctx.dtype).contiguous()}
        if learn:
            for level in reversed(range(1, R.shape[0])):
                inputs[level - 1] = turn(inputs[level], R[level], level)
        g = g.reshape(-1, g.shape[-1]).to(ctx.dtype).contiguous()
        gR = torch.empty_like(R) if learn else None
        for level in range(R.shape[0]):
            if learn:
                gR[level] = _block_gradient(inputs.pop(level), g, R[level], level)
            if needs_x or level + 1 < R.shape[0]:
                g = turn(g, R[level].transpose(-1, -2), level)
        grads: list[Tensor | None] = [None] * len(params)
        if learn:
            chosen = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
            found = iter(torch.autograd.grad(made, chosen, gR.to(made.dtype)))
            grads = [next(found) if need else None for need in needs]
        return None, None, g.view(x.shape).to(x.dtype) if needs_x else None, *grads
