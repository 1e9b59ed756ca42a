"""SoKA: the rearrangement, the start, the choice of terms, both forms, counts, memory, bad input (arXiv 2506.15251)."""

from __future__ import annotations

import math

import pytest
import torch
from lowrank_places import adapted
from structured_places import Opaque, assert_law, build, count, gradients, layer, site
from torch import nn

import trimtab as tt
from trimtab.core.account import saved_bytes
from trimtab.kernels.beside import beside
from trimtab.kernels.kpsvd import energy_terms, rearrange, restore
from trimtab.kernels.kronecker import kron
from trimtab.kernels.kroneckersum import DenseKroneckerSum, KroneckerSum, dense_is_cheaper, kron_sum
from trimtab.kernels.rebuilt import rebuilt
from trimtab.methods.reparameterized import soka

D = torch.float64
SHAPES = [(4, 3, 5, 6), (6, 2, 3, 8), (2, 8, 9, 3), (1, 3, 7, 4)]  # (m, n, p, q)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=D)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_starts_at_the_base(dtype):
    """The start is subtracted after its rounding to the adapter's dtype, so that it cancels whatever that is."""
    place = site(layer(20, 18, dtype=torch.float32), dtype=dtype)
    adapter = build(tt.SoKA(rank=5), place, move=0)
    W = place.weight
    assert torch.equal(adapter.weight(W), W)
    for name in "suv":
        assert torch.equal(getattr(adapter, name), getattr(adapter, name + "0"))
    residual = W - kron_sum(*(t.to(W.dtype) for t in (adapter.s0, adapter.u0, adapter.v0)))  # of the rounded factors
    torch.testing.assert_close(residual + kron_sum(*(t.to(W.dtype) for t in (adapter.s, adapter.u, adapter.v))), W)
    x = torch.randn(3, 18)
    torch.testing.assert_close(adapter(x, place), place(x), atol=1e-5 if dtype != torch.bfloat16 else 1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_three_forms_agree(shape):
    m, n, p, q = shape
    place = site(layer(m * p, n * q))
    params = [random(3), random(3, m, n), random(3, p, q), random(2), random(2, m, n), random(2, p, q)]
    x = random(5, n * q)
    dW = kron_sum(*params[:3]) - kron_sum(*params[3:])
    want = place(x) + x @ dW.t()
    scale = want.abs().max()
    for got in (
        beside(KroneckerSum(shape), x, place, *params),
        place(x) + KroneckerSum(shape).map(x, *params),
        rebuilt(DenseKroneckerSum(shape), x, place, *params),
        x @ DenseKroneckerSum(shape).remake(None, (), *params)[0].t() + place(x),
    ):
        assert (got - want).abs().max() < 3e-15 * scale * 10
    X = x.view(5, n, q)
    by_definition = sum(params[0][k] * (params[1][k] @ X @ params[2][k].t()) for k in range(3)).flatten(1)
    torch.testing.assert_close(x @ kron_sum(*params[:3]).t(), by_definition)


@pytest.mark.parametrize("form", [KroneckerSum, DenseKroneckerSum])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_the_rearranged_weight_gradient(shape, form):
    m, n, p, q = shape
    place = site(layer(m * p, n * q))
    params = [t.requires_grad_() for t in (random(3), random(3, m, n), random(3, p, q))]
    params += [random(2), random(2, m, n), random(2, p, q)]
    x = random(7, n * q).requires_grad_()
    run = beside if form is KroneckerSum else rebuilt
    y = run(form(shape), x, place, *params)
    gx, gs, gU, gV = gradients(y, [x, *params[:3]])
    seed = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y)
    s, U, V = (t.detach() for t in params[:3])
    R = rearrange(seed.t() @ x.detach(), shape)
    torch.testing.assert_close(gU, torch.stack([s[k] * (R @ V[k].flatten()).view(m, n) for k in range(3)]))
    torch.testing.assert_close(gV, torch.stack([s[k] * (R.t() @ U[k].flatten()).view(p, q) for k in range(3)]))
    torch.testing.assert_close(gs, torch.stack([U[k].flatten() @ R @ V[k].flatten() for k in range(3)]))
    torch.testing.assert_close(gx, seed @ (place.weight + kron_sum(s, U, V) - kron_sum(*params[3:])))


@pytest.mark.parametrize("opaque", [False, True])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(("out", "fan_in"), [(24, 36), (36, 24), (30, 16)])
def test_law_in_both_forms(out, fan_in, dense, opaque, monkeypatch):
    monkeypatch.setattr(soka, "dense_is_cheaper", lambda *a, **k: dense)
    place = site(layer(out, fan_in))
    assert_law(build(tt.SoKA(rank=3), place), Opaque(place) if opaque else place)


@pytest.mark.parametrize("form", ["KroneckerSum", "DenseKroneckerSum"])
def test_gradcheck(form, monkeypatch):
    monkeypatch.setattr(soka, "dense_is_cheaper", lambda *a, **k: form == "DenseKroneckerSum")
    place = site(layer(6, 8))
    adapter = build(tt.SoKA(rank=2), place)
    x = random(3, 8).requires_grad_()

    def run(x, s, u, v):
        return torch.func.functional_call(adapter, {"s": s, "u": u, "v": v}, (x, place))

    assert torch.autograd.gradcheck(run, (x, adapter.s, adapter.u, adapter.v))


def test_the_form_follows_the_break_even_counts():
    square = (64, 64, 64, 64)
    infer = dict(learn=False, through=False)
    assert [dense_is_cheaper(t, square, 1, **infer) for t in (31, 32, 33)] == [False, False, True]
    train = dict(learn=True, through=True)
    many = 10**7  # beyond any effect of what a step costs once
    assert [dense_is_cheaper(many, square, r, **train) for r in (10, 11)] == [False, True]  # 10.7 without a frozen start
    assert [dense_is_cheaper(many, square, r, r, **train) for r in (6, 7)] == [False, True]  # 6.4 with one
    assert not dense_is_cheaper(4, square, 16, 16, **train)


@pytest.mark.parametrize(("tokens", "rank", "train", "dense"), [(2, 2, True, False), (2000, 9, True, True), (200, 1, False, True)])
def test_forward_takes_the_cheaper_form(tokens, rank, train, dense, monkeypatch):
    place = site(layer(64, 64, dtype=torch.float32))
    adapter = build(tt.SoKA(rank=rank), place)
    taken = []
    for name in ("beside", "rebuilt"):
        whole = getattr(soka, name)
        monkeypatch.setattr(soka, name, lambda rule, *a, whole=whole, name=name: (taken.append(name), whole(rule, *a))[1])
    with torch.set_grad_enabled(train):
        adapter(torch.randn(tokens, 64, requires_grad=train), place)
    assert taken == ["rebuilt" if dense else "beside"]


def test_rank_of_the_update():
    U, V = random(8, 8), random(8, 8, seed=1)
    assert torch.linalg.matrix_rank(kron(U, V)) == 64
    assert torch.linalg.matrix_rank(kron_sum(torch.ones(1, dtype=D), U[None], V[None])) == 64
    thin, other = random(8, 1) @ random(1, 8, seed=3), random(8, 2) @ random(2, 8, seed=4)
    terms = kron_sum(torch.ones(2, dtype=D), torch.stack([thin, other]), torch.stack([V, thin]))
    assert torch.linalg.matrix_rank(terms) <= 1 * 8 + 2 * 1


def with_spectrum(values: list[float], shape: tuple[int, int, int, int]) -> torch.Tensor:
    m, n, p, q = shape
    left = torch.linalg.qr(random(m * n, len(values)))[0]
    right = torch.linalg.qr(random(p * q, len(values), seed=1))[0]
    return restore(left * torch.tensor(values, dtype=D) @ right.t(), shape)


@pytest.mark.parametrize(
    ("config", "r"),
    [
        (dict(), 3),  # energy 3, chord 4
        (dict(tau=0.8), 2),
        (dict(tau=0.99), 4),
        (dict(tau=0.99, elbow="second_difference"), 3),
        (dict(tau=1.0, elbow="off"), 8),
        (dict(tau=0.99, r_max=2), 2),
        (dict(tau=0.3, r_min=5), 5),
        (dict(rank=7), 7),
    ],
)
def test_terms_of_a_place_follow_its_spectrum(config, r):
    model = nn.Sequential(nn.Linear(16, 16, dtype=D))
    with torch.no_grad():
        model[0].weight.copy_(with_spectrum([10, 8, 6, 1, 0.8, 0.6, 0.4, 0.2], (4, 4, 4, 4)))
    table = tt.attach(model, tt.SoKA(**{"r_max": 8, "iterations": None} | config), targets="0")
    adapter = next(m for m in model.modules() if isinstance(m, soka.SoKAAdapter))
    assert adapter.s.shape[0] == r
    assert list(table)[0]["parameters"] == r * 33


@pytest.mark.parametrize(("shape", "needed"), [((16, 32, 32, 16), 261), ((32, 32, 32, 32), 522)])
def test_a_random_weight_has_a_flat_spectrum_which_r_max_cuts(shape, needed):
    m, n, p, q = shape
    W = torch.randn(m * p, n * q, generator=torch.Generator().manual_seed(0))
    s = torch.linalg.svdvals(rearrange(W, shape))
    assert abs(energy_terms(s.tolist(), W.square().sum().item(), 0.9) - needed) <= 2
    adapter = build(tt.SoKA(shape=shape, elbow="off", r_max=4), site(_with(W)), move=0)
    assert adapter.s.shape == (4,)


def _with(W: torch.Tensor) -> nn.Linear:
    module = nn.Linear(W.shape[1], W.shape[0], bias=False, dtype=W.dtype)
    module.weight = nn.Parameter(W)
    return module


def test_a_zero_matrix_gives_orthonormal_factors_and_zero_values():
    place = site(_with(torch.zeros(20, 18, dtype=D)))
    adapter = build(tt.SoKA(r_min=2), place, move=0)
    assert adapter.s.tolist() == [0, 0]
    for F in (adapter.u, adapter.v):
        torch.testing.assert_close(F.flatten(1) @ F.flatten(1).t(), torch.eye(2, dtype=D), atol=1e-6, rtol=0)
    assert adapter.u.count_nonzero() > 10


def test_flipping_the_sign_of_both_factors_changes_nothing():
    place = site(layer(20, 18))
    adapter = build(tt.SoKA(rank=3), place)
    before = adapter.weight(place.weight).detach().clone()
    with torch.no_grad():
        adapter.u[1] *= -1
        adapter.v[1] *= -1
    assert torch.equal(adapter.weight(place.weight), before)


def test_counts():
    assert count(tt.SoKA(rank=1), (((4096, 4096), 1),)) == 8193
    assert count(tt.SoKA(rank=1, shape=(16, 16, 256, 256)), (((4096, 4096), 1),)) == 65_793
    assert count(tt.SoKA(rank=3), (((11008, 4096), 1),)) == 3 * (86 * 64 + 128 * 64 + 1)
    assert 0.99e6 / 8193 == pytest.approx(121, abs=0.5)  # terms in the paper's whole model


def two_layers() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(16, 16, dtype=D), nn.Linear(16, 64, dtype=D))
    with torch.no_grad():
        model[0].weight.copy_(with_spectrum([8, 4, 2, 1], (4, 4, 4, 4)))
        model[1].weight.copy_(with_spectrum([9, 6, 5, 4, 3], (8, 4, 8, 4)))
    return model


def test_a_budget_goes_to_the_terms_of_most_energy_a_parameter():
    model = two_layers()
    config = tt.SoKA(budget=5, r_max=5, iterations=None)
    tt.attach(model, config, targets=r"\d")
    first, second = (m for m in model.modules() if isinstance(m, soka.SoKAAdapter))
    scores = [(s * s / 33, 0) for s in (8, 4, 2, 1)] + [(s * s / 65, 1) for s in (9, 6, 5, 4, 3)]
    best = [place for _, place in sorted(scores, reverse=True)[:5]]
    assert (first.s.shape[0], second.s.shape[0]) == (best.count(0), best.count(1)) == (2, 3)
    assert not first.site.cohort.shared["SoKA", config]  # the starts that waited are gone


def test_a_checkpoint_rebuilds_the_terms_of_every_layer(tmp_path):
    model = two_layers()
    tt.attach(model, tt.SoKA(tau=0.95, elbow="off", r_max=8, iterations=None), targets=r"\d")
    terms = [m.s.shape[0] for m in model.modules() if isinstance(m, soka.SoKAAdapter)]
    assert terms == [3, 5]
    with torch.no_grad():
        for p in tt.parameters(model):
            p.add_(0.1 * torch.randn_like(p))
    tt.save(model, tmp_path)
    fresh = two_layers()
    fresh.load_state_dict({k: v for k, v in model.state_dict().items() if "trimtab" not in k})
    tt.load(fresh, tmp_path)
    assert [m.s.shape[0] for m in fresh.modules() if isinstance(m, soka.SoKAAdapter)] == terms
    x = random(5, 16)
    assert torch.equal(fresh(x), model(x))


@pytest.mark.parametrize("dense", [False, True])
def test_saves_the_input_alone(dense, monkeypatch):
    monkeypatch.setattr(soka, "dense_is_cheaper", lambda *a, **k: dense)
    place = site(layer(48, 64, dtype=torch.float32))
    adapter = build(tt.SoKA(rank=3), place)
    x = torch.randn(100, 64, requires_grad=True)
    with saved_bytes(place.module, adapter) as saved:
        adapter(x, place)
    assert saved.total == x.numel() * 4


def test_half_precision_weights_are_decomposed_in_float32():
    W = torch.randn(20, 18).bfloat16()
    adapter = build(tt.SoKA(rank=12, iterations=None), site(_with(W), dtype=torch.float32), move=0)
    torch.testing.assert_close(kron_sum(adapter.s, adapter.u, adapter.v), W.float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "bad",
    [
        {"tau": 0.0},
        {"tau": 1.1},
        {"r_max": 2, "r_min": 3},
        {"rank": 0},
        {"elbow": "knee"},
        {"rank": 2, "budget": 5},
        {"shape": (2, 3, 4)},
        {"iterations": -1},
        {"r_min": 0},
        {"budget": 1.5},
    ],
)
def test_bad_hyperparameters(bad):
    with pytest.raises(ValueError):
        tt.SoKA(**bad)


def test_bad_places_name_the_numbers():
    place = site(nn.Linear(18, 20))
    check = soka.SoKAAdapter.check
    with pytest.raises(ValueError, match=r"\(4, 3\) and \(5, 7\) make a matrix \(20, 21\); fc is \(20, 18\)"):
        check(tt.SoKA(shape=(4, 3, 5, 7)), place)
    with pytest.raises(ValueError, match="rank 13 .* 12 terms at most"):
        check(tt.SoKA(rank=13), place)
    with pytest.raises(ValueError, match="r_min 13 .* 12 terms at most"):
        check(tt.SoKA(r_min=13), place)
    with pytest.raises(ValueError, match="budget of 1 terms is too small for 2 places"):
        tt.attach(two_layers(), tt.SoKA(budget=1), targets=r"\d")
    with pytest.warns(UserWarning, match="prime"):
        check(tt.SoKA(), site(nn.Linear(18, 13)))
    model = nn.Sequential(nn.Linear(16, 16))
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        tt.attach(model, tt.SoKA(), targets="0")


def test_a_bank_of_experts_needs_a_rank():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(3, 16, 12))

    model = nn.ModuleDict({"experts": Experts()})
    with pytest.raises(NotImplementedError, match="give SoKA a rank"):
        tt.attach(model, tt.SoKA(), targets="experts")
    tt.attach(model, tt.SoKA(rank=2), targets="experts")


def test_dry_run_and_loading_look_at_no_values():
    model, adapter, W = adapted(tt.SoKA(r_max=3))
    table = tt.attach(nn.Sequential(nn.Linear(16, 12, device="meta")), tt.SoKA(r_max=3), targets="0", dry_run=True)
    assert list(table)[0]["parameters"] == 3 * (3 * 4 + 4 * 4 + 1)
    assert adapter.s.shape[0] <= 3 and torch.equal(model[0].weight, W)


@pytest.mark.parametrize("shape", SHAPES)
def test_runs_of_tokens_add_up(shape, monkeypatch):
    """Many short runs give what one run gives, in value and gradients; no tokens at all are fine."""
    m, n, p, q = shape
    place = site(layer(m * p, n * q))
    adapter = build(tt.SoKA(rank=2, shape=shape), place)
    monkeypatch.setattr("trimtab.kernels.kroneckersum._RUN", 1)
    assert len(adapter.thin._runs(torch.empty(40, n * q), 2)) == 3
    assert_law(adapter, place, tokens=(40,))
    x = torch.zeros(0, n * q, dtype=D, requires_grad=True)
    y = adapter(x, place)
    y.sum().backward()
    assert y.shape == (0, m * p) and x.grad.shape == x.shape
