"""Averages while training against averages of what was saved (arXiv 2504.18580)."""

from __future__ import annotations

import pytest
import torch
from small_blocks import adamw, batch, loss, net, same, scheduled, steps

import trimtab as tt
from trimtab.artifacts.average_weights import checkpoint_weights, effective_count, last_of, log_weights


def test_the_paper_s_weights():
    losses, numbers = [0.8, 0.6, 0.5, 0.4], [100, 200, 300, 400]
    for power, expected in ((0, [0.25] * 4), (0.7, [0.190943, 0.233539, 0.265330, 0.310187]),
                            (1, [0.168539, 0.224719, 0.269663, 0.337079])):  # fmt: skip
        assert checkpoint_weights(losses, strength=power) == pytest.approx(expected, abs=1e-6)
    assert checkpoint_weights(losses, strength=50)[-1] == pytest.approx(0.999986, abs=1e-6)
    assert checkpoint_weights(numbers, by="step", strength=1) == pytest.approx([0.1, 0.2, 0.3, 0.4])
    found = checkpoint_weights(numbers, by="step", strength=1.05)
    assert found == pytest.approx([0.094994, 0.196687, 0.301073, 0.407246], abs=1e-6)
    found = checkpoint_weights(losses, scheme="softmax", strength=0.1)
    assert found == pytest.approx([0.012038, 0.088947, 0.241783, 0.657233], abs=1e-6)
    assert effective_count(checkpoint_weights(losses)) == pytest.approx(3.8817, abs=1e-4)
    assert effective_count(checkpoint_weights(numbers, by="step", strength=1)) == pytest.approx(3.3333, abs=1e-4)


def test_laws_of_the_weights():
    losses, order = [0.8, 0.6, 0.5, 0.4], [2, 0, 3, 1]
    for scheme, by, strength in (("power", "loss", 0.7), ("softmax", "score", 0.2), ("uniform", "loss", 1)):
        found = checkpoint_weights(losses, scheme=scheme, by=by, strength=strength)
        assert sum(found) == pytest.approx(1)
        moved = checkpoint_weights([losses[i] for i in order], scheme=scheme, by=by, strength=strength)
        assert moved == pytest.approx([found[i] for i in order])
        assert checkpoint_weights([0.5] * 3, scheme=scheme, by=by, strength=strength) == pytest.approx([1 / 3] * 3)
        assert checkpoint_weights([0.5], scheme=scheme, by=by, strength=strength) == [1.0]
    assert checkpoint_weights([3 * v for v in losses]) == pytest.approx(checkpoint_weights(losses))
    assert checkpoint_weights(losses, scheme="geometric", strength=0.5) == pytest.approx([1 / 15, 2 / 15, 4 / 15, 8 / 15])
    assert checkpoint_weights([5, 6, 8], scheme="linear", by="step") == pytest.approx([1 / 7, 2 / 7, 4 / 7])
    mean, values = 0.0, [3.0, 5.0, 4.0, 9.0]
    for i, value in enumerate(values):
        mean = value if i == 0 else 0.6 * mean + 0.4 * value
    assert sum(w * v for w, v in zip(checkpoint_weights([1] * 4, scheme="exponential", strength=0.6), values, strict=True)) == (
        pytest.approx(mean)
    )
    assert (last_of(10, 4, 3), last_of(10, None, 4), last_of(3, 5)) == ([0, 3, 6, 9], [1, 5, 9], [0, 1, 2])


def test_weights_that_cannot_be():
    for values, given, message in (
        ([1.0], {"scheme": "powers"}, "scheme must be one of"), ([1.0], {"by": "size"}, "by must be one of"),
        ([], {}, "no checkpoint"), ([0.0], {}, "above 0 for powers"), ([float("nan")], {"scheme": "softmax"}, "must be finite"),
        ([1.0], {"strength": -1.0}, "out of range"), ([1.0], {"scheme": "exponential", "strength": 1.0}, "out of range"),
        ([1.0], {"scheme": "softmax", "strength": 0.0}, "out of range"), ([1.0], {"scheme": "linear"}, "counts steps"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            log_weights(values, **given)
    with pytest.raises(ValueError, match="at least 1"):
        last_of(3, 0)


GIVEN = [
    ({"scheme": "uniform", "every": 2, "last": 3}, [8, 10, 12]),
    ({"every": 3, "last": None}, [3, 6, 9, 12]),
    ({"every": 3, "last": None, "by": "step", "strength": 1.05}, [3, 6, 9, 12]),
    ({"every": 1, "last": None, "scheme": "exponential", "strength": 0.7}, list(range(1, 13))),
    ({"every": 2, "last": 4, "scheme": "softmax", "strength": 0.3}, [6, 8, 10, 12]),
    ({}, list(range(3, 13))),
]


@pytest.mark.parametrize(("given", "taken"), GIVEN, ids=lambda v: str(v) if isinstance(v, dict) else None)
def test_on_the_fly_equals_averaging_what_was_saved(given, taken):
    plain, averaged = net(dtype=torch.float64), net(dtype=torch.float64)
    saved, means, since, optimizer = [], [], [], adamw(plain)
    for step in range(1, 13):
        value = loss(plain, batch(step))
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        since.append(value.item())
        if (12 - step) % given.get("every", 1) == 0:
            means.append(sum(since) / len(since))
            since = []
        if step in taken:
            saved.append([p.detach().clone() for p in tt.parameters(plain)])
    schedule = tt.CheckpointAveraging(**given)
    optimizer = adamw(averaged)
    with scheduled(averaged, optimizer, schedule, steps=12) as s:
        steps(averaged, optimizer, s, range(1, 13))
        assert same(plain, averaged)  # while training nothing is different
    weights = checkpoint_weights(
        taken if schedule.by == "step" else schedule.values, scheme=schedule.scheme, by=schedule.by, strength=schedule.strength
    )
    if schedule.by == "loss":
        assert schedule.values == pytest.approx(means[-len(taken) :])
    for i, p in enumerate(tt.parameters(averaged)):
        torch.testing.assert_close(p.detach(), sum(w * each[i] for w, each in zip(weights, saved, strict=True)))


def test_equal_checkpoints_give_that_checkpoint_to_the_bit():
    model = net()
    before = [p.detach().clone() for p in tt.parameters(model)]
    with scheduled(model, torch.optim.SGD(tt.parameters(model), lr=0.0), tt.CheckpointAveraging(every=1), steps=10) as s:
        steps(model, s.optimizer, s, range(10))
    assert all(torch.equal(a, b) for a, b in zip(tt.parameters(model), before, strict=True))


def test_the_average_is_what_is_evaluated_and_delivered():
    model = net()
    optimizer = adamw(model)
    with scheduled(model, optimizer, tt.CheckpointAveraging(every=1, last=None)) as s:
        with s.weights():
            pass  # nothing has been taken yet
        steps(model, optimizer, s, range(6))
        before, p = {k: v.clone() for k, v in model.state_dict().items()}, tt.parameters(model)[0]
        with s.weights():
            mean = p.detach().clone()
            torch.testing.assert_close(mean, next(iter(s.schedules[0].mean.values())))
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and not torch.equal(mean, p)
    assert torch.equal(mean, p)


def test_with_ist_and_with_a_budget():
    model = net(tt.AdaLoRA(rank=3), moved=True)
    optimizer = adamw(model)
    given = tt.IST(uniform=True), tt.BudgetSchedule(target=2, final=3), tt.CheckpointAveraging(every=1, last=4)
    with scheduled(model, optimizer, *given, steps=10) as s:
        steps(model, optimizer, s, range(8))
        out = model(batch(99)[0])
        with s.weights():
            model(batch(99)[0])
        assert torch.equal(model(batch(99)[0]), out)
        steps(model, optimizer, s, range(8, 10))
    model(batch(99)[0])
    ranks = [a.e.shape[0] for a in s.adapters() if hasattr(a, "e")]
    assert sum(ranks) == 2 * len(ranks)


def test_bad_input():
    for wrong, message in (({"scheme": "geometric"}, "while training"), ({"by": "score"}, "loss or step"),
                           ({"strength": -1}, "range"), ({"every": 0}, "every"), ({"last": 0}, "last")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            tt.CheckpointAveraging(**wrong)
    model = net()
    with pytest.raises(ValueError, match="needs the number of optimizer steps"):
        scheduled(model, adamw(model), tt.CheckpointAveraging())
    with scheduled(model, adamw(model), tt.CheckpointAveraging(every=1, last=None)) as s, pytest.raises(ValueError, match="s.step"):
        loss(model.train(), batch(0)).backward()
        s.step()
    with pytest.raises(ValueError, match="ReLoRA and CheckpointAveraging both own delivery"):
        scheduled(model, adamw(model), tt.ReLoRA(), tt.CheckpointAveraging(), steps=10)
