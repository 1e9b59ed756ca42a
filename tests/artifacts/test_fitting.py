"""Settings and scales of a compression that are chosen on data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import trimtab as tt
from artifacts.pairs import adapter
from core.small_net import IDS, net
from trimtab.artifacts import fitting
from trimtab.artifacts.packed import Entry, Packed


def test_trials_take_the_smallest_density_that_keeps_the_score(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", size=0.3)
    model, true = net(), net()
    tt.load(true, folder)
    target = true(IDS).detach()

    def score(m: torch.nn.Module) -> float:
        return -float((m(IDS) - target).square().mean())

    seen = net()
    tt.attach(seen, tt.BitFit(), name="other")
    report = tt.compress(
        folder, tmp_path / "c.tern", density=[0.5, 0.05, "100%"], alpha=[None, 1.5], model=seen, score=score, tolerance=0.0
    )
    assert report.trials[0] == {"density": None, "alpha": None, "score": pytest.approx(0, abs=1e-9)}
    assert [row["density"] for row in report.trials[1:]] == [0.05, 0.05, 0.5, 0.5, 1.0, 1.0]
    assert (report.density, report.alpha) == max(
        ((row["density"], row["alpha"]) for row in report.trials[1:]),
        key=lambda pair: next(row["score"] for row in report.trials if (row["density"], row["alpha"]) == pair),
    )
    tt.load(model, report.path)
    assert score(model) == pytest.approx(max(row["score"] for row in report.trials[1:]), rel=1e-5)
    assert list(seen.__dict__["_trimtab_state"].groups) == ["other"] and seen.__dict__["_trimtab_state"].active == ("other",)
    easy = tt.compress(folder, tmp_path / "e.tern", density=[0.5, 0.05], alpha=[None], model=net(), score=score, tolerance=1e9)
    assert easy.density == 0.05 and len(easy.trials) == 2


def test_fitted_scales_follow_the_loss_and_are_stored(tmp_path: Path) -> None:
    """Against a dense fit of the same factors, and: what is loaded is what was fitted."""
    folder = adapter(tmp_path / "a", size=0.3)
    true = net()
    tt.load(true, folder)
    target = true(IDS).detach()
    error = lambda m: (m(IDS) - target).square().mean()  # noqa: E731
    found = {}
    for steps in (0, 40):
        losses = None if not steps else (lambda m, steps=steps: (error(m) for _ in range(steps)))
        report = tt.compress(folder, tmp_path / f"{steps}.tern", density=0.3, model=net(), losses=losses)
        model = net()
        tt.load(model, report.path)
        found[steps] = float(error(model))
        entries = [e for e in Packed(report.path).entries if e.store == "ternary"]
        assert all(e.fitted == (steps > 0) for e in entries)
    assert found[40] < 0.6 * found[0]
    group = model.__dict__["_trimtab_state"].groups["default"].adapters
    for one in group:  # one magnitude a component: of A's rows, of B's columns
        start = _true_start(one)
        for value, axis in ((one.a - start["a"], 1), (one.b - start["b"], 0)):
            for part in value.unbind(1 - axis):
                assert len({round(v, 5) for v in part.abs().tolist()} - {0.0}) <= 1
    with pytest.raises(tt.Unsupported, match="at least one batch"):
        tt.compress(folder, tmp_path / "x.tern", model=net(), losses=lambda m: iter(()))
    with pytest.raises(tt.Unsupported, match="base as model="):
        tt.compress(folder, tmp_path / "x.tern", losses=lambda m: iter(()))
    assert report.bits > report.entropy


def _true_start(one: torch.nn.Module) -> dict[str, Tensor]:
    model = net()
    tt.attach(model, tt.LoRA(rank=2), rng=torch.Generator().manual_seed(3))
    same = next(a for a in model.__dict__["_trimtab_state"].groups["default"].adapters if a.site.path == one.site.path)
    return {"a": same.a.detach(), "b": same.b.detach()}


def test_a_step_of_the_fit_is_that_of_autograd(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(9, 5, generator=rng), torch.randn(9, 3, generator=rng)
    start = torch.randn(3, 5, generator=rng)
    signs = torch.randint(-1, 2, (15,), generator=rng).to(torch.int8)
    entry = Entry("w", "float32", (3, 5), "ternary", "zero", 0.2)
    layer = torch.nn.Linear(5, 3, bias=False)
    layer.weight.requires_grad_(False)
    loss = lambda W: (x @ W.T - y).square().mean()  # noqa: E731
    factors = fitting.fit(
        [entry], {"w": signs}, lambda key: start, {"w": layer.weight}, layer, lambda m: (loss(m.weight) for _ in range(5))
    )["w"]
    log = torch.zeros(3, 1, requires_grad=True)
    adam = torch.optim.Adam([log])
    for step in range(5):
        adam.zero_grad()
        adam.param_groups[0]["lr"] = 0.03 / (1 + step / 30)
        loss(start + 0.2 * log.exp() * signs.view(3, 5)).backward()
        adam.step()
    torch.testing.assert_close(factors, log.detach().exp().half())
    torch.testing.assert_close(layer.weight.detach(), start + 0.2 * factors.float() * signs.view(3, 5))
    assert not layer.weight.requires_grad and layer.weight.grad is None
