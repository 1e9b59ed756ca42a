"""The bi-level budget: schedule, water filling, scores, and a run (arXiv 2510.24037)."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

import trimtab as tt
from trimtab.kernels.kernelized import kernel_delta
from trimtab.methods.reparameterized.snella import SNELLAAdapter
from trimtab.schedules import BilevelCompetition
from trimtab.schedules.bilevel import cubic_budget, fill


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 16), nn.GELU(), nn.Linear(16, 4))
    rng = torch.Generator().manual_seed(1)
    tt.attach(model, tt.SNELLA(rank=4), targets=["0", "2", "4"], rng=rng)
    return model


def places(model: nn.Module) -> list[SNELLAAdapter]:
    return [m for m in model.modules() if isinstance(m, SNELLAAdapter)]


def train(model: nn.Module, schedule: BilevelCompetition, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        g = torch.Generator().manual_seed(step)
        x = torch.randn(16, 12, generator=g)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), x[:, :4] * 2).backward()
        schedule.backward_end()
        optimizer.step()
        schedule.step_end()


def test_the_cubic_schedule():
    assert [cubic_budget(e, 10, 2, 3, 1000, 200) for e in range(11)] == [
        1000, 1000, 1000, 609, 372, 251, 206, 200, 200, 200, 200,
    ]  # fmt: skip


def test_the_schedule_of_vit_b():
    weights = 84_934_656
    n0, n1 = 0.99 * weights, 0.2 * weights
    found = [cubic_budget(e, 100, 0, 0, n0, n1) for e in (1, 10, 50, 99)]
    assert found == [82_092_420, 65_901_648, 25_374_228, 16_986_998]
    assert found[-1] / weights == pytest.approx(0.2, abs=1e-4)


def test_water_filling():
    caps = [100, 400, 400, 1600]
    assert fill([8, 1, 1, 0.5], caps, 1000) == [100, 360, 360, 180]
    assert fill([1, 1, 1, 1], caps, 1000) == [100, 300, 300, 300]
    assert fill([8, 1, 1, 0.5], caps, 2500) == caps
    assert fill([8, 1, 1, 0.5], caps, 9999) == caps
    assert fill([0, 0, 0, 0], caps, 1000) == [100, 300, 300, 300]  # the official code crashes
    assert fill([1, 0, 0, 0], caps, 300) == [100, 67, 67, 66]  # and here gives the last three nothing, for good
    assert fill([1.0, 2.0], [0, 50], 10) == [0, 10]  # a place of capacity 0 is left out
    for wrong in (([-1.0], [3], 1), ([float("nan")], [3], 1), ([1.0], [-3], 1), ([1.0], [3], -1)):
        with pytest.raises(ValueError, match="at least 0"):
            fill(*wrong)


def test_invariants_of_water_filling():
    draw = random.Random(0)
    for _ in range(200):
        n = draw.randint(1, 7)
        scores = [draw.choice([0.0, draw.random(), draw.random() * 1e-6, 10 * draw.random()]) for _ in range(n)]
        caps = [draw.randint(0, 60) for _ in range(n)]
        before = [0] * n
        for budget in range(0, sum(caps) + 3):
            given = fill(scores, caps, budget)
            assert sum(given) == min(budget, sum(caps))
            assert all(b <= k <= c for b, k, c in zip(before, given, caps, strict=True))
            before = given


def test_scores_are_the_two_averages():
    """|theta grad| of 1, 2, 0 in turn."""
    model = net()
    schedule = BilevelCompetition(0.5, warmup=5)
    schedule.start(model, steps=10)
    name, place = next(iter(schedule.places.items()))
    found = []
    for size in (1.0, 2.0, 0.0):
        for each in places(model):
            for factor in (each.a, each.b):
                factor.grad = size / factor.detach()
        schedule.step_end()
        found.append([float(t[0].flatten()[0]) for t in (schedule.importance.average[name], schedule.importance.spread[name])])
    torch.testing.assert_close(torch.tensor(found).t(), torch.tensor([[0.15, 0.4275, 0.363375], [0.1275, 0.34425, 0.347119]]),
                               atol=1e-5, rtol=0)  # fmt: skip
    products = [i * u for i, u in found]
    torch.testing.assert_close(torch.tensor(products), torch.tensor([0.019125, 0.147167, 0.126134]), atol=1e-5, rtol=0)
    assert schedule.scores()[0] == pytest.approx(2 * products[-1], rel=1e-4)
    assert place.kept == round(0.99 * place.capacity)


def test_a_step_with_infinite_gradients_is_left_out():
    model = net()
    schedule = BilevelCompetition(0.5)
    schedule.start(model, steps=10)
    for each in places(model):
        each.a.grad, each.b.grad = torch.full_like(each.a, float("inf")), torch.zeros_like(each.b)
    with pytest.raises(RuntimeError, match="no place has had a finite gradient"):
        schedule.step_end()
    assert all(not t.any() for pair in schedule.importance.average.values() for t in pair)


def test_the_budget_is_met_and_nothing_is_lost_by_resuming():
    model = net()
    schedule = BilevelCompetition(0.8, warmup=2, final=2)
    optimizer = torch.optim.AdamW(tt.parameters(model), lr=1e-2)
    schedule.start(model, steps=12)
    train(model, schedule, optimizer, range(12))
    schedule.finish()
    capacity = sum(p.capacity for p in places(model))
    kept = [int(p.kept) for p in places(model)]
    assert sum(kept) == round(0.2 * capacity)
    for place, k in zip(places(model), kept, strict=True):
        delta = kernel_delta(place.config.rule, *place.parts())
        assert abs(int((delta != 0).sum()) - k) <= 1

    other = net()
    again = BilevelCompetition(0.8, warmup=2, final=2)
    optimizer2 = torch.optim.AdamW(tt.parameters(other), lr=1e-2)
    again.start(other, steps=12)
    train(other, again, optimizer2, range(7))
    third, resumed = net(), BilevelCompetition(0.8, warmup=2, final=2)
    third.load_state_dict(other.state_dict())
    optimizer3 = torch.optim.AdamW(tt.parameters(third), lr=1e-2)
    optimizer3.load_state_dict(optimizer2.state_dict())
    resumed.start(third, steps=12)
    resumed.load_state_dict(again.state_dict())
    train(third, resumed, optimizer3, range(7, 12))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), third.state_dict().values(), strict=True))


def test_what_each_place_keeps_is_saved_with_it(tmp_path):
    model = net()
    for place, k in zip(places(model), (7, 30, 11), strict=True):
        place.kept.fill_(k)
    tt.save(model, tmp_path / "a")
    x = torch.randn(3, 12)
    want = model(x)
    tt.detach(model, "default")
    tt.load(model, tmp_path / "a")
    assert [int(p.kept) for p in places(model)] == [7, 30, 11]
    torch.testing.assert_close(model(x), want)


def test_bad_input():
    betas = {"betas": (0.0, 0.5)}, {"betas": (0.5, 1.0)}
    for wrong in (*betas, {"target": 1.0}, {"interval": 0}, {"warmup": -1}, {"metric": "w_mag"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            BilevelCompetition(**wrong)
    with pytest.raises(ValueError, match="leave none"):
        BilevelCompetition(0.5, warmup=5, final=5).start(net(), steps=10)
    with pytest.raises(ValueError, match="would grow"):
        BilevelCompetition(0.0).start(net(), steps=10)
    with pytest.raises(ValueError, match="at least 1"):
        BilevelCompetition(0.5).start(net(), steps=0)
    with pytest.raises(tt.Unsupported, match="SNELLA"):
        BilevelCompetition(0.5).start(nn.Sequential(nn.Linear(3, 3)), steps=10)
    schedule, other = BilevelCompetition(0.5), BilevelCompetition(0.5)
    schedule.start(net(), steps=10)
    other.start(net(), steps=11)
    with pytest.raises(ValueError, match="10 steps"):
        other.load_state_dict(schedule.state_dict())
