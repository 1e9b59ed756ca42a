"""LoHa: the Khatri-Rao identity, both forms against the definition, counts, memory, dropout."""

from __future__ import annotations

import pytest
import torch
from structured_places import Opaque, assert_law, build, count, gradients, layer, saved_bytes, site
from torch import nn

from trimtab.core.errors import ShapeMismatch
from trimtab.kernels.beside import beside
from trimtab.kernels.hadamard import Hadamard, KhatriRao, khatri_rao
from trimtab.kernels.rebuilt import rebuilt
from trimtab.methods.reparameterized.loha import LoHa

D = torch.float64


def test_worked_example():
    place = site(layer(2, 2, bias=False))
    adapter = build(LoHa(rank=1, alpha=2.0), place)
    values = {"w1a": [[1.0], [2.0]], "w1b": [[3.0, 4.0]], "w2a": [[5.0], [6.0]], "w2b": [[7.0, 8.0]]}
    with torch.no_grad():
        for name, value in values.items():
            getattr(adapter, name).copy_(torch.tensor(value))
    # (w1a w1b) = [[3, 4], [6, 8]], (w2a w2b) = [[35, 40], [42, 48]], scale 2
    want = torch.tensor([[210.0, 320.0], [504.0, 768.0]], dtype=D)
    assert torch.equal(adapter.weight(torch.zeros(2, 2, dtype=D)), want)


def test_khatri_rao_identity_and_rank():
    place = site(layer(30, 28))
    adapter = build(LoHa(rank=3), place)
    with torch.no_grad():
        adapter.w2b.normal_()
    four = (adapter.w1a, adapter.w1b, adapter.w2a, adapter.w2b)
    ka, kb = khatri_rao(*four)
    dW = adapter.weight(torch.zeros(30, 28, dtype=D))
    torch.testing.assert_close(ka @ kb, dW)
    assert torch.linalg.matrix_rank(dW) == 9
    b, a = adapter.factors()
    torch.testing.assert_close(b @ a, dW)
    assert build(LoHa(rank=6), place).factors() is None


@pytest.mark.parametrize("opaque", [False, True])
@pytest.mark.parametrize(
    ("out", "fan_in", "rank", "thin"), [(40, 24, 1, True), (48, 50, 2, True), (12, 8, 2, False), (9, 13, 5, False)]
)
def test_law(out, fan_in, rank, thin, opaque):
    place = site(layer(out, fan_in))
    adapter = build(LoHa(rank=rank, alpha=1.5), place)
    assert adapter.thin == thin
    assert_law(adapter, Opaque(place) if opaque else place)


@pytest.mark.parametrize("learn", [(0, 1, 2, 3), (0,), (1,), (2,), (3,)])
def test_both_kernels_gradcheck_and_plain_form(learn):
    torch.manual_seed(0)
    place = site(layer(5, 6))
    params = [torch.randn(*s, dtype=D) for s in ((5, 2), (2, 6), (5, 2), (2, 6))]
    for k in learn:
        params[k].requires_grad_()
    x = torch.randn(3, 6, dtype=D, requires_grad=True)
    for run in (lambda *p: beside(KhatriRao(0.7), x, place, *p), lambda *p: rebuilt(Hadamard(0.7), x, place, *p)):
        torch.testing.assert_close(run(*params), place(x) + KhatriRao(0.7).map(x, *params))
        assert torch.autograd.gradcheck(lambda x, *p, run=run: run(*p), (x, *params))


def test_starts_at_the_base_and_first_gradients():
    """With w2b = 0 only w2b gets a gradient."""
    place = site(layer(48, 50))
    adapter = build(LoHa(rank=2), place, move=0)
    x = torch.randn(4, 50, dtype=D)
    torch.testing.assert_close(adapter(x, place), place(x))
    g = gradients(adapter(x, place), [adapter.w1a, adapter.w1b, adapter.w2a, adapter.w2b])
    assert [bool(t.abs().max() > 0) for t in g] == [False, False, False, True]


def test_count():
    assert count(LoHa(rank=32)) == 18_350_080


@pytest.mark.parametrize("rank", [2, 12])
def test_saves_the_input_alone(rank):
    place = site(layer(64, 64, dtype=torch.float32))
    adapter = build(LoHa(rank=rank), place)
    assert adapter.thin == (rank == 2)
    x = torch.randn(50, 64, requires_grad=True)
    constants = (place.module.weight, place.module.bias, *adapter.parameters())
    assert saved_bytes(lambda: adapter(x, place), *constants) == x.numel() * 4


def test_half_base_with_float_parameters():
    """The sum W + dW is formed in float32 before it is rounded; gradients come back in float32."""
    place = site(layer(12, 8, dtype=torch.bfloat16), dtype=torch.float32)
    adapter = build(LoHa(rank=2), place)
    x = torch.randn(6, 8).bfloat16().requires_grad_()
    y = adapter(x, place)
    assert torch.equal(y, nn.functional.linear(x, adapter.weight(place.weight).bfloat16(), place.bias))
    assert [g.dtype for g in gradients(y, [x, adapter.w1a])] == [torch.bfloat16, torch.float32]


def test_dropout_drops_rows_of_the_update_and_whole_updates():
    place = site(layer(40, 24))
    x = torch.randn(2, 24, dtype=D)
    rows = build(LoHa(rank=1, rank_dropout=0.5), place).train()
    whole = rows.weight(place.weight)
    torch.manual_seed(0)
    update = rows(x, place) - place(x)
    dropped = update.abs().amax(0) < 1e-14
    assert 5 < dropped.sum() < 35
    expected = (x @ (whole - place.weight).t() * 40 / (~dropped).sum())[:, ~dropped]
    torch.testing.assert_close(update[:, ~dropped], expected)
    module = build(LoHa(rank=1, module_dropout=0.5), place).train()
    seen = {bool((module(x, place) - place(x)).abs().max() > 1e-14) for _ in range(30)}
    assert seen == {False, True}
    torch.testing.assert_close(module.eval()(x, place), place.apply(x, module.weight(place.weight)))


@pytest.mark.parametrize("p", [{"rank": 0}, {"alpha": 0.0}, {"rank_dropout": 1.0}, {"module_dropout": -0.1}])
def test_bad_hyperparameters(p):
    with pytest.raises(ShapeMismatch):
        LoHa(**p)


def test_rank_beyond_the_matrix_names_the_limit():
    with pytest.raises(ShapeMismatch, match=r"rank 9 .*\(10, 8\).* at most 8"):
        LoHa.adapter_class.check(LoHa(rank=9), site(nn.Linear(8, 10)))
