"""HUT: oracles of the three readings, the two block forms, gauge, gradients, memory, counts, bad input (arXiv 2409.13501)."""

from __future__ import annotations

import pytest
import torch
from structured_places import Opaque, assert_law, build, count, gradients, layer, saved_bytes, site
from torch import nn

import trimtab as tt
from trimtab.core.errors import CheckpointMismatch, ShapeMismatch
from trimtab.core.kinds import LinearSite, PartOperation
from trimtab.core.site import Rows
from trimtab.kernels import blockscale
from trimtab.kernels.blockscale import block_scale, blockscaled, on_activations
from trimtab.methods.reparameterized.hut import HUT

D = torch.float64
READINGS = [HUT(rank=4), HUT(rank=1), HUT(rank=3, reading="sum"), HUT(rank=2, reading="power"), HUT(rank=2, affine=False)]
reading = pytest.mark.parametrize("config", READINGS, ids=str)
forms = pytest.mark.parametrize("form", ["tiles", "one tile", "activations"])


@pytest.fixture
def choose(monkeypatch):
    """Force a form of the block kernel on shapes that are too small for the choice."""

    def chosen(form: str) -> None:
        monkeypatch.setattr(blockscale, "on_activations", lambda *_: form == "activations")
        monkeypatch.setattr(blockscale, "_TILE", 40 if form == "tiles" else 1 << 20)

    return chosen


def factor(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.rand(rows, columns, dtype=D, generator=torch.Generator().manual_seed(seed)) + 0.5


def test_worked_example():
    """The brief's numbers, in its layout x W: here W is transposed and the factors are deviations from one."""
    place = site(layer(4, 2, bias=False))
    adapter = build(HUT(rank=2, affine=False), place)
    with torch.no_grad():
        place.module.weight.copy_(torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]], dtype=D).t())
        adapter.a.copy_(torch.tensor([[1.0, 2], [3, 4]], dtype=D).t() - 1)
        adapter.b.copy_(torch.tensor([[1.0, 0, -1, 2], [2, 1, 1, 0.5]], dtype=D) - 1)
    want = torch.tensor([[1.0, 0, -6, 16], [30, 18, 28, 16]], dtype=D)
    assert torch.equal(adapter.weight(place.weight), want.t())
    assert torch.equal(adapter(torch.ones(2, dtype=D), place), torch.tensor([31.0, 18, 22, 32], dtype=D))


@reading
def test_starts_at_the_base(config):
    """Oracle 1: the weight and the derived form to the bit, the fast form too where it rounds as the base does."""
    place = site(layer(16, 12, dtype=torch.float32))
    adapter = build(config, place, move=0)
    x = torch.randn(50, 12)
    assert torch.equal(adapter.weight(place.weight), place.weight)
    assert torch.equal(adapter.derived(x, place), place(x))
    torch.testing.assert_close(adapter(x, place), place(x))


def test_at_rank_one_all_readings_are_one_layer():
    """Oracle 2: x (a . W . b) == ((x . a) W) . b."""
    place = site(layer(8, 12, bias=False))
    adapters = [build(HUT(rank=1, affine=False, reading=r), place) for r in ("tile", "sum", "power")]
    first = adapters[0]
    x, (a, b) = torch.randn(5, 12, dtype=D), (t[0] for t in first.scales())
    for adapter in adapters:
        torch.testing.assert_close(adapter.weight(place.weight), first.weight(place.weight), rtol=0, atol=0)
        torch.testing.assert_close(adapter(x, place), ((x * a) @ place.weight.t()) * b)


@pytest.mark.parametrize("opaque", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@forms
@reading
def test_law(config, bias, opaque, form, choose):
    """Oracles 3 and 8: the fast forms are the weight form in value and every gradient, with a bias of the base and without."""
    choose(form)
    place = site(layer(8, 12, bias=bias))
    assert_law(build(config, place, move=0.3), Opaque(place) if opaque else place, atol=1e-12)


@forms
@pytest.mark.parametrize("blocks", [1, 2])
def test_law_on_rows_of_a_fused_matrix(blocks, form, choose):
    choose(form)
    place = site(layer(16, 12))
    place.rows = Rows(start=0, size=8 // blocks, blocks=blocks, stride=8)
    place.shape = (8, 12)
    whole = LinearSite(module=place.module, path="fc", tensor="weight", shape=(16, 12))
    x = torch.randn(5, 12, dtype=D, requires_grad=True)
    assert_law(build(HUT(rank=4), place), PartOperation(place, whole, x, whole(x)))


@forms
@pytest.mark.parametrize("frozen", ["x", "a", "b"])
def test_a_gradient_that_nobody_needs_is_left_out(frozen, form, choose):
    choose(form)
    place = site(layer(8, 12))
    given = {"x": torch.randn(3, 5, 12, dtype=D), "a": factor(4, 12, 0), "b": factor(4, 8, 1)}
    wanted = [t.requires_grad_() for name, t in given.items() if name != frozen]
    got = blockscaled(given["x"], place, given["a"], given["b"])
    want = given["x"] @ block_scale(place.weight, given["a"], given["b"]).t()
    for g, w in zip(gradients(got, wanted), gradients(want, wanted), strict=True):
        torch.testing.assert_close(g, w)
    assert given[frozen].grad is None


def test_ranks_of_the_broadcast_factors():
    """Oracle 4: EA and EB have rank r, their product at most r^2 (8 = all of it, at 12 x 8 and r = 4)."""
    ones, a, b = torch.ones(8, 12, dtype=D), factor(4, 12, 0), factor(4, 8, 1)
    assert torch.linalg.matrix_rank(block_scale(ones, a, torch.ones_like(b))) == 4
    assert torch.linalg.matrix_rank(block_scale(ones, torch.ones_like(a), b)) == 4
    assert torch.linalg.matrix_rank(block_scale(ones, a, b)) == 8
    repeated = a.t().repeat_interleave(2, 1) * b.repeat_interleave(3, 0)  # the paper's layout, by its own words
    assert torch.equal(block_scale(ones, a, b), repeated.t())


@forms
def test_gradient_at_the_start(form, choose):
    """Oracle 5: H = G * W; its sums over the columns of a block, and over the rows."""
    choose(form)
    place = site(layer(8, 12))
    adapter = build(HUT(rank=4), place, move=0)
    x, dy = torch.randn(5, 12, dtype=D), torch.randn(5, 8, dtype=D)
    adapter(x, place).backward(dy)
    H = (dy.t() @ x * place.weight).t()  # (in, out), as the oracle writes it
    torch.testing.assert_close(adapter.a.grad, H.view(12, 4, 2).sum(-1).t())
    torch.testing.assert_close(adapter.b.grad, H.view(4, 3, 8).sum(1))


def test_gauge():
    """Oracle 6: (c a, b / c), and (gamma, b) -> (gamma / g, g b), leave the weight alone."""
    place = site(layer(8, 12))
    adapter = build(HUT(rank=4), place, move=0.3)
    before = adapter.weight(place.weight).detach()
    with torch.no_grad():
        adapter.a.add_(1).mul_(-3).sub_(1)
        adapter.b.add_(1).div_(-3).sub_(1)
    torch.testing.assert_close(adapter.weight(place.weight), before)
    with torch.no_grad():
        g = factor(1, 8, 5)[0]
        adapter.gamma.add_(1).div_(g).sub_(1)
        adapter.b.add_(1).mul_(g).sub_(1)
    torch.testing.assert_close(adapter.weight(place.weight), before)


@reading
def test_a_sparse_base_stays_sparse(config):
    """Oracle 7: two of four entries are zero, before and after."""
    place = site(layer(16, 12))
    with torch.no_grad():
        place.module.weight.view(-1, 4)[:, :2] = 0
    merged = build(config, place, move=0.3).weight(place.weight).detach()
    assert torch.equal(merged == 0, place.weight == 0)


def test_sum_gives_all_rows_one_gradient():
    """Oracle 9: to the last bit; and the effective factor starts at one whatever r is."""
    place = site(layer(8, 12, dtype=torch.float32))
    adapter = build(HUT(rank=7, reading="sum"), place, move=0.1)
    adapter(torch.randn(5, 12), place).square().sum().backward()
    assert (adapter.a.grad == adapter.a.grad[0]).all() and (adapter.b.grad == adapter.b.grad[0]).all()
    assert adapter.a.grad.abs().max() > 0


@pytest.mark.parametrize("bias", [False, True])
def test_affine_merge(bias):
    """Oracle 8: bias <- gamma bias + beta, on a layer that had none too; the base comes back to the bit."""
    model = nn.Sequential(layer(8, 12, bias=bias))
    x, before = torch.randn(5, 12, dtype=D), {k: v.clone() for k, v in model.state_dict().items()}
    tt.attach(model, HUT(rank=4), targets=["0"], dtype=D)
    with torch.no_grad():
        for p in tt.parameters(model):
            p.add_(torch.randn(p.shape, dtype=D, generator=torch.Generator().manual_seed(p.numel())), alpha=0.3)
    want = model(x)
    tt.merge(model, "default")
    torch.testing.assert_close(model(x), want)
    assert model[0]._parameters["bias"] is not None
    tt.unmerge(model, "default")
    tt.detach(model, "default")
    assert model.state_dict().keys() == before.keys() and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@forms
def test_ten_steps_leave_the_base_alone(form, choose):
    """Oracle 11; and weight decay on the stored deviations pulls towards the base, not towards zero."""
    choose(form)
    model = nn.Sequential(layer(8, 12, dtype=torch.float32)).requires_grad_(False)
    W = model[0]._parameters["weight"].clone()
    tt.attach(model, HUT(rank=4), targets=["0"])
    optimizer = torch.optim.AdamW(tt.parameters(model), lr=1e-2, weight_decay=0.1)
    x, losses = torch.randn(64, 12), []
    for _ in range(10):
        loss = (model(x) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and torch.equal(model[0]._parameters["weight"], W) and model[0]._parameters["weight"].grad is None
    tt.detach(model, "default")
    tt.attach(model, HUT(rank=4), targets=["0"])
    still = torch.optim.AdamW(tt.parameters(model), lr=1e-2, weight_decay=0.1)
    for p in tt.parameters(model):
        p.grad = torch.zeros_like(p)
    still.step()
    assert torch.equal(tt.effective_weight(model, "0"), W)


def test_saved_bytes_of_each_form(choose):
    """Tiles keep x; activations x and r outputs; vectors x and one output: nothing of W's size."""
    place = site(layer(64, 64, bias=False, dtype=torch.float32))
    x = torch.randn(8, 64, requires_grad=True)
    for form, rank, want in (("tiles", 4, 1), ("activations", 4, 5), ("tiles", 1, 2)):
        choose(form)
        adapter = build(HUT(rank=rank, affine=False), place)
        assert saved_bytes(lambda: adapter(x, place), place.weight, *adapter.parameters()) <= want * x.nbytes + 4 * 64 * 4 * 4  # noqa: B023


def test_vectors_make_nothing_of_the_weights_size(choose):
    """Oracle 11: at r = 1 no tensor as large as W is ever made, forward or backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.made = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr():
                    self.made = max(self.made, t.untyped_storage().nbytes())
            return out

    choose("one tile")
    place = site(layer(256, 256, dtype=torch.float32))
    weight = place.module.weight
    x = torch.randn(4, 256, requires_grad=True)
    for config, small in ((HUT(rank=1), True), (HUT(rank=3, reading="sum"), True), (HUT(rank=4), False)):
        adapter = build(config, place)
        with Largest() as largest:
            adapter(x, place).sum().backward()
        assert (largest.made < weight.nbytes / 4) is small


def test_a_gain_in_half_precision_is_rounded_with_each_product_alone():
    """1 + 3/256 lies between two bfloat16 numbers, 1/256 off either; the products are right on average."""
    place = site(layer(256, 256, bias=False, dtype=torch.bfloat16), dtype=torch.bfloat16)
    x = torch.randn(512, 256).bfloat16()
    base = place(x).float()
    for config in (HUT(rank=1), HUT(rank=4)):
        adapter = build(config, place, move=0).to(torch.bfloat16)
        with torch.no_grad():
            adapter.b.fill_(3 / 256)
        gain = (adapter(x, place).float() * base).sum() / base.square().sum()
        assert abs(gain - 1 - 3 / 256) < 1e-3


def test_counts():
    """RoBERTa-large, q and v of 24 layers: LoRA's count, and the affine's."""
    shapes = (((1024, 1024), 48),)
    assert count(HUT(affine=False), shapes) == 786_432
    assert count(HUT(), shapes) == 884_736
    assert count(HUT(rank=1, affine=False), shapes) == 98_304
    assert count(HUT(rank=5, reading="power", affine=False), shapes) == 98_304


def test_the_choice_of_a_form():
    """Few blocks or few tokens: activations; small blocks never."""
    assert on_activations(1024, 4096, 4096, 2) and on_activations(16, 1024, 1024, 8)
    assert not on_activations(1024, 1024, 1024, 8) and not on_activations(16, 128, 1024, 4)


def test_bad_input():
    with pytest.raises(ShapeMismatch, match="at least 1"):
        HUT(rank=0)
    with pytest.raises(ShapeMismatch, match=r"rank 5 does not divide the 8 outputs .* 4 and 8"):
        HUT.adapter_class.check(HUT(rank=5), site(layer(8, 12)))
    with pytest.raises(ShapeMismatch, match="tile, sum, power"):
        HUT(reading="hadamard")
    HUT.adapter_class.check(HUT(rank=5, reading="sum"), site(layer(8, 12)))


def test_a_dead_adapter_is_refused(tmp_path):
    model = nn.Sequential(layer(8, 12))
    tt.attach(model, HUT(rank=4), targets=["0"])
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if name.endswith(".a")).fill_(-1)
    tt.save(model, tmp_path / "hut")
    with pytest.raises(CheckpointMismatch, match="dead adapter"):
        tt.load(nn.Sequential(layer(8, 12)), tmp_path / "hut")
