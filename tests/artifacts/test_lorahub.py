"""Weights found without gradients: the optimum is found, the model is left alone, any methods mix."""

from __future__ import annotations

import pytest
import torch
from saved_adapters import X, adapter, net

import trimtab as tt
from trimtab.kernels.cma import minimise


@pytest.mark.parametrize("n", [1, 2, 8])
def test_the_search_finds_a_minimum(n) -> None:
    """An ill-conditioned bowl turned against the axes."""
    g = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0]
    H = q @ torch.diag(torch.logspace(0, 2, n, dtype=torch.float64)) @ q.t()
    at = torch.linspace(-0.8, 0.6, n, dtype=torch.float64)
    calls = []

    def bowl(x):
        calls.append(x)
        return ((x - at) @ H @ (x - at)).item()

    found, value = minimise(
        bowl, torch.zeros(n), sigma=0.5, bounds=(-1.5, 1.5), budget=200 * n, rng=torch.Generator().manual_seed(1)
    )
    assert len(calls) == 200 * n and torch.equal(calls[0], torch.zeros(n, dtype=torch.float64))
    assert value == min(bowl(x) for x in list(calls)) and (found - at).abs().max() < 1e-3
    edge, _ = minimise(lambda x: -x.sum().item(), torch.zeros(n), sigma=0.5, bounds=(-1.5, 1.5), budget=100, rng=torch.Generator())
    assert edge.max() <= 1.5 and edge.mean() > 1.3
    lost, value = minimise(lambda x: float("nan") if x.any() else 2.0, torch.zeros(n), sigma=0.5, bounds=(-1, 1), budget=20, rng=g)
    assert value == 2.0 and not lost.any()


@pytest.fixture
def folders(tmp_path):
    methods = (tt.LoRA(rank=2), tt.DoRA(rank=2), tt.IA3())
    return [adapter(tmp_path / n, m, i, "attn.q | mlp.down") for i, (n, m) in enumerate(zip("abc", methods, strict=True))]


def target(folders, weights, tmp_path):
    """The output of the exact merge at these weights."""
    tt.combine(folders, tmp_path / "t", weights=weights, rank=16, base=net())
    model = net()
    tt.load(model, tmp_path / "t")
    return model(X).detach()


def test_the_weights_behind_an_output_are_found(folders, tmp_path) -> None:
    """Without a penalty, of methods with and without factors, with biases; the merged adapter gives the same loss."""
    true = [0.8, -0.5, 0.3]
    wanted = target(folders, true, tmp_path)
    loss = lambda m: (m(X) - wanted).square().mean()  # noqa: E731
    found = tt.search_weights(net(), folders, loss, budget=250, penalty=0.0)
    assert max(abs(a - b) for a, b in zip(found.weights, true, strict=True)) < 0.05
    assert found.loss < 1e-3 * found.start and len(found.trials) == 250
    tt.combine(folders, tmp_path / "m", weights=found.weights, rank=16, base=net())
    model = net()
    tt.load(model, tmp_path / "m")
    assert loss(model).item() == pytest.approx(found.loss, rel=1e-2, abs=1e-7)


def test_one_weight_acts_linearly_and_zero_is_the_base(folders) -> None:
    """LoraHub's own form squares it: w = 0.5 would act as a quarter."""
    seen = []

    def loss(model):
        seen.append(tt.effective_weight(model, "layers.0.attn.q_proj").detach())
        return 0.0

    found = tt.search_weights(net(), folders[:1], loss, budget=5)
    W = net().layers[0].attn.q_proj.weight.detach()
    assert torch.equal(seen[0], W)
    whole = net()
    tt.load(whole, folders[0])
    D = tt.effective_weight(whole, "layers.0.attn.q_proj") - W
    for made, (w,) in zip(seen, found.trials.column("weights"), strict=True):
        torch.testing.assert_close(made, W + w * D, atol=1e-5, rtol=1e-4)
    assert found.weights == [0.0]  # every weight costs, nothing is gained


def test_the_model_is_left_as_it_was(folders) -> None:
    model = net()
    tt.attach(model, tt.LoRA(rank=1), name="search", rng=torch.Generator().manual_seed(0))
    tt.activate(model, "search")
    model.train()
    before, keys = model(X), set(model.state_dict())

    def broken(model):
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        tt.search_weights(model, folders, broken)
    found = tt.search_weights(model, folders, lambda m: m(X).square().mean(), budget=8)
    again = tt.search_weights(model, folders, lambda m: m(X).square().mean(), budget=8)
    assert found == again or found.trials.rows == again.trials.rows
    assert torch.equal(model(X), before) and set(model.state_dict()) == keys and model.training
    assert tt.summary(model).column("name") == ["search"] and tt.summary(model).column("active") == [True]
    assert found.loss <= found.start
    for options, match in (({"budget": 0}, "budget of at least 1"), ({"bounds": (0.5, 1.0)}, "bounds around 0")):
        with pytest.raises(tt.ShapeMismatch, match=match):
            tt.search_weights(model, folders, lambda m: 0.0, **options)
    plain = net()
    tt.search_weights(plain, folders, lambda m: 0.0, budget=2)
    assert not hasattr(plain, "_trimtab_state") and type(plain.layers[0].attn.q_proj) is torch.nn.Linear
