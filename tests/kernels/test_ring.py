"""Tensor-ring matrices: entries, Kronecker form, products, application core by core, structured factors (arXiv 2501.08727)."""

from __future__ import annotations

import math
from functools import reduce

import pytest
import torch
from torch import Tensor

from trimtab.kernels.ring import (
    collapse,
    even_shape,
    ring_apply,
    ring_factors,
    ring_gradients,
    ring_gram,
    ring_matrix,
    transposed,
)

D = torch.float64


def cores(rows: tuple[int, ...], columns: tuple[int, ...], rank: int, seed: int = 0) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(i, j, rank, rank, generator=rng, dtype=D) for i, j in zip(rows, columns, strict=True)]


def paper(shape: tuple[int, ...], rank: int) -> list[Tensor]:
    return [torch.eye(size, dtype=D)[:, :, None, None].expand(size, size, rank, rank) / rank for size in shape]


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_the_papers_start_is_the_identity(rank):
    T = ring_matrix(paper((2, 3, 4), rank))
    torch.testing.assert_close(T, torch.eye(24, dtype=D), atol=1e-15, rtol=1e-15)
    if rank != 3:  # 1/3 rounds
        assert torch.equal(T, torch.eye(24, dtype=D))


def test_an_entry_is_the_trace_of_a_product_row_major():
    A = cores((2, 3, 2), (2, 3, 2), 2)
    T = ring_matrix(A)
    row, column = (1 * 3 + 2) * 2 + 0, (0 * 3 + 1) * 2 + 1
    assert T[row, column].item() == pytest.approx((A[0][1, 0] @ A[1][2, 1] @ A[2][0, 1]).trace().item(), rel=1e-14)


def test_rank_one_is_a_kronecker_product():
    A = cores((2, 3, 4), (3, 2, 5), 1)
    torch.testing.assert_close(ring_matrix(A), reduce(torch.kron, [a[:, :, 0, 0] for a in A]))
    A = [torch.tensor(a, dtype=D)[:, :, None, None] for a in ([[1, 2], [0, 1]], [[1, 0], [3, 1]])]
    T = torch.tensor([[1, 0, 2, 0], [3, 1, 6, 2], [0, 0, 1, 0], [0, 0, 3, 1]], dtype=D)
    assert torch.equal(ring_matrix(A), T)
    assert ring_apply(torch.tensor([1, 0, 0, 1], dtype=D), A).tolist() == [1, 5, 0, 1]


@pytest.mark.parametrize("rank", [1, 2])
def test_the_product_of_two_rings_is_a_ring_of_squared_rank(rank):
    A, B = cores((2, 3, 2), (2, 3, 2), rank), cores((2, 3, 2), (2, 3, 2), rank, seed=1)
    torch.testing.assert_close(ring_matrix(ring_gram(A, B)), ring_matrix(A) @ ring_matrix(B).t())
    for d, core in enumerate(ring_gram(paper((2, 3, 2), rank), paper((2, 3, 2), rank))):
        want = torch.eye((2, 3, 2)[d], dtype=D)[:, :, None, None].expand_as(core) / rank**2
        torch.testing.assert_close(core, want)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(("rows", "columns"), [((2, 3, 4), (2, 3, 4)), ((2, 5), (3, 4)), ((2, 3, 2, 3), (3, 2, 2, 4))])
def test_core_by_core_is_the_dense_product(rank, rows, columns):
    A = cores(rows, columns, rank)
    T = ring_matrix(A)
    assert T.shape == (math.prod(rows), math.prod(columns))
    x = torch.randn(4, 5, math.prod(columns), dtype=D)
    y = ring_apply(x, A)
    assert y.shape == (4, 5, math.prod(rows))
    assert (y - x @ T.t()).abs().max() < 1e-13 * T.norm() * 10
    torch.testing.assert_close(ring_matrix(transposed(A)), T.t())
    assert ring_apply(x[:0], A).shape == (0, 5, math.prod(rows))


def test_gradients_of_the_application():
    A = [a.requires_grad_() for a in cores((2, 3, 2), (3, 2, 2), 2)]
    x = torch.randn(3, 12, dtype=D, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *A: ring_apply(x, A), (x, *A))


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(("rows", "columns"), [((2, 3, 4), (2, 3, 4)), ((2, 5), (3, 4)), ((2, 3, 2, 3), (3, 2, 2, 4))])
def test_written_out_gradients_are_autograds(rank, rows, columns):
    A = [a.requires_grad_() for a in cores(rows, columns, rank)]
    x = torch.randn(7, math.prod(columns), dtype=D, requires_grad=True)
    dy = torch.randn(7, math.prod(rows), dtype=D)
    want = torch.autograd.grad(x @ ring_matrix(A).t(), [x, *A], dy)
    dx, found = ring_gradients(x.detach(), [a.detach() for a in A], dy)
    for one, other in zip(want, (dx, *found), strict=True):
        torch.testing.assert_close(other, one)


def test_sums_over_tokens_are_float32_in_half_precision():
    A, x = [a.bfloat16() for a in cores((2, 3), (2, 3), 1)], torch.randn(9, 6).bfloat16()
    dx, found = ring_gradients(x, A, torch.randn(9, 6).bfloat16())
    assert dx.dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in found)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_ring_of_vectors_is_a_low_rank_product(rank):
    rng = torch.Generator().manual_seed(0)
    left = [torch.randn(j, rank, rank, generator=rng, dtype=D) for j in (2, 3)]
    right = [torch.randn(i, rank, rank, generator=rng, dtype=D) for i in (3, 2, 2)]
    B, A = ring_factors(left, right)
    assert (B.shape, A.shape) == ((6, rank**2), (rank**2, 12))
    want = torch.empty(6, 12, dtype=D)
    for o in range(6):
        for i in range(12):
            index = (o // 3, o % 3, i // 4, i // 2 % 2, i % 2)
            want[o, i] = reduce(torch.matmul, [core[k] for core, k in zip((*left, *right), index, strict=True)]).trace()
    torch.testing.assert_close(B @ A, want)


def test_ranks():
    rng = torch.Generator().manual_seed(0)
    left, right = ([torch.randn(4, 2, 2, generator=rng, dtype=D) for _ in range(3)] for _ in range(2))
    B, A = ring_factors(left, right)
    assert torch.linalg.matrix_rank(B @ A) == 4  # 64 x 64
    assert torch.linalg.matrix_rank(ring_matrix(cores((4, 4, 4), (4, 4, 4), 2))) == 64


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_collapse_of_equal_slices(rank):
    symmetric = [core.expand(*core.shape[:2], rank, rank) for core in cores((2, 3, 2), (2, 3, 2), 1)]
    collapsed = collapse(symmetric)
    assert all(core.shape[2:] == (1, 1) for core in collapsed)
    torch.testing.assert_close(ring_matrix(collapsed), ring_matrix(symmetric))
    if rank > 1:
        assert collapse(cores((2, 3), (2, 3), rank)) is None


def test_even_shapes():
    assert [even_shape(n, 3) for n in (640, 768, 1280, 2048, 512, 13)] == [
        (8, 8, 10), (8, 8, 12), (8, 10, 16), (8, 16, 16), (8, 8, 8), (1, 1, 13)
    ]  # fmt: skip
    assert even_shape(12, 2) == (3, 4) and even_shape(4096, 4) == (8, 8, 8, 8)
