"""Bat: worked numbers, activation forms, gradients, rank, inverse, counts, memory, bad input (arXiv 2409.15371, v1-v3)."""

from __future__ import annotations

import pytest
import torch
from structured_places import Opaque, assert_law, build, count, gradients, layer, saved_bytes, site
from torch import nn

import trimtab as tt
from trimtab.core.errors import ShapeMismatch
from trimtab.core.kinds import LinearSite, PartOperation, Through
from trimtab.core.site import Rows
from trimtab.kernels import blockaffine
from trimtab.kernels.blockaffine import BlockAffine
from trimtab.kernels.rebuilt import rebuilt
from trimtab.methods.reparameterized.bat import Bat

D = torch.float64
FORMS = [Bat(rank=4), Bat(rank=4, form="row"), Bat(rank=4, form="left"), Bat(rank=2, form="free", grid=(2, 3))]
LLAMA2 = (((4096, 4096), 4 * 32), ((11008, 4096), 2 * 32), ((4096, 11008), 32))
form = pytest.mark.parametrize("config", FORMS, ids=lambda c: c.form)


def tiles_of(W: torch.Tensor, r: int) -> torch.Tensor:
    """(out, in) -> (J, I, r, r)."""
    return W.unfold(0, r, r).unfold(1, r, r)


@pytest.mark.parametrize(
    ("config", "blocks", "dW"),
    [
        (Bat(rank=2), [1], [[4, 2, 8, 4], [14, 5, 18, 7]]),
        (Bat(rank=2, form="left"), [1], [[10, 14, 14, 18], [2, 2, 4, 4]]),
        (Bat(rank=2, form="row"), [1, -1], [[4, 2, -8, -4], [14, 5, -18, -7]]),
        (Bat(rank=2, form="free", grid=(1, 2)), [1, -1], [[4, 2, -8, -4], [14, 5, -18, -7]]),
    ],
)
def test_worked_example(config, blocks, dW):
    place = site(layer(2, 4, bias=False))
    adapter = build(config, place)
    W = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]], dtype=D)
    with torch.no_grad():
        adapter.b.copy_(torch.tensor(blocks, dtype=D)[:, None, None] * torch.tensor([[0.0, 1], [2, 0]], dtype=D))
        place.module.weight.copy_(W)
    assert torch.equal(adapter.weight(W) - W, torch.tensor(dW, dtype=D))
    x = torch.tensor([1.0, -2, 3, 5], dtype=D)
    torch.testing.assert_close(adapter(x, place), x @ (W + torch.tensor(dW, dtype=D)).t(), atol=1e-13, rtol=0)


@form
def test_it_is_the_tile_by_tile_rule(config):
    place = site(layer(8, 12))
    adapter = build(config, place)
    p, q = adapter.grid
    got, W, b = (tiles_of(t, config.rank) for t in (adapter.weight(place.weight), place.weight, torch.zeros(4, 4, dtype=D)))
    b = adapter.b.detach().unflatten(0, (p, q))
    for J in range(W.shape[0]):
        for i in range(W.shape[1]):
            B = b[J % p, i % q]
            want = W[J, i] + (B.t() @ W[J, i] + B.t() if config.form == "left" else W[J, i] @ B + B)
            torch.testing.assert_close(got[J, i], want, atol=1e-13, rtol=0)


@pytest.mark.parametrize("opaque", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@form
def test_law(config, bias, opaque):
    """The fast form, on a dense W and on a base that has none, is the weight form in value and every gradient (oracle 7)."""
    place = site(layer(8, 12, bias=bias))
    assert_law(build(config, place, move=0.3), Opaque(place) if opaque else place, atol=1e-12)


@form
def test_law_on_a_base_adapted_before_reaches_both_adapters(config):
    place = site(layer(8, 12))
    first, second = build(tt.LoRA(rank=2), place, seed=4), build(config, place)
    x = torch.randn(5, 12, dtype=D, requires_grad=True)
    inputs = [x, *first.parameters(), *second.parameters()]
    got = second(x, Through(first, place))
    want = place.apply(x, second.weight(first.weight(place.weight)))
    torch.testing.assert_close(got, want)
    for g, w in zip(gradients(got, inputs), gradients(want, inputs), strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("blocks", [1, 2])
@form
def test_law_on_rows_of_a_fused_matrix(config, blocks):
    """Rows in one run or in several: W is read again in backward, not kept."""
    place = site(layer(16, 12))
    place.rows = Rows(start=0, size=8 // blocks, blocks=blocks, stride=8)
    place.shape = (8, 12)
    adapter = build(config, place)
    whole = LinearSite(module=place.module, path="fc", tensor="weight", shape=(16, 12))
    x = torch.randn(5, 12, dtype=D, requires_grad=True)
    part = PartOperation(place, whole, x, whole(x))
    assert_law(adapter, part)
    torch.testing.assert_close(adapter(x, part), place.apply(x, adapter.weight(place.weight)))
    kept = saved_bytes(lambda: adapter(x, part), x, place.module.weight, place.module.bias, *adapter.parameters())
    assert kept < place.weight.nbytes


def test_left_is_the_kernel_that_works_on_the_transposed_weight():
    """The published kernel takes w (in, out) and multiplies its output channels: ``w + w B + B`` tile by tile (oracle 7)."""
    place = site(layer(8, 12))
    adapter = build(Bat(rank=4, form="left"), place)
    w = tiles_of(place.weight.t(), 4)  # (I, J, r, r)
    want = (w + w @ adapter.b + adapter.b).permute(0, 2, 1, 3).reshape(12, 8)
    torch.testing.assert_close(adapter.weight(place.weight), want.t(), atol=1e-13, rtol=0)
    other = build(Bat(rank=4), place)
    assert not torch.allclose(adapter.weight(place.weight), other.weight(place.weight))


@form
def test_starts_at_the_base_to_the_bit(config):
    place = site(layer(8, 12, dtype=torch.float32))
    x = torch.randn(50, 12)
    assert torch.equal(build(config, place, move=0)(x, place), place(x))


def test_first_gradient():
    """At B = 0: ``dL/dB_J = sum_I (W_JI^T G_JI + G_JI)``, G = dL/dW (oracle 8)."""
    place = site(layer(8, 12))
    adapter = build(Bat(rank=4), place, move=0)
    x = torch.randn(7, 12, dtype=D)
    y = adapter(x, place)
    (got,) = gradients(y, [adapter.b])
    G = tiles_of(torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y).t() @ x, 4)
    W = tiles_of(place.weight, 4)
    torch.testing.assert_close(got, (W.transpose(-1, -2) @ G + G).sum(1), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kind", ["col", "row", "left"])
def test_rank_of_the_update_is_full(kind):
    place = site(layer(32, 32))
    adapter = build(Bat(rank=4, form=kind), place)
    assert torch.linalg.matrix_rank(adapter.weight(place.weight) - place.weight) == 32
    assert adapter.factors() is None


def test_the_update_can_be_inverted():
    """``W_JI = (W'_JI - B_J) (I + B_J)^-1`` (oracle 10)."""
    place = site(layer(64, 64))
    adapter = build(Bat(rank=8), place, move=0.01)
    changed, eye = tiles_of(adapter.weight(place.weight), 8), torch.eye(8, dtype=D)
    back = (changed - adapter.b[:, None]) @ torch.linalg.inv(eye + adapter.b)[:, None]
    torch.testing.assert_close(back, tiles_of(place.weight, 8), atol=1e-15, rtol=1e-14)


@pytest.mark.parametrize("kind", ["col", "row", "left"])
def test_unmerge_gives_the_very_bytes_in_bf16(kind):
    """Where B of -1 on the diagonal makes ``I + B`` singular too: no inverse is taken (oracle 10, bad input)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64)).bfloat16()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    tt.attach(model, Bat(rank=8, form=kind), targets="0")
    with torch.no_grad():
        for p in tt.parameters(model):
            p.add_(0.01 * torch.randn(p.shape))
            p[0].copy_(-torch.eye(8))
    tt.merge(model, "default")
    assert not torch.equal(model.state_dict()["0.weight"], before["0.weight"])
    tt.unmerge(model, "default")
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_counts():
    assert [count(Bat(rank=r), LLAMA2) for r in (16, 32, 64, 128)] == [21_757_952, 43_515_904, 87_031_808, 174_063_616]
    assert count(Bat(rank=64, form="left"), LLAMA2) == 87_031_808
    assert count(Bat(rank=64, form="row"), LLAMA2) == 64 * 32 * (4 * 4096 + 2 * 4096 + 11008)
    assert count(Bat(rank=64)) == 28 * 64 * (3072 + 1024)
    assert count(Bat(rank=64, form="row")) == 28 * 64 * (3072 + 3072)
    assert count(Bat(rank=64, form="free", grid=(4, 2))) == 56 * 8 * 64 * 64


@form
def test_saves_the_input_or_one_output_alone(config):
    place = site(layer(24, 36, dtype=torch.float32))
    adapter = build(config, place)
    x = torch.randn(10, 36, requires_grad=True)
    constants = (place.module.weight, place.module.bias, *adapter.parameters())
    size = 24 if config.form == "left" else 36
    assert saved_bytes(lambda: adapter(x, place), *constants) == 10 * size * 4


@form
def test_half_base_with_float_parameters(config):
    """Value and gradients follow the float64 layer to bf16's resolution; the parameter's gradient is float32."""
    place = site(layer(8, 12, dtype=torch.bfloat16), dtype=torch.float32)
    adapter = build(config, place)
    x = torch.randn(6, 12).bfloat16().requires_grad_()
    y = adapter(x, place)
    assert y.dtype == torch.bfloat16
    got = gradients(y, [x, adapter.b])
    assert [g.dtype for g in got] == [torch.bfloat16, torch.float32]
    exact = x.double() @ adapter.weight(place.weight.double()).t() + place.module.bias.double()
    torch.testing.assert_close(y.double(), exact, atol=0.05, rtol=0.02)
    for g, w in zip(got, gradients(exact, [x, adapter.b]), strict=True):
        torch.testing.assert_close(g.double(), w.double(), atol=0.2, rtol=0.05)


@form
def test_many_tokens_in_three_axes(config):
    """More tokens than one run of the row form takes."""
    place = site(layer(8, 12))
    assert_law(build(config, place), place, tokens=(3, 8000))


@pytest.mark.parametrize("grid", [(4, 1), (2, 3), (1, 6), (2, 2)])
def test_weight_kernel_gradcheck(grid):
    place = site(layer(8, 12))
    x, b = torch.randn(3, 12, dtype=D, requires_grad=True), torch.randn(*grid, 2, 2, dtype=D, requires_grad=True)
    for recipe, base in ((BlockAffine(), place), (BlockAffine(place), Opaque(place))):
        assert torch.autograd.gradcheck(lambda x, b, recipe=recipe, base=base: rebuilt(recipe, x, base, b), (x, b))


def test_left_kernel_gradcheck():
    place = site(layer(8, 12))
    x, b = torch.randn(2, 3, 12, dtype=D, requires_grad=True), torch.randn(2, 4, 4, dtype=D, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, b: blockaffine.lifted(x, place, b), (x, b))


@pytest.mark.parametrize(
    "p",
    [{"rank": 0}, {"rank": 2.0}, {"rank": True}, {"form": "column"}, {"form": "free"}, {"grid": (2, 2)},
     {"form": "free", "grid": (2, 0)}, {"form": "free", "grid": (2, 2, 2)}, {"form": "free", "grid": 4}],
)  # fmt: skip
def test_bad_hyperparameters(p):
    with pytest.raises(ShapeMismatch):
        Bat(**p)


def test_bad_shapes_name_the_numbers():
    check = Bat.adapter_class.check
    with pytest.raises(ShapeMismatch, match=r"rank 4 .* 10 outputs .* shape \(10, 8\); nearest divisors: 2 and 5"):
        check(Bat(rank=4), site(nn.Linear(8, 10)))
    with pytest.raises(ShapeMismatch, match=r"rank 4 .* 10 inputs .* shape \(8, 10\)"):
        check(Bat(rank=4), site(nn.Linear(10, 8)))
    with pytest.raises(ShapeMismatch, match=r"rank 16 .* 8 outputs"):
        check(Bat(rank=16), site(nn.Linear(8, 8)))
    with pytest.raises(ShapeMismatch, match=r"grid=\(2, 3\): 3 does not divide the 4 blocks of 2 inputs .* 2 and 4"):
        check(Bat(rank=2, form="free", grid=(2, 3)), site(nn.Linear(8, 8)))


def test_there_is_no_dropout_and_no_scale():
    for name in ("dropout", "alpha"):
        with pytest.raises(TypeError, match=name):
            Bat(**{name: 0.1})
