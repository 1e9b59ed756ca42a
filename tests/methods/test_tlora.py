"""TLoRA: starts, gradients, the symmetry of the paper's start, counts, memory, merging, bad input (arXiv 2501.08727)."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from lowrank_places import adapted
from structured_places import Opaque, assert_law, build, count, gradients, layer, site
from torch import nn

import trimtab as tt
from trimtab.core.account import saved_bytes
from trimtab.kernels.ring import ring_matrix
from trimtab.methods.reparameterized.tlora import TLoRAAdapter, transform_penalty

D = torch.float64
BROKEN = {"init": "broken_symmetry"}


def quiet(**config) -> tt.TLoRA:
    """A config whose warning (equal slices) is not the point."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tt.TLoRA(**config)


def transform(adapter: TLoRAAdapter) -> torch.Tensor:
    return ring_matrix(tuple(adapter.t))


@pytest.mark.parametrize("residual", ["lora", "ttv", "ttm", None])
@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_starts_at_the_base(rank, residual):
    place = site(layer(30, 24))
    for init in ("paper", "broken_symmetry"):
        adapter = build(quiet(transform_rank=rank, init=init, residual=residual, shapes=((2, 3, 4), (2, 3, 5))), place, move=0)
        torch.testing.assert_close(transform(adapter), torch.eye(24, dtype=D), atol=4e-16, rtol=4e-16)
        x = torch.randn(5, 24, dtype=D)
        torch.testing.assert_close(adapter(x, place), place(x), atol=1e-14, rtol=1e-13)


CONFIGS = [
    dict(rank=2),
    dict(rank=2, rslora=False, alpha=3.0, transform_rank=2, **BROKEN),
    dict(rank=2, residual="ttv", transform_rank=3, **BROKEN),
    dict(rank=3, residual="ttm"),
    dict(residual=None, transform_rank=2, **BROKEN),
    dict(rank=2, residual="lora", transform_rank=0),
    dict(rank=2, residual="ttv", transform_rank=0),
    dict(rank=2, residual="ttm", transform_rank=0),
]


@pytest.mark.parametrize("opaque", [False, True])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_law(config, opaque):
    place = site(layer(30, 24))
    adapter = build(tt.TLoRA(**config, order=3), place)
    assert_law(adapter, Opaque(place) if opaque else place)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_runs_of_tokens_add_up(config, monkeypatch):
    monkeypatch.setattr("trimtab.kernels.turned._RUN", 1)
    place = site(layer(30, 24))
    adapter = build(tt.TLoRA(**config, order=3), place)
    assert_law(adapter, place, tokens=(80,))
    x = torch.zeros(0, 24, dtype=D, requires_grad=True)
    y = adapter(x, place)
    y.sum().backward()
    assert y.shape == (0, 30) and x.grad.shape == x.shape
    assert all(p.grad.count_nonzero() == 0 for p in adapter.parameters())


@pytest.mark.parametrize("config", CONFIGS[:5], ids=str)
def test_weight_is_the_definition(config):
    place = site(layer(30, 24))
    config = tt.TLoRA(**config, order=3)
    adapter = build(config, place)
    W = place.weight
    want = W @ transform(adapter)
    s = config.alpha / (math.sqrt(config.rank) if config.rslora else config.rank)
    if config.residual == "lora":
        want = want + s * adapter.b[0] @ adapter.c[0]
    elif config.residual == "ttv":
        B = torch.einsum("iab,jbc,kcd->ijkad", *adapter.b).reshape(30, 2, 2)
        C = torch.einsum("iab,jbc,kcd->ijkad", *adapter.c).reshape(24, 2, 2)
        want = want + s * torch.einsum("oab,iba->oi", B, C)
    elif config.residual == "ttm":
        want = want + s * ring_matrix(tuple(adapter.b))
    torch.testing.assert_close(adapter.weight(W), want)


def test_at_the_start_only_the_first_core_of_the_ring_residual_has_a_gradient():
    place = site(layer(30, 24))
    adapter = build(tt.TLoRA(rank=2, residual="ttv", order=3), place, move=0)
    x = torch.randn(9, 24, dtype=D, requires_grad=True)
    first, *others = gradients(adapter(x, place), [*adapter.b, *adapter.c])
    assert first.count_nonzero() == first.numel()
    assert len(others) == 5 and all(g.count_nonzero() == 0 for g in others)


def target() -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(24, 24, generator=rng, dtype=D))[0]
    return torch.randn(64, 24, generator=rng, dtype=D), 0.5 * (Q + torch.eye(24, dtype=D))


def trained(config: tt.TLoRA, lr: float, steps: int = 60) -> tuple[TLoRAAdapter, float]:
    """The adapter after Adam steps towards ``W' = W M``, M half orthogonal, half the identity; and its loss."""
    place = site(layer(24, 24, bias=False))
    adapter = build(config, place, move=0)
    x, M = target()
    y = x @ (place.weight @ M).t()
    optimizer = torch.optim.Adam(adapter.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (adapter(x, place) - y).square().mean()
        loss.backward()
        optimizer.step()
    return adapter, loss.item()


def test_the_papers_start_never_leaves_the_kronecker_products():
    """Equal slices get equal gradients: rank R at lr / R is rank 1 at lr, and it collapses to rank 1 without a change."""
    shapes = ((2, 3, 4),)
    _, one = trained(quiet(residual=None, shapes=shapes), 0.02)
    for rank in (2, 3):
        adapter, loss = trained(quiet(residual=None, transform_rank=rank, shapes=shapes), 0.02 / rank)
        assert loss == pytest.approx(one, rel=1e-6)
        for core in adapter.t:
            assert (core - core[:, :, :1, :1]).abs().max() < 2e-7
    adapter, _ = trained(quiet(residual=None, transform_rank=2, shapes=shapes), 0.01)
    assert all((core - core[:, :, :1, :1]).abs().max() < 2e-7 for core in adapter.t)  # equal but for rounding
    before = transform(adapter)
    adapter.collapse()
    assert adapter.config.transform_rank == 1 and all(core.shape[2:] == (1, 1) for core in adapter.t)
    torch.testing.assert_close(transform(adapter), before)


def test_a_broken_symmetry_uses_its_rank():
    shapes = ((2, 3, 4),)
    _, one = trained(quiet(residual=None, shapes=shapes), 0.02)
    for rank in (2, 3):
        adapter, loss = trained(quiet(residual=None, transform_rank=rank, shapes=shapes, **BROKEN), 0.02)
        assert loss < 0.8 * one
        assert all((core - core[:, :, :1, :1]).abs().max() > 1e-2 for core in adapter.t)
        with pytest.raises(tt.Unsupported, match="slices that differ"):
            adapter.collapse()


def test_a_collapsed_adapter_saves_and_loads(tmp_path):
    model, adapter, W = adapted(quiet(rank=2, transform_rank=2, order=2))
    adapter.collapse()
    tt.save(model, tmp_path)
    fresh = nn.Sequential(nn.Linear(16, 12, dtype=D))
    fresh.load_state_dict({"0.weight": W, "0.bias": model[0]._parameters["bias"]})
    tt.load(fresh, tmp_path)
    x = torch.randn(5, 16, dtype=D)
    torch.testing.assert_close(fresh(x), model(x))


def test_penalties_are_zero_at_the_papers_start_alone():
    model, adapter, _ = adapted(quiet(rank=2, transform_rank=2, order=2))
    for kind in ("identity", "orthogonal"):
        assert transform_penalty(model, kind).item() < 1e-30
    with torch.no_grad():
        adapter.t[0] += 0.1
    assert transform_penalty(model, "identity").item() == pytest.approx(adapter.t[0].numel() * 0.01)
    penalty = transform_penalty(model, "orthogonal")
    penalty.backward()
    assert penalty > 0 and adapter.t[0].grad.abs().max() > 0
    with pytest.raises(tt.NoMatch, match="found 0"):
        transform_penalty(nn.Linear(3, 3))
    with pytest.raises(tt.NoMatch, match="'sparse'"):
        transform_penalty(model, "sparse")


def stable_diffusion() -> tuple:
    """(out, in) and how many: 5 blocks of 320, 5 of 640, 6 of 1280; self attention, and cross attention to 768."""
    places = []
    for width, blocks in ((320, 5), (640, 5), (1280, 6)):
        places += [((width, width), 6 * blocks), ((width, 768), 2 * blocks)]
    return tuple(places)


def sdxl() -> tuple:
    places = []
    for width, blocks in ((640, 10), (1280, 60)):
        places += [((width, width), 6 * blocks), ((width, 2048), 2 * blocks)]
    return tuple(places)


def test_counts_of_stable_diffusion():
    places = stable_diffusion()
    assert count(tt.LoRA(rank=4), places) == 797_184
    assert count(quiet(transform_rank=2, residual=None), places) == 144_256
    assert count(quiet(transform_rank=2, rank=4), places) == 941_440
    assert count(quiet(transform_rank=2, residual="ttv", rank=6), places) == 400_288
    assert count(tt.TLoRA(transform_rank=0, residual="ttv", rank=6), places) == 256_032


def test_counts_of_sdxl():
    places = sdxl()
    assert count(tt.LoRA(rank=1), places) == 1_451_520
    assert count(tt.TLoRA(residual=None), places) == 245_520
    assert count(tt.TLoRA(residual="ttv", rank=2), places) == 396_720
    assert count(tt.TLoRA(rank=1), places) == 1_697_040
    rings = [count(tt.TLoRA(transform_rank=0, residual="ttv", rank=r), places) for r in (1, 2, 3, 4)]
    assert rings == [37_800, 151_200, 340_200, 604_800]
    assert count(tt.TLoRA(transform_rank=0, residual="ttm", rank=2), (((640, 320), 1),)) == 4 * (8 * 4 + 8 * 8 + 10 * 10)


def test_starting_spreads():
    place = site(nn.Linear(1280, 1280, bias=False))
    std = lambda cores: [round(core.std().item(), 2) for core in cores]  # noqa: E731
    code = build(tt.TLoRA(residual="ttv", rank=6, transform_rank=0), place, move=0)
    assert code.b[0].count_nonzero() == 0
    assert code.b[1].std().item() == pytest.approx(math.sqrt(10) / 36, rel=0.15)
    assert std(code.c) == pytest.approx([8**-0.5, 10**-0.5, 16**-0.5], rel=0.15)
    mup = build(tt.TLoRA(residual="ttv", rank=6, transform_rank=0, tr_init="mup"), place, move=0)
    assert mup.c[2].std().item() == pytest.approx(1 / (16 * math.sqrt(6)), rel=0.15)
    assert mup.b[2].std().item() == pytest.approx(1 / (16 * math.sqrt(6)), rel=0.15)
    lora = build(tt.TLoRA(rank=4), place, move=0)
    assert lora.c[0].std().item() == pytest.approx((3 * 1280) ** -0.5, rel=0.05)
    ttm = build(tt.TLoRA(rank=4, residual="ttm"), place, move=0)
    assert ttm.b[0].count_nonzero() == 0
    assert ttm.b[2].std().item() == pytest.approx((3 * 16 * 16) ** -0.5, rel=0.05)


def test_merge_and_unmerge_even_if_the_transform_is_singular():
    """Merged, the layer gives the same; dividing by T gives W back; the library keeps W and needs no inverse."""
    config = tt.TLoRA(rank=2, residual="ttv", transform_rank=2, order=2, **BROKEN)
    model, adapter, W = adapted(config)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.05 * torch.randn_like(p))
    x = torch.randn(5, 16, dtype=D)
    before, T = model(x), transform(adapter)
    merged = adapter.weight(W)
    delta = merged - W @ T
    assert torch.linalg.cond(T) < 1e3
    torch.testing.assert_close(torch.linalg.solve(T.t(), (merged - delta).t()).t(), W)
    tt.merge(model, "default")
    torch.testing.assert_close(model[0]._parameters["weight"], merged)
    torch.testing.assert_close(model(x), before)
    tt.unmerge(model, "default")
    assert torch.equal(model[0]._parameters["weight"], W)
    with torch.no_grad():
        adapter.t[0].zero_()
    tt.merge(model, "default")
    tt.unmerge(model, "default")
    assert torch.equal(model[0]._parameters["weight"], W)


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.get("transform_rank") != 0], ids=str)
def test_saves_the_input_alone(config):
    place = site(layer(30, 24, dtype=torch.float32))
    adapter = build(tt.TLoRA(**config, order=3), place)
    x = torch.randn(50, 24, requires_grad=True)
    with saved_bytes(place.module, adapter) as saved:
        adapter(x, place)
    assert saved.total == x.numel() * 4


def test_no_product_of_two_weights(monkeypatch):
    """Forward and backward form neither T, nor W T, nor a weight's gradient."""
    place = site(layer(60, 48, bias=False))
    adapter = build(tt.TLoRA(rank=2, order=3), place)
    x = torch.randn(7, 48, dtype=D, requires_grad=True)
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.numel() in (48 * 48, 60 * 48) and result.dim() == 2:
                made.append((func, tuple(result.shape)))
            return result

    with Watch():
        adapter(x, place).sum().backward()
    assert {shape for func, shape in made if "aten.t." not in str(func) and "transpose" not in str(func)} <= {(60, 48)}
    assert not [f for f, _ in made if "mm" in str(f)]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"residual": "tt"}, "lora.*ttv.*ttm"),
        ({"rank": 0}, "rank"),
        ({"transform_rank": 0, "residual": None}, "nothing to train"),
        ({"transform_rank": -1}, "transform_rank"),
        ({"alpha": 0.0}, "alpha"),
        ({"init": "random"}, "broken_symmetry"),
        ({"tr_init": "small"}, "mup"),
        ({"order": 1}, "order"),
        ({"shapes": ((12,),)}, "shapes"),
    ],
)
def test_bad_hyperparameters(bad, words):
    with pytest.raises(ValueError, match=words):
        tt.TLoRA(**bad)


def test_equal_slices_are_warned_of():
    with pytest.warns(UserWarning, match="equivalent to rank 1 at 2 times the learning rate"):
        tt.TLoRA(transform_rank=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tt.TLoRA(transform_rank=2, init="broken_symmetry")
        tt.TLoRA()


def test_bad_places_name_the_numbers():
    place = site(nn.Linear(512, 640))
    with pytest.raises(ValueError, match=r"width 512 of fc is known; give it, such as shapes=\(\(8, 8, 8\),\), or order=3"):
        TLoRAAdapter.check(tt.TLoRA(shapes=((8, 8, 10),)), place)
    with pytest.raises(ValueError, match=r"shape \(4, 8, 10\) has the product 320, .* \[512, 640\]"):
        TLoRAAdapter.check(tt.TLoRA(shapes=((8, 8, 8), (4, 8, 10))), place)
    with pytest.raises(ValueError, match=r"\(8, 8, 10\) for its outputs and \(16, 32\) for its inputs"):
        TLoRAAdapter.check(tt.TLoRA(residual="ttm", shapes=((16, 32),)), place)
    TLoRAAdapter.check(tt.TLoRA(shapes=((8, 8, 8),)), place)
    TLoRAAdapter.check(tt.TLoRA(transform_rank=0), place)
    assert tt.TLoRA(order=2).shape_of(320) == (16, 20) and tt.TLoRA(order=3).shape_of(320) == (4, 8, 10)


def test_shapes_survive_a_manifest(tmp_path):
    model, _, W = adapted(tt.TLoRA(rank=2, residual="ttv", shapes=((2, 8), (3, 4))))
    tt.save(model, tmp_path)
    fresh = nn.Sequential(nn.Linear(16, 12, dtype=D))
    fresh.load_state_dict({"0.weight": W, "0.bias": model[0]._parameters["bias"]})
    tt.load(fresh, tmp_path)
    adapter = next(m for m in fresh.modules() if isinstance(m, TLoRAAdapter))
    assert adapter.config == tt.TLoRA(rank=2, residual="ttv", shapes=[[2, 8], [3, 4]])
    hash(adapter.config)
