"""MiSS and Bone: worked numbers, identities, counts, memory, bad input (arXiv 2409.15371)."""

from __future__ import annotations

import pytest
import torch
from structured_places import Opaque, assert_law, build, count, gradients, layer, saved_bytes, site
from torch import nn

from trimtab.core.errors import ShapeMismatch
from trimtab.kernels.beside import beside
from trimtab.kernels.blocksum import BlockSum, block_sum, tile
from trimtab.kernels.dropout import keep_mask, keep_rate
from trimtab.methods.reparameterized.miss import Bone, MiSS

D = torch.float64


@pytest.mark.parametrize(
    ("fan_in", "dW", "x", "y"),
    [
        (4, [[1, 3, 1, 3], [2, 4, 2, 4]], [1, 2, 3, 4], [22, 32]),
        (5, [[1, 3, 1, 3, 1], [2, 4, 2, 4, 2]], [1, 2, 3, 4, 5], [27, 42]),
    ],
)
def test_worked_example(fan_in, dW, x, y):
    place = site(layer(2, fan_in, bias=False))
    adapter = build(Bone(rank=2), place)
    with torch.no_grad():
        adapter.d.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        place.module.weight.zero_()
    assert torch.equal(adapter.weight(place.weight), torch.tensor(dW, dtype=D))
    assert torch.equal(adapter(torch.tensor(x, dtype=D), place), torch.tensor(y, dtype=D))


@pytest.mark.parametrize("opaque", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("fan_in", "out", "config"),
    [(12, 8, Bone(rank=4)), (13, 8, MiSS(rank=4)), (10, 7, Bone(rank=3)), (11, 6, MiSS(rank=4, mini=3)), (5, 4, Bone(rank=5))],
)
def test_law(fan_in, out, config, bias, opaque):
    place = site(layer(out, fan_in, bias=bias))
    assert_law(build(config, place), Opaque(place) if opaque else place)


@pytest.mark.parametrize("config", [Bone(rank=4), MiSS(rank=4), MiSS(rank=4, mini=2)])
def test_starts_at_the_base_to_the_bit(config):
    place = site(layer(6, 9, dtype=torch.float32))
    x = torch.randn(5, 9)
    assert torch.equal(build(config, place, move=0)(x, place), place(x))


def test_it_is_a_lora_with_frozen_identities():
    place = site(layer(8, 14))
    adapter = build(MiSS(rank=4, mini=2), place)
    b, a = adapter.factors()
    torch.testing.assert_close(b @ a, adapter.weight(place.weight) - place.weight)
    assert torch.equal(a[:, :4], torch.eye(4, dtype=D))


def test_spectrum_and_rank():
    """Without a tail the singular values of dW are sqrt(in / r) times those of D."""
    place = site(layer(32, 32))
    adapter = build(Bone(rank=4), place)
    dW = adapter.weight(torch.zeros(32, 32, dtype=D))
    spectrum = torch.linalg.svdvals(dW)
    torch.testing.assert_close(spectrum[:4], (32 / 4) ** 0.5 * torch.linalg.svdvals(adapter.d))
    assert torch.linalg.matrix_rank(dW) == 4


def test_gradient_is_the_block_sum_of_the_weight_gradient():
    place = site(layer(6, 12))
    adapter = build(Bone(rank=4), place)
    x = torch.randn(7, 12, dtype=D)
    y = adapter(x, place)
    (got,) = gradients(y, [adapter.d])
    seed = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y)
    G = seed.t() @ x
    torch.testing.assert_close(got, G.view(6, 3, 4).sum(1).t())


def test_counts():
    assert count(Bone(rank=64)) == 7_340_032
    assert count(MiSS(rank=64, mini=64)) == 229_376
    llama2 = (((4096, 4096), 4 * 32), ((11008, 4096), 2 * 32), ((4096, 11008), 32))
    assert [count(Bone(rank=r), llama2) for r in (16, 32, 64, 128)] == [21_757_952, 43_515_904, 87_031_808, 174_063_616]


def test_saves_r_numbers_a_token():
    place = site(layer(20, 24, dtype=torch.float32))
    adapter = build(Bone(rank=4), place)
    x = torch.randn(10, 24, requires_grad=True)
    constants = (place.module.weight, place.module.bias, *adapter.parameters())
    assert saved_bytes(lambda: adapter(x, place), *constants) == 10 * 4 * 4


def test_half_base_with_float_parameters():
    """Value and gradients follow the float64 layer to bf16's resolution; the parameter's gradient is float32."""
    place = site(layer(8, 12, dtype=torch.bfloat16), dtype=torch.float32)
    adapter = build(Bone(rank=4), place)
    x = torch.randn(6, 12).bfloat16().requires_grad_()
    y = adapter(x, place)
    assert y.dtype == torch.bfloat16
    got = gradients(y, [x, adapter.d])
    assert [g.dtype for g in got] == [torch.bfloat16, torch.float32]
    want = place.module.double()
    exact = x.double() @ (want.weight + tile(adapter.d.double(), 12)).t() + want.bias
    torch.testing.assert_close(y.double(), exact, atol=0.05, rtol=0.02)


def test_dropout_drops_inputs_of_the_branch_alone():
    place = site(layer(6, 9, bias=False))
    adapter = build(Bone(rank=3, dropout=0.5), place)
    x = torch.ones(4000, 9, dtype=D)
    adapter.train()
    torch.manual_seed(0)
    dropped = adapter(x, place)
    assert not torch.allclose(dropped[0], dropped[1])
    adapter.eval()
    torch.testing.assert_close(dropped.mean(0), adapter(x, place)[0], atol=0.05, rtol=0)


@pytest.mark.parametrize("width", [12, 13])
def test_dropout_kernel_is_a_fixed_mask_on_the_branch(width):
    """With its seed fixed the rule is ``base(x) + blocksum(x * mask / keep) D``, in value and gradients; it keeps S alone."""
    place, rule = site(layer(6, width)), BlockSum(4, 0.25, seed=11)
    x = torch.randn(7, width, dtype=D, requires_grad=True)
    d = torch.randn(4, 6, dtype=D, requires_grad=True)
    mask = keep_mask(11, 0.25, x.detach()) / keep_rate(0.25)
    want, got = place(x) + block_sum(x * mask, 4) @ d, beside(rule, x, place, d)
    torch.testing.assert_close(got, want)
    for g, w in zip(gradients(got, [x, d]), gradients(want, [x, d]), strict=True):
        torch.testing.assert_close(g, w)
    assert saved_bytes(lambda: beside(rule, x, place, d), place.module.weight, place.module.bias, d) == 7 * 4 * 8


@pytest.mark.parametrize(("width", "r"), [(12, 4), (13, 4), (3, 3), (7, 5)])
def test_block_sum_is_the_padded_sum(width, r):
    x = torch.randn(2, 5, width, dtype=D)
    padded = torch.nn.functional.pad(x, (0, -width % r))
    torch.testing.assert_close(block_sum(x, r), padded.unflatten(-1, (-1, r)).sum(-2))


@pytest.mark.parametrize("p", [{"rank": 0}, {"rank": 2.0}, {"dropout": 1.0}, {"mini": 0}])
def test_bad_hyperparameters(p):
    with pytest.raises(ShapeMismatch):
        MiSS(**p)


def test_bad_shapes_name_the_numbers():
    place = site(nn.Linear(8, 10))
    with pytest.raises(ShapeMismatch, match=r"rank 9 .* 8 inputs .* at most 8"):
        Bone.adapter_class.check(Bone(rank=9), place)
    with pytest.raises(ShapeMismatch, match=r"mini=4 .* 10 outputs .* 2 and 5"):
        MiSS.adapter_class.check(MiSS(rank=2, mini=4), place)
