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
    """``T x`` for ``x`` (..., prod J_d): (..., prod I_d), by differentiable operations; tokens are adjacent in memory."""
    # by way of one axis: its gradient then is contiguous; torch.compile is wrong on the strides of a layer norm's otherwise
    flat = x.reshape(-1).view(math.prod(x.shape[:-1]), x.shape[-1])
    y = reduce(torch.add, (_opened(flat, cores, a) for a in range(cores[0].shape[2]))).t()
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], y.shape[1])


def _opened(x: Tensor, cores: Sequence[Tensor], a: int) -> Tensor:
    """``T x`` of the ring cut at the index ``a`` between its last and its first core: (prod I_d, tokens)."""
    tokens, batch = x.shape
    done, last = 1, len(cores) - 1
    # the last core reads x as it lies, as the transposed operand of its products: no copy of x
    h = x.reshape(tokens, batch // cores[last].shape[1], cores[last].shape[1]).permute(1, 2, 0)
    for d in range(last, -1, -1):
        core = cores[d][:, :, :, a : a + 1] if d == last else cores[d]
        core = core[:, :, a : a + 1] if d == 0 else core
        i, j, left, right = core.shape
        batch //= j
        matrix = core.permute(2, 0, 1, 3).reshape(left * i, j * right)
        # bmm, since matmul would fold the batch into a transposed copy where gradients flow
        h = torch.bmm(matrix.expand(batch, *matrix.shape), h.reshape(batch, j * right, done * tokens))
        done *= i
    return h.reshape(done, tokens)


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
