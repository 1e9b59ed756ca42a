"""Tensor-ring matrices: ``T[(i_1..i_D), (j_1..j_D)] = trace(A^1[i_1, j_1] ... A^D[i_D, j_D])``, cores ``A^d`` (I_d, J_d, R, R).

The first core's index is the most significant one. With R = 1 it is the Kronecker product of the cores. On activations the
cores are applied one by one, the last first and with tokens last: every core then is one batched product with many columns,
the open end of the ring stands beside the index that is contracted next, and nothing is permuted in between. Cost a
token: ``I_1 R^2``, ``I_d R^3`` for the cores between, ``I_D R^2``, each times the width. Source: arXiv 2501.08727, Sec. 3
(there little-endian).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, reduce

import torch
from torch import Tensor

__all__ = [
    "collapse", "even_shape", "ring_apply", "ring_factors", "ring_gradients", "ring_gram", "ring_matrix", "transposed",
]  # fmt: skip


def ring_matrix(cores: Sequence[Tensor]) -> Tensor:
    """The dense matrix, (prod I_d, prod J_d): the definition."""
    whole = cores[0]
    for core in cores[1:]:
        whole = torch.einsum("ijab,klbc->ikjlac", whole, core).flatten(0, 1).flatten(1, 2)
    return whole.diagonal(dim1=-2, dim2=-1).sum(-1)


def transposed(cores: Sequence[Tensor]) -> list[Tensor]:
    """The cores of the transposed matrix."""
    return [core.transpose(0, 1) for core in cores]


def ring_apply(x: Tensor, cores: Sequence[Tensor]) -> Tensor:
    """``T x`` for ``x`` (..., prod J_d): (..., prod I_d), by differentiable operations; tokens are adjacent in memory."""
    # by way of one axis: its gradient then is contiguous; torch.compile is wrong on the strides of a layer norm's otherwise
    flat = x.reshape(-1).view(math.prod(x.shape[:-1]), x.shape[-1])
    width = math.prod(core.shape[0] for core in cores)
    y = reduce(torch.add, (_product(*_stages(flat, parts)[-1]).reshape(width, len(flat)) for parts in _cuts(cores))).t()
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], y.shape[1])


def ring_gradients(x: Tensor, cores: Sequence[Tensor], dy: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Gradients of ``x`` (tokens, prod J_d) and of the cores, from ``dy`` (tokens, prod I_d) of ``T x``; no graph.

    With ``h_D = x`` and ``h_{d-1} = A^d h_d``: ``dA^d = sum g_{d-1} h_d^T`` and ``g_d = (A^d)^T g_{d-1}``; the last product of
    all, ``h_0 = T x``, is not made again. Sums over tokens are at least float32.
    """
    end, dx = dy.t().contiguous(), None
    sums = [torch.zeros_like(core, dtype=torch.promote_types(core.dtype, torch.float32)) for core in cores]
    for into, parts in zip(_cuts(sums), _cuts(cores), strict=True):
        g = end
        for total, (matrix, h) in zip(into, reversed(_stages(x, parts)), strict=True):
            i, j, left, right = total.shape
            g = g.reshape(h.shape[0], left * i, h.shape[2])
            total += torch.bmm(g, h.transpose(1, 2)).sum(0, dtype=total.dtype).view(left, i, j, right).permute(1, 2, 0, 3)
            g = _product(matrix.t(), g)
        g = g.view(x.shape[1], x.shape[0])
        dx = g if dx is None else dx.add_(g)
    return dx.t(), sums


def _cuts(cores: Sequence[Tensor]) -> list[list[Tensor]]:
    """The ring opened before its first core at each of the R values of the index there: ``T`` is the sum of these chains."""
    cuts = []
    for a in range(cores[0].shape[2]):
        parts = list(cores)
        parts[-1] = parts[-1][:, :, :, a : a + 1]
        parts[0] = parts[0][:, :, a : a + 1]
        cuts.append(parts)
    return cuts


def _stages(x: Tensor, parts: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Each core of a chain, the last one first: its matrix (left I, J right), and what that acts on (batch, J right, columns)."""
    tokens, batch = x.shape
    size, columns = parts[-1].shape[1], tokens
    # the last core reads x as it lies, as the transposed operand of its products: no copy of x
    h, stages = x.reshape(tokens, batch // size, size).permute(1, 2, 0), []
    for part in reversed(parts):
        i, j, left, right = part.shape
        batch //= j
        h = (_product(*stages[-1]) if stages else h).reshape(batch, j * right, columns)
        stages.append((part.permute(2, 0, 1, 3).reshape(left * i, j * right), h))
        columns *= i
    return stages


def _product(matrix: Tensor, h: Tensor) -> Tensor:
    # bmm, since matmul would fold the batch into a transposed copy where gradients flow
    return torch.bmm(matrix.expand(h.shape[0], *matrix.shape), h)


def ring_factors(left: Sequence[Tensor], right: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """``(B, A)``, (out, R^2) and (R^2, in), of ``(B A)[o, i] = trace(left[o] right[i])`` for cores (J_d, R, R) and (I_d, R, R)."""
    b, a = _chain(left), _chain(right)
    return b.flatten(1), a.transpose(1, 2).flatten(1).t()


def _chain(cores: Sequence[Tensor]) -> Tensor:
    """``core^1[i_1] core^2[i_2] ...`` for every index: (prod I_d, R, R)."""
    whole = cores[0]
    for core in cores[1:]:
        whole = (whole[:, None] @ core).flatten(0, 1)
    return whole


def ring_gram(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[Tensor]:
    """The cores, of rank R^2, of ``T_a T_b^T``: ``C^d[i, j] = sum_l A^d[i, l] (x) B^d[j, l]`` (Prop. 2)."""
    return [torch.einsum("ilab,jlcd->ijacbd", p, q).flatten(2, 3).flatten(3, 4) for p, q in zip(a, b, strict=True)]


def collapse(cores: Sequence[Tensor]) -> list[Tensor] | None:
    """Cores of rank 1 of the same matrix if all slices ``[:, :, r, r']`` of each core are equal up to rounding; else None.

    Equal slices get equal gradients, which some processors' products round differently: after training they may differ in the
    last digits.
    """
    if any(not torch.allclose(core, core[:, :, :1, :1].expand_as(core), rtol=1e-4, atol=1e-6) for core in cores):
        return None
    return [core.mean((2, 3), keepdim=True) * core.shape[-1] for core in cores]


@cache
def even_shape(width: int, order: int) -> tuple[int, ...]:
    """The ``order`` factors of ``width`` with the least sum, rising."""
    if order == 1:
        return (width,)
    heads = (d for d in range(1, int(width ** (1 / order) + 1e-9) + 1) if width % d == 0)
    return min(((d, *even_shape(width // d, order - 1)) for d in heads), key=lambda shape: (sum(shape), shape))
