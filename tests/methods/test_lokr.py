"""LoKr: the Kronecker definition, every order of contraction, rank, counts, memory."""

from __future__ import annotations

import pytest
import torch
from structured_places import Opaque, assert_law, build, count, layer, saved_bytes, site

from trimtab.core.errors import ShapeMismatch
from trimtab.kernels.beside import beside
from trimtab.kernels.divisors import factorization, nearest_divisors
from trimtab.kernels.kronecker import Kronecker, kron, plan
from trimtab.methods.reparameterized.lokr import LoKr

D = torch.float64


def test_worked_example():
    w1, w2 = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]])
    assert torch.equal(kron(w1, w2), torch.tensor([[3.0, 6.0], [4.0, 8.0]]))
    place = site(layer(2, 2, bias=False))
    adapter = build(LoKr(rank=8, alpha=4.0, factor=1), place)  # w1 (1, 1), w2 (2, 2) full; scale 1/2 kept
    with torch.no_grad():
        adapter.w1.fill_(2.0)
        adapter.w2.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert torch.equal(adapter.weight(torch.zeros(2, 2, dtype=D)), adapter.w2.detach())


@pytest.mark.parametrize(
    ("o1", "i1", "o2", "i2", "rank", "order"),
    [(32, 32, 32, 32, 8, "thin"), (4, 4, 4, 4, None, "w2 first"), (2, 8, 64, 4, None, "w1 first"), (2, 2, 4, 4, 7, "w2 first")],
)
def test_order_of_contractions_is_the_cheapest(o1, i1, o2, i2, rank, order):
    assert plan(o1, i1, o2, i2, rank) == order


@pytest.mark.parametrize("opaque", [False, True])
@pytest.mark.parametrize(
    ("out", "fan_in", "config", "order"),
    [
        (24, 36, LoKr(rank=1), "thin"),
        (36, 24, LoKr(rank=8, alpha=2.0), "w2 first"),
        (30, 16, LoKr(rank=20, factor=2), "w1 first"),
        (16, 16, LoKr(rank=1, factor=4, decompose_both=True), "thin"),
        (7, 5, LoKr(rank=2, zero="w2"), "thin"),
    ],
)
def test_law(out, fan_in, config, order, opaque):
    place = site(layer(out, fan_in))
    adapter = build(config, place)
    assert adapter.order == order
    assert_law(adapter, Opaque(place) if opaque else place)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("right", [False, True])
def test_kernel_gradcheck_and_plain_form(left, right):
    """All four combinations, against the plain operations and against finite differences."""
    torch.manual_seed(0)
    o1, i1, o2, i2, k = 2, 3, 4, 5, 2
    k_in, k_out = (k if left else i2), (k if left else i2)
    o2 = o2 if right else k_out
    place = site(layer(o1 * o2, i1 * i2))
    rule = Kronecker(o1, i1, left, right)
    w2 = ([torch.randn(k_in, i2, dtype=D)] if left else []) + ([torch.randn(o2, k_out, dtype=D)] if right else [])
    params = [p.requires_grad_() for p in (torch.randn(o1, i1, dtype=D), *w2)]
    x = torch.randn(3, i1 * i2, dtype=D, requires_grad=True)
    torch.testing.assert_close(beside(rule, x, place, *params), place(x) + rule.map(x, *params))
    assert torch.autograd.gradcheck(lambda x, *p: beside(rule, x, place, *p), (x, *params))


def test_start_and_rank():
    place = site(layer(48, 48))
    for zero in ("w1", "w2"):
        assert torch.equal(build(LoKr(rank=3, factor=4, zero=zero), place, move=0).weight(place.weight), place.weight)
    adapter = build(LoKr(rank=3, factor=4), place)
    dW = adapter.weight(torch.zeros(48, 48, dtype=D))
    assert torch.linalg.matrix_rank(dW) == 12  # rank 4 of w1 times rank 3 of w2
    b, a = adapter.factors()
    assert b.shape[1] == 12
    torch.testing.assert_close(b @ a, dW)
    assert build(LoKr(rank=3), place).factors() is None or build(LoKr(rank=3), place).factors()[0].shape[1] < 48


def test_counts():
    assert count(LoKr(rank=32, factor=4)) == 2_294_656
    assert count(LoKr(rank=32, factor=4), (((3072, 3072), 1),)) == 49_168


def test_factorization():
    assert [factorization(n) for n in (256, 128, 127, 1)] == [(16, 16), (8, 16), (1, 127), (1, 1)]
    assert factorization(128, 4) == (4, 32) and factorization(100, 7) == (5, 20)
    assert nearest_divisors(10, 4) == "2 and 5" and nearest_divisors(10, 5) == "5"


def test_saves_the_input_alone():
    place = site(layer(64, 64, dtype=torch.float32))
    adapter = build(LoKr(rank=2), place)
    x = torch.randn(50, 64, requires_grad=True)
    constants = (place.module.weight, place.module.bias, *adapter.parameters())
    tiny = adapter.w1.numel() * 4  # the scaled copy of w1
    assert saved_bytes(lambda: adapter(x, place), *constants) - x.numel() * 4 in (0, tiny)


@pytest.mark.parametrize("p", [{"rank": 0}, {"alpha": 0.0}, {"factor": 0}, {"factor": 2.0}, {"zero": "w3"}])
def test_bad_hyperparameters(p):
    with pytest.raises(ShapeMismatch):
        LoKr(**p)
