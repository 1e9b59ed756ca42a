"""Learning entries of a frozen matrix, and the largest entries of many tensors: against plain dense and sorted forms."""

from __future__ import annotations

import pytest
import torch
from dense_base import DenseBase, kept_bytes
from torch import Tensor

from trimtab.kernels import entries as kernel
from trimtab.kernels.entries import added, entries, entry_gradients
from trimtab.kernels.ranking import bisect, most

D = torch.float64


def places(out: int, width: int, n: int, seed: int = 0) -> Tensor:
    return torch.randperm(out * width, generator=torch.Generator().manual_seed(seed))[:n].sort().values


@pytest.mark.parametrize("n", [0, 1, 5, 40, 96])
@pytest.mark.parametrize("dtype", [D, torch.float32, torch.bfloat16])
def test_gradients_are_the_entries_of_the_dense_product(n, dtype):
    """Few entries through gathered columns, many (40, 96 of 96) through the whole product."""
    torch.manual_seed(0)
    dy, x, index = torch.randn(30, 8, dtype=dtype), torch.randn(30, 12, dtype=dtype), places(8, 12, n)
    want = (dy.double().t() @ x.double()).take(index)
    tolerance = {D: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    torch.testing.assert_close(entry_gradients(dy, x, index).double(), want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [D, torch.float32, torch.bfloat16])
def test_the_sampled_product_takes_columns_in_any_order(dtype):
    """Rows ascend; the columns of a row may be shuffled (64 x 256, 640 places: between the two bounds of the sampled way)."""
    torch.manual_seed(0)
    dy, x = torch.randn(20, 64, dtype=dtype), torch.randn(20, 256, dtype=dtype)
    index = torch.stack([torch.randperm(256)[:10] + 256 * row for row in range(64)]).flatten()
    assert 2 * 256 < index.numel() < 64 * 256 / 16
    want = (dy.double().t() @ x.double()).take(index)
    tolerance = {D: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    torch.testing.assert_close(entry_gradients(dy, x, index).double(), want, atol=tolerance, rtol=tolerance)


def test_the_sampled_product_adds_up_runs_of_tokens(monkeypatch):
    monkeypatch.setattr(kernel, "_COPY", 7 * 256)
    dy, x, index = torch.randn(20, 64, dtype=D), torch.randn(20, 256, dtype=D), places(64, 256, 700)
    torch.testing.assert_close(entry_gradients(dy, x, index), (dy.t() @ x).take(index))


def test_the_sampled_product_says_nothing(recwarn):
    index = torch.arange(0, 64 * 256, 25)
    entry_gradients(torch.randn(20, 64), torch.randn(20, 256), index)
    assert not recwarn.list


@pytest.mark.parametrize("show", [True, False], ids=["dense", "opaque"])
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("n", [1, 7, 50])
@pytest.mark.parametrize("transposed", [False, True])
def test_value_and_gradients_follow_the_definition(show, tokens, n, transposed):
    """Few tokens and many, a matrix that a kernel may read and one that it may not, and one that is stored transposed."""
    torch.manual_seed(0)
    out, width = 9, 16
    W = torch.randn(width, out, dtype=D).t() if transposed else torch.randn(out, width, dtype=D)
    base = DenseBase(W, torch.randn(out, dtype=D), show=show)
    index, v = places(out, width, n), torch.randn(n, dtype=D, requires_grad=True)
    x = torch.randn(2, tokens, width, dtype=D, requires_grad=True)
    before = W.clone()
    got, want = entries(x, base, lambda: index, v), base.apply(x, added(W, index, v))
    torch.testing.assert_close(got, want)
    seed = torch.randn_like(want)
    for g, w in zip(torch.autograd.grad(got, (x, v), seed), torch.autograd.grad(want, (x, v), seed), strict=True):
        torch.testing.assert_close(g, w)
    assert torch.equal(W, before)


def test_generation_and_training_take_different_ways_with_one_result():
    """At 64 x 64 with 64 entries, 4 tokens go through the activations and 40 through a copy of W."""
    torch.manual_seed(0)
    base, index, v = DenseBase(torch.randn(64, 64, dtype=D)), places(64, 64, 64), torch.randn(64, dtype=D, requires_grad=True)
    x = torch.randn(40, 64, dtype=D)
    few, many = entries(x[:4], base, lambda: index, v), entries(x, base, lambda: index, v)
    assert (type(few.grad_fn).__name__, type(many.grad_fn).__name__) == ("_BesideBackward", "_PatchedBackward")
    torch.testing.assert_close(few, many[:4])


def test_keeps_the_input_alone():
    base = DenseBase(torch.randn(64, 32))
    index, v = places(64, 32, 64), torch.zeros(64, requires_grad=True)
    x = torch.randn(50, 32, requires_grad=True)
    assert kept_bytes(lambda: entries(x, base, lambda: index, v), without=(base.W, v)) == 50 * 32 * 4


def test_other_entries_keep_their_bits_in_half_precision():
    torch.manual_seed(0)
    W, index, v = torch.randn(8, 8).bfloat16(), places(8, 8, 5), torch.randn(5)
    new = added(W, index, v)
    rest = torch.ones(64, dtype=torch.bool).index_fill(0, index, False)
    assert torch.equal(new.flatten()[rest], W.float().flatten()[rest])
    torch.testing.assert_close(new.take(index), W.float().take(index) + v)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("count", [0, 1, 17, 59, 60])
def test_the_largest_of_many_tensors_are_those_of_a_sort(count, ties):
    g = torch.Generator().manual_seed(0)
    scores = [torch.rand(shape, generator=g) for shape in ((4, 5), (30,), (2, 5))]
    scores = [(4 * s).floor() for s in scores] if ties else scores
    top, more = most(scores, lambda counts: sum(counts) <= count)
    assert sum(top.counts) == count
    assert sum(more.counts) == min(count + 1, 60)
    chosen = [top.index(score, i) for i, score in enumerate(scores)]
    assert [len(c) for c in chosen] == list(top.counts)
    assert all(torch.equal(c, c.sort().values) for c in chosen)
    picked = torch.cat([s.flatten()[c] for s, c in zip(scores, chosen, strict=True)])
    joined = torch.cat([s.flatten() for s in scores])
    assert torch.equal(picked.sort(descending=True).values, joined.sort(descending=True).values[:count])


def test_a_rule_on_the_counts_decides():
    """At most two entries of the second tensor, whatever the first gets."""
    scores = [torch.tensor([9.0, 1.0, 0.5]), torch.tensor([8.0, 7.0, 6.0])]
    top, more = most(scores, lambda counts: counts[1] <= 2)
    assert top.counts == (1, 2)
    assert more.counts == (1, 3)


def test_bisection_finds_the_last_number_that_holds():
    assert [bisect(0, 9, lambda n, k=k: n <= k) for k in (0, 4, 9, 20)] == [0, 4, 9, 9]
