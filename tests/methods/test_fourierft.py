"""FourierFT: the transform's norms, both forms against the definition for odd and even sizes, places, counts, memory."""

from __future__ import annotations

import pytest
import torch
from structured_places import Opaque, assert_law, build, count, layer, saved_bytes, site
from torch import nn

from trimtab.core.errors import ShapeMismatch
from trimtab.kernels.beside import beside
from trimtab.kernels.fourier import FourierRule, FourierWeight, Places, dense_update
from trimtab.kernels.fourier import on_activations as cheaper_there
from trimtab.kernels.rebuilt import rebuilt
from trimtab.methods.reparameterized.fourierft import FourierFT

D = torch.float64


def test_one_coefficient():
    """At a generic place ||dW||_F^2 = alpha^2 / (2 out in); at (0, 0) dW is constant; at (1, 2) it is a cosine."""
    out, fan_in, one = 6, 10, torch.ones(1, dtype=D)
    dW = dense_update(torch.tensor([1 * fan_in + 2]), one, 5.0, out, fan_in)
    torch.testing.assert_close(dW.pow(2).sum(), torch.tensor(25.0 / (2 * out * fan_in), dtype=D))
    o, i = torch.meshgrid(torch.arange(out, dtype=D), torch.arange(fan_in, dtype=D), indexing="ij")
    torch.testing.assert_close(dW, 5.0 / (out * fan_in) * torch.cos(2 * torch.pi * (o / out + 2 * i / fan_in)))
    torch.testing.assert_close(dense_update(torch.tensor([0]), one, 5.0, out, fan_in), torch.full((out, fan_in), 5.0 / 60, dtype=D))


@pytest.mark.parametrize("shape", [(6, 10), (5, 7), (6, 7), (5, 8), (1, 4), (2, 2)])
def test_both_forms_with_every_coefficient(shape):
    """All entries at once, so that every mirrored, self-mirrored and middle index is used; value and gradients."""
    torch.manual_seed(0)
    out, fan_in = shape
    place = site(layer(out, fan_in))
    index = torch.randperm(out * fan_in)
    places = Places(index, out, fan_in)
    c = torch.randn(out * fan_in, dtype=D, requires_grad=True)
    x = torch.randn(3, fan_in, dtype=D, requires_grad=True)
    want = place.apply(x, place.weight + dense_update(index, c, 3.0, out, fan_in))
    seed = torch.randn_like(want)
    expected = torch.autograd.grad(want, [x, c], seed)
    rule, recipe = FourierRule(places, index, 3.0), FourierWeight(places, index, 3.0)
    for y in (beside(rule, x, place, c), rebuilt(recipe, x, place, c), place(x) + rule.map(x, c)):
        torch.testing.assert_close(y, want)
        for g, w in zip(torch.autograd.grad(y, [x, c], seed), expected, strict=True):
            torch.testing.assert_close(g, w)


def test_gradcheck():
    place, index = site(layer(4, 5)), torch.tensor([0, 7, 13, 19])
    places = Places(index, 4, 5)
    x, c = torch.randn(2, 5, dtype=D, requires_grad=True), torch.randn(4, dtype=D, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, c: beside(FourierRule(places, index, 9.0), x, place, c), (x, c))
    assert torch.autograd.gradcheck(lambda x, c: rebuilt(FourierWeight(places, index, 9.0), x, place, c), (x, c))


@pytest.mark.parametrize("opaque", [False, True])
@pytest.mark.parametrize(("n", "on_activations"), [(2, True), (70, False)])
def test_law(n, on_activations, opaque):
    place = site(layer(10, 12))
    adapter = build(FourierFT(coefficients=n, start="normal"), place)
    assert cheaper_there(8, n, 10, 12) == on_activations
    assert_law(adapter, Opaque(place) if opaque else place, tokens=(2, 4))


def test_long_inputs_run_in_pieces(monkeypatch):
    monkeypatch.setattr("trimtab.kernels.fourier._RUN", 64)
    adapter = build(FourierFT(coefficients=4), site(layer(10, 12)))
    places = Places(adapter.index, 10, 12)
    rule = FourierRule(places, adapter.index, 1.0)
    assert len(rule._runs(torch.empty(40, 12))) == 3
    x = torch.randn(40, 12, dtype=D)
    torch.testing.assert_close(beside(rule, x, adapter.site, adapter.c), adapter.site(x) + rule.map(x, adapter.c))


def test_places_are_seeded_and_shared_by_equal_shapes():
    a, b = site(layer(10, 12)), site(layer(10, 12))
    b.cohort = a.cohort
    one, two = build(FourierFT(coefficients=9), a), build(FourierFT(coefficients=9), b)
    assert one.index.data_ptr() == two.index.data_ptr()
    expected = torch.randperm(120, generator=torch.Generator().manual_seed(777))[:9]
    assert torch.equal(one.index, expected)
    assert "index" not in one.state_dict()
    one.index = torch.zeros_like(one.index)
    one.rebuild()
    assert torch.equal(one.index, expected)


def test_start():
    place = site(layer(10, 12))
    x = torch.randn(3, 12, dtype=D)
    torch.testing.assert_close(build(FourierFT(coefficients=4), place, move=0)(x, place), place(x))
    normal = FourierFT(coefficients=4, start="normal")
    assert not torch.allclose(build(normal, place, move=0)(x, place), place(x))
    assert FourierFT.adapter_class.identity(FourierFT()) and not FourierFT.adapter_class.identity(normal)


def test_counts():
    assert count(FourierFT(coefficients=1000)) == 56_000
    assert count(FourierFT(coefficients=5000)) == 280_000


@pytest.mark.parametrize("n", [2, 500])
def test_saves_the_input_alone(n):
    place = site(layer(20, 26, dtype=torch.float32))
    adapter = build(FourierFT(coefficients=n), place)
    x = torch.randn(10, 26, requires_grad=True)
    constants = (place.module.weight, place.module.bias, *adapter.parameters())
    assert saved_bytes(lambda: adapter(x, place), *constants) == x.numel() * 4


def test_half_precision_trains_in_float32():
    place = site(layer(10, 12, dtype=torch.bfloat16), dtype=torch.float32)
    for n in (2, 70):
        adapter = build(FourierFT(coefficients=n, start="normal"), place)
        y = adapter(torch.randn(8, 12).bfloat16(), place)
        y.float().sum().backward()
        assert y.dtype == torch.bfloat16 and adapter.c.grad.dtype == torch.float32


@pytest.mark.parametrize("p", [{"coefficients": 0}, {"coefficients": 2.0}, {"alpha": 0.0}, {"start": "ones"}])
def test_bad_hyperparameters(p):
    with pytest.raises(ShapeMismatch):
        FourierFT(**p)


def test_more_coefficients_than_entries():
    with pytest.raises(ShapeMismatch, match=r"1000 coefficients .* 80 entries .* at most 80"):
        FourierFT.adapter_class.check(FourierFT(), site(nn.Linear(8, 10)))
