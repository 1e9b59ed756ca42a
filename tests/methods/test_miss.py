"""MiSS and Bone: worked numbers, identities, counts, memory, bad input (arXiv 2409.15371)."""

from __future__ import annotations

import pytest
import torch
from structured_places import Opaque, assert_law, build, count, gradients, layer, saved_bytes, site
from torch import nn

import trimtab as tt
from trimtab.core.errors import ShapeMismatch
from trimtab.kernels.beside import beside
from trimtab.kernels.blocksum import BlockSum, block_sum, tile
from trimtab.kernels.dropout import keep_mask, keep_rate
from trimtab.kernels.shards import Shards, repeat_rows
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
    [(12, 8, Bone(rank=4)), (13, 8, MiSS(rank=4)), (10, 7, Bone(rank=3)), (11, 6, MiSS(rank=4, mini=3)), (5, 4, Bone(rank=5)),
     (12, 8, MiSS(rank=4, shared="outputs")), (13, 11, MiSS(rank=4, shared="outputs")), (5, 6, MiSS(rank=6, shared="outputs"))],
)
def test_law(fan_in, out, config, bias, opaque):
    place = site(layer(out, fan_in, bias=bias))
    assert_law(build(config, place), Opaque(place) if opaque else place)


@pytest.mark.parametrize("config", [Bone(rank=4), MiSS(rank=4), MiSS(rank=4, mini=2), MiSS(rank=4, shared="outputs")])
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


def llama_like(width: int, inner: int, keys: int, blocks: int) -> tuple:
    """Shapes of the seven projections, and how many of each."""
    return (((width, width), 2 * blocks), ((keys, width), 2 * blocks), ((inner, width), 2 * blocks), ((width, inner), blocks))


def test_counts():
    assert count(Bone(rank=64)) == 7_340_032
    assert count(MiSS(rank=64, mini=64)) == 229_376
    llama2 = llama_like(4096, 11008, 4096, 32)
    assert [count(Bone(rank=r), llama2) for r in (16, 32, 64, 128)] == [21_757_952, 43_515_904, 87_031_808, 174_063_616]
    assert count(tt.LoRA(rank=36), llama2) == 89_948_160
    assert count(Bone(rank=64), llama_like(4096, 14336, 1024, 32)) == 88_080_384  # Mistral-7B
    assert count(Bone(rank=128), llama_like(5120, 13824, 5120, 40)) == 272_629_760  # LLaMA2-13B
    assert count(Bone(rank=120), llama_like(5120, 13824, 5120, 40)) == 255_590_400  # printed, as 255M, for rank 128
    qwen3 = (((4096, 2560), 36), ((1024, 2560), 72), ((2560, 4096), 36), ((9728, 2560), 72), ((2560, 9728), 36))
    assert count(Bone(rank=64), qwen3) == 70_778_880
    assert count(MiSS(rank=64, shared="outputs"), llama2) == 64 * 32 * (6 * 4096 + 11008)


def test_shared_outputs_repeat_their_shards_row():
    """``dW = repeat_interleave(D, s)``, with shards of equal and of unequal sizes; as a LoRA its B is frozen ones."""
    for out, sizes in ((8, [2, 2, 2, 2]), (11, [3, 3, 3, 2])):
        place = site(layer(out, 5))
        adapter = build(MiSS(rank=4, shared="outputs"), place)
        dW = adapter.weight(torch.zeros(out, 5, dtype=D))
        assert torch.equal(dW, adapter.d.repeat_interleave(torch.tensor(sizes), 0))
        b, a = adapter.factors()
        torch.testing.assert_close(b @ a, dW)
        assert torch.equal(b.sum(0), torch.tensor(sizes, dtype=D))


def test_shared_outputs_keep_the_input_alone():
    place = site(layer(20, 24, dtype=torch.float32))
    adapter = build(MiSS(rank=4, shared="outputs"), place)
    x = torch.randn(10, 24, requires_grad=True)
    assert saved_bytes(lambda: adapter(x, place), place.module.weight, place.module.bias, adapter.d) == x.nbytes


@pytest.mark.parametrize("out", [6, 7])
def test_shared_outputs_dropout_is_a_fixed_mask_on_the_branch(out):
    place, rule = site(layer(out, 12)), Shards(out, 0.25, seed=11)
    x = torch.randn(7, 12, dtype=D, requires_grad=True)
    d = torch.randn(3, 12, dtype=D, requires_grad=True)
    mask = keep_mask(11, 0.25, x.detach()) / keep_rate(0.25)
    want, got = place(x) + repeat_rows((x * mask) @ d.t(), out), beside(rule, x, place, d)
    torch.testing.assert_close(got, want)
    for g, w in zip(gradients(got, [x, d]), gradients(want, [x, d]), strict=True):
        torch.testing.assert_close(g, w)
    assert torch.autograd.gradcheck(lambda x, d: beside(rule, x, place, d), (x, d))


def test_one_block_sum_serves_q_k_and_v():
    """Blocks side by side on the fused matrix give the outputs and gradients of three layers apart."""
    parts = [layer(out, 14, seed=out) for out in (8, 4, 5)]
    fused = layer(17, 14)
    with torch.no_grad():
        fused.weight.copy_(torch.cat([m.weight for m in parts]))
        fused.bias.copy_(torch.cat([m.bias for m in parts]))
    places = [site(m) for m in parts]
    apart, together = [build(Bone(rank=4), place, seed=i) for i, place in enumerate(places)], build(Bone(rank=4), site(fused))
    with torch.no_grad():
        together.d.copy_(torch.cat([a.d for a in apart], dim=1))
    x = torch.randn(6, 14, dtype=D, requires_grad=True)
    want = torch.cat([a(x, place) for a, place in zip(apart, places, strict=True)], dim=-1)
    got = together(x, site(fused))
    torch.testing.assert_close(got, want, atol=1e-13, rtol=0)
    gx, gd = gradients(got, [x, together.d])
    wx, *wd = gradients(want, [x, *(a.d for a in apart)])
    torch.testing.assert_close(gx, wx, atol=1e-13, rtol=0)
    torch.testing.assert_close(gd, torch.cat(wd, dim=1), atol=1e-13, rtol=0)


@pytest.mark.parametrize("config", [Bone(rank=8), MiSS(rank=8, shared="outputs")])
def test_unmerge_gives_the_very_bytes_where_subtracting_would_not(config):
    """In bf16, adding and subtracting dW alone changes about 2% of the entries at |D| about 0.01."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64)).bfloat16()
    before = model[0]._parameters["weight"].detach().clone()
    tt.attach(model, config, targets="0")
    with torch.no_grad():
        for p in tt.parameters(model):
            p.add_(0.01 * torch.randn(p.shape))
    tt.merge(model, "default")
    merged = model[0]._parameters["weight"].detach().clone()
    tt.unmerge(model, "default")
    assert torch.equal(model[0]._parameters["weight"], before)
    dW = (merged.float() - before.float()).bfloat16()
    assert (((before + dW) - dW) != before).float().mean() > 0.005


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


@pytest.mark.parametrize("p", [{"rank": 0}, {"rank": 2.0}, {"dropout": 1.0}, {"mini": 0}, {"shared": "rows"},
                               {"shared": "outputs", "mini": 2}])
def test_bad_hyperparameters(p):
    with pytest.raises(ShapeMismatch):
        MiSS(**p)


def test_bad_shapes_name_the_numbers():
    place = site(nn.Linear(8, 10))
    with pytest.raises(ShapeMismatch, match=r"rank 9 .* 8 inputs .* at most 8"):
        Bone.adapter_class.check(Bone(rank=9), place)
    with pytest.raises(ShapeMismatch, match=r"mini=4 .* 10 outputs .* 2 and 5"):
        MiSS.adapter_class.check(MiSS(rank=2, mini=4), place)
    with pytest.raises(ShapeMismatch, match=r"rank 11 .* 10 outputs .* at most 10"):
        MiSS.adapter_class.check(MiSS(rank=11, shared="outputs"), place)
