"""Tensor-ring matrices: ``T[(i_1..i_D), (j_1..j_D)] = trace(A^1[i_1, j_1] ... A^D[i_D, j_D])``, cores ``A^d`` (I_d, J_d, R, R).

The first core's index is the most significant one. With R = 1 it is the Kronecker product of the cores. On activations the
cores are applied one by one, tokens last: every core then is one batched product with many columns, the open ends of
the ring stand beside the index that is contracted next, and nothing is permuted in between. Cost a token: ``I_1 R^2``,
``I_d R^3`` for the cores between, ``I_D R^2``, each times the width. Source: arXiv 2501.08727, Sec. 3 (there little-endian).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

__all__ = ["collapse", "even_shape", "ring_apply", "ring_factors", "ring_gram", "ring_matrix", "transposed"]


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
    """``T x`` for ``x`` (..., prod J_d): (..., prod I_d), by differentiable operations. At least two cores."""
    *lead, width = x.shape
    tokens = math.prod(lead)
    first, *inner, last = cores
    i, j, r, _ = first.shape
    columns = width // j * tokens
    # (ring end a, i_1, running end b) x j_1
    h = first.permute(2, 0, 3, 1).reshape(r * i * r, j) @ x.reshape(tokens, width).t().reshape(j, columns)
    batch = r * i
    for core in inner:
        i, j, r, _ = core.shape
        columns //= j
        h = _batched(core.permute(0, 3, 2, 1).reshape(i * r, r * j), h.reshape(batch, r * j, columns))
        batch *= i
    i, j, r, _ = last.shape
    ends = h.reshape(r, batch // r, r * j, tokens)
    matrices = last.permute(3, 0, 2, 1).reshape(r, i, r * j)
    y = _batched(matrices[0], ends[0])
    for a in range(1, r):
        y = y + _batched(matrices[a], ends[a])
    return y.reshape(batch // r * i, tokens).t().reshape(*lead, batch // r * i)


def _batched(matrix: Tensor, h: Tensor) -> Tensor:
    """``matrix @ h[b]`` for every b; bmm, since matmul would fold the batch into a transposed copy where gradients flow."""
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
    """Cores of rank 1 of the same matrix if all slices ``[:, :, r, r']`` of each core are equal; else None."""
    if any(not torch.equal(core, core[:, :, :1, :1].expand_as(core)) for core in cores):
        return None
    return [core[:, :, :1, :1] * core.shape[-1] for core in cores]


@cache
def even_shape(width: int, order: int) -> tuple[int, ...]:
    """The ``order`` factors of ``width`` with the least sum, rising."""
    if order == 1:
        return (width,)
    heads = (d for d in range(1, int(width ** (1 / order) + 1e-9) + 1) if width % d == 0)
    return min(((d, *even_shape(width // d, order - 1)) for d in heads), key=lambda shape: (sum(shape), shape))
