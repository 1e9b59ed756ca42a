"""Rotations of activations by small orthogonal blocks (OFT, BOFT): ``x -> x R`` without a weight-sized or dense rotation.

``R`` is a product of factors ``B_{m-1} ... B_0``; factor i is block-diagonal after a fixed shuffle: within groups of 2^(i+1) half
blocks, half block k of the first half is paired with half block k of the second (factor 0: neighbours, so no shuffle).
The shuffle is a strided view of the activation, never an index or a permutation matrix.

Cayley, in one sign convention for both forms: ``R = (I - Q)(I + Q)^{-1}`` with ``Q`` skew, hence ``R R^T = I`` exactly; cut after
its Neumann series (OFTv2, arXiv 2506.19847) ``I - 2Q + 2Q^2 - ... +- Q^K``, whose distance from the exact map is ``||Q||^K``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from trimtab.core.site import Operation
from trimtab.kernels.mode import compute_dtype, fused, given, if_learnt

__all__ = [
    "Blocks", "BoundedBlocks", "CayleyBlocks", "TriangleBlocks", "cayley", "dense_rotation", "neumann", "rotate",
    "rotated_linear", "skew", "turn",
]  # fmt: skip


def skew(vector: Tensor, size: int) -> Tensor:
    """Skew matrices (n, size, size) from their strict upper triangles, row by row, (n, size (size - 1) / 2)."""
    rows, columns = torch.triu_indices(size, size, 1, device=vector.device)
    flat = torch.zeros(*vector.shape[:-1], size * size, dtype=vector.dtype, device=vector.device)
    upper = flat.index_copy(-1, rows * size + columns, vector).unflatten(-1, (size, size))
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


_RUN = 1 << 20  # entries of one run of rows: shorter runs cost more in starting threads than they gain in the cache
Pull = Callable[[Tensor], "list[Tensor | None]"]


class Blocks:
    """How a method makes its orthogonal blocks ``(factors, blocks or 1, size, size)`` from its parameters."""

    def blocks(self, *params: Tensor) -> Tensor:
        """By differentiable operations, in the parameters' dtype (at least float32)."""
        raise NotImplementedError

    def remake(self, needs: Sequence[bool], *params: Tensor) -> tuple[Tensor, Pull]:
        """The blocks again, without a graph, and the map from their gradient to the parameters': here by autograd."""
        with torch.enable_grad():  # a graph of the blocks' small size, freed when backward ends
            leaves = [p.detach().requires_grad_(need) for p, need in zip(params, needs, strict=True)]
            made = self.blocks(*leaves)

        def pull(g: Tensor) -> list[Tensor | None]:
            found = iter(torch.autograd.grad(made, [leaf for leaf in leaves if leaf.requires_grad], g))
            return [next(found) if need else None for need in needs]

        return made.detach(), pull


class CayleyBlocks(Blocks):
    """Exact blocks of one parameter. With ``M = (I + Q)^{-1}``: ``R = 2M - I`` and ``dL/dQ = -2 M^T (dL/dR) M^T``."""

    def skew(self, parameter: Tensor) -> Tensor:
        """``Q`` (factors, blocks or 1, size, size)."""
        raise NotImplementedError

    def skew_gradient(self, g: Tensor) -> Tensor:
        """The parameter's gradient from ``g - g^T`` with ``g = dL/dQ``."""
        raise NotImplementedError

    def blocks(self, parameter: Tensor) -> Tensor:
        return cayley(self.skew(parameter))

    def remake(self, needs: Sequence[bool], parameter: Tensor) -> tuple[Tensor, Pull]:
        R = self.blocks(parameter)

        def pull(g: Tensor) -> list[Tensor | None]:
            eye = torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)
            M = (0.5 * (R + eye)).transpose(-1, -2)
            g = M @ g @ M
            return [self.skew_gradient((g - g.transpose(-1, -2)).mul_(-2))]

        return R, pull


@dataclass(frozen=True)
class TriangleBlocks(CayleyBlocks):
    """Exact blocks of side ``size`` from strict upper triangles (n, size (size - 1) / 2); one factor."""

    size: int

    def skew(self, vector: Tensor) -> Tensor:
        return skew(vector.to(torch.promote_types(vector.dtype, torch.float32)), self.size)[None]

    def skew_gradient(self, g: Tensor) -> Tensor:
        rows, columns = torch.triu_indices(self.size, self.size, 1, device=g.device)
        return g[0].flatten(1).index_select(1, rows * self.size + columns)


@dataclass(frozen=True)
class BoundedBlocks(Blocks):
    """As ``TriangleBlocks``, with every ``Q`` kept within a ball of ``eps / sqrt(n)`` (COFT), or by Neumann's series, or both."""

    size: int
    terms: int | None
    eps: float | None

    def blocks(self, vector: Tensor) -> Tensor:
        Q = skew(vector.to(torch.promote_types(vector.dtype, torch.float32)), self.size)
        if self.eps is not None:
            limit = self.eps / math.sqrt(vector.shape[0])
            Q = Q * (limit / Q.flatten(1).norm(dim=1).clamp_min(limit))[:, None, None]
        return (cayley(Q) if self.terms is None else neumann(Q, self.terms))[None]


def rotate(x: Tensor, maker: Blocks, *params: Tensor) -> Tensor:
    """``x R`` for ``x`` (..., width); keeps ``x`` alone and makes the blocks again in backward."""
    dtype = compute_dtype(x)
    if fused(x, *params):
        return _Rotate.apply(maker, dtype, x, None, None, *params)
    flat, R = x.reshape(-1, x.shape[-1]).to(dtype), maker.blocks(*params).to(dtype)
    for level in reversed(range(R.shape[0])):
        flat = turn(flat, R[level], level)
    return flat.reshape(x.shape)


def rotated_linear(x: Tensor, base: Operation, maker: Blocks, *params: Tensor, bias: bool = True) -> Tensor:
    """``base(x R)`` for a linear place, with or without the base's bias; fused with a dense frozen base."""
    W = base.dense
    if W is None or W.requires_grad or not fused(x, W, *params):
        z = rotate(x, maker, *params)
        return base(z) if bias else base.matmul(z)
    return _Rotate.apply(maker, compute_dtype(x), x, W, base.bias if bias else None, *params)


def dense_rotation(W: Tensor, R: Tensor) -> Tensor:
    """``W R^T``: the weight whose layer maps ``x`` as ``W`` maps ``x R``; in the wider dtype of the two."""
    dtype = torch.promote_types(W.dtype, R.dtype)
    W, R = W.to(dtype), R.to(dtype)
    for level in range(R.shape[0]):
        W = turn(W, R[level].transpose(-1, -2), level)
    return W


def turn(x: Tensor, R: Tensor, level: int, into: Tensor | None = None) -> Tensor:
    """``x B`` for one factor: ``x`` (n, width), ``R`` (blocks or 1, size, size); written to ``into`` (may be ``x``) if given."""
    n, size = x.shape[0], R.shape[-1]
    if R.shape[0] == 1 and level == 0:
        return (x.reshape(-1, size) @ R[0]).reshape(x.shape)
    if into is None:
        blocks = _shuffled(x, size, level)
        turned = torch.bmm(_batched(blocks), R).view(blocks.shape)
        return turned.permute(2, 0, 3, 1, 4).reshape(x.shape)
    run = n if x.is_cuda else max(64, _RUN // x.shape[1])
    for start in range(0, n, run):  # products come out block by block; runs bound the buffer that is then moved
        blocks = _shuffled(x[start : start + run], size, level)
        turned = torch.bmm(_batched(blocks), R)
        _shuffled(into[start : start + run], size, level).copy_(turned.view(blocks.shape))
    return into


def _shuffled(x: Tensor, size: int, level: int) -> Tensor:
    """A view of ``x`` (n, width) in the factor's order: (group, pair, n, half, entry), ``group * pair`` counting its blocks."""
    halves = (2, 2**level, size // 2) if level else (1, 1, size)  # neighbours need no halves, and blocks may be odd
    return x.unflatten(1, (-1, *halves)).permute(1, 3, 0, 2, 4)


def _batched(blocks: Tensor) -> Tensor:
    """(group, pair, n, half, entry) -> (blocks, n, size); a view at level 0."""
    return blocks.flatten(3, 4).flatten(0, 1)


def _block_gradient(x: Tensor, g: Tensor, R: Tensor, level: int) -> Tensor:
    """Gradient of ``turn``'s blocks: ``x^T g``, block by block."""
    size = R.shape[-1]
    if R.shape[0] == 1 and level == 0:
        return (x.view(-1, size).t() @ g.view(-1, size))[None]
    x, g = (_batched(_shuffled(t, size, level)) for t in (x, g))
    return torch.bmm(x.transpose(1, 2), g)


class _Rotate(torch.autograd.Function):
    """``x R`` if ``W`` is None, else ``(x R) W^T + bias``."""

    @staticmethod
    def forward(
        ctx: Any, maker: Blocks, dtype: torch.dtype, x: Tensor, W: Tensor | None, bias: Tensor | None, *params: Tensor
    ) -> Tensor:
        ctx.save_for_backward(if_learnt(x, ctx.needs_input_grad[5:]), W, *params)
        ctx.maker, ctx.dtype, ctx.bias_dtype = maker, dtype, None if bias is None else bias.dtype
        flat, R = x.reshape(-1, x.shape[-1]).to(dtype), maker.blocks(*params).to(dtype)
        flat = flat.contiguous()
        y = torch.empty_like(flat)
        for level in reversed(range(R.shape[0])):
            flat = y = turn(flat, R[level], level, into=y)
        if W is not None:
            y = F.linear(y, W.to(dtype), None if bias is None else bias.to(dtype))
        return given(y, *x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, W, *params = ctx.saved_tensors
        _, _, needs_x, _, needs_bias, *needs = ctx.needs_input_grad
        learn = any(needs)
        dy = dy.reshape(-1, dy.shape[-1]).to(ctx.dtype).contiguous()
        g = dy if W is None else dy @ W.to(ctx.dtype)
        made, pull = ctx.maker.remake(needs, *params)
        R = made.to(ctx.dtype)
        x2 = x.reshape(-1, x.shape[-1])
        x2 = x2.to(ctx.dtype).contiguous() if learn else x2
        inputs = {R.shape[0] - 1: x2}
        if learn:
            for level in reversed(range(1, R.shape[0])):
                inputs[level - 1] = turn(inputs[level], R[level], level, into=torch.empty_like(inputs[level]))
        gR = torch.empty_like(R) if learn else None
        for level in range(R.shape[0]):
            if learn:
                gR[level] = _block_gradient(inputs.pop(level), g, R[level], level)
            if needs_x or level + 1 < R.shape[0]:
                g = turn(g, R[level].transpose(-1, -2), level, into=torch.empty_like(g) if g is dy else g)
        gx = g.view(x.shape).to(x.dtype) if needs_x else None
        gb = dy.sum(0).to(ctx.bias_dtype) if needs_bias else None
        grads: list[Tensor | None] = [None] * len(params)
        if learn:
            grads = [g if g is None else g.to(p.dtype) for g, p in zip(pull(gR.to(made.dtype)), params, strict=True)]
        return None, None, gx, None, gb, *grads
