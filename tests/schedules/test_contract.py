"""The contract: moments in their order, nothing changed by schedules that do nothing, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from trimtab import schedules


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4))
    tt.attach(model, tt.LoRA(rank=2), targets=["0", "2"], rng=torch.Generator().manual_seed(1))
    return model


def batch(step: int, rows: int = 8) -> Tensor:
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(step))


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x[:, :4]).square().mean()


class Recorder(tt.Schedule):
    """Writes down what is called."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __getattribute__(self, name: str):
        moments = ("start", "groups", "step_begin", "extra_loss", "backward_end", "before_optimizer", "step_end", "step_skipped",
                   "evaluate", "finish", "close", "load_state_dict")  # fmt: skip
        if name in moments:
            object.__getattribute__(self, "seen").append(name)
        return object.__getattribute__(self, name)


ONE_STEP = ["step_begin", "extra_loss", "backward_end", "before_optimizer", "step_end"]


def train(model: nn.Module, *given: tt.Schedule, how: str = "ours", accumulation: int = 1, steps: int = 3) -> list[float]:
    optimizer = torch.optim.AdamW(tt.parameters(model), lr=1e-2)
    losses = []
    if how == "plain":
        for step in range(steps):
            value = loss(model, batch(step))
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(value.item())
        return losses
    with tt.scheduled(model, optimizer, *given, steps=steps) as s:
        for step in range(steps):
            for part in batch(step).chunk(accumulation):
                value = loss(model, part) / accumulation
                value.backward()
            if how == "own":
                optimizer.step()
            s.step()
            if how == "own":
                optimizer.zero_grad()
            losses.append(value.item())
    return losses


@pytest.mark.parametrize("how", ["ours", "own"])
@pytest.mark.parametrize("given", [(), (tt.Schedule(),), (tt.Schedule(), Recorder())], ids=len)
def test_schedules_that_do_nothing_change_no_bit(how, given):
    plain, scheduled = net(), net()
    assert train(plain, how="plain") == train(scheduled, *given, how=how)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), scheduled.parameters(), strict=True))


@pytest.mark.parametrize("how", ["ours", "own"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_moments_come_in_order_once_a_step(how, accumulation):
    recorder = Recorder()
    train(net(), recorder, how=how, accumulation=accumulation)
    assert recorder.seen == ["start", "groups", *ONE_STEP * 3, "finish", "close"]
    assert recorder.step == 3


def test_two_owners_are_both_named():
    class First(tt.Schedule):
        owns = frozenset({"rank"})

    class Second(First):
        pass

    model = net()
    with pytest.raises(ValueError, match="First and Second both own rank"):
        tt.scheduled(model, torch.optim.SGD(tt.parameters(model)), First(), Second())


def test_a_schedule_of_a_third_party_is_a_full_citizen():
    @tt.schedule(paper="a test")
    class Halving(tt.Schedule):
        """Halves the gradients."""

        def before_optimizer(self) -> None:
            for p in tt.parameters(self.model):
                p.grad.mul_(0.5)

    assert schedules.entry("Halving").summary == "Halves the gradients."
    assert isinstance(schedules.from_dict({"name": "Halving"}), tt.Halving)
    assert "Halves the gradients." in str(schedules.table())
    with pytest.raises(tt.NoMatch, match="no argument 'by'"):
        schedules.from_dict({"name": "Halving", "by": 2})
    with pytest.raises(tt.NoMatch, match="no schedule named 'Halvin'; nearest: Halving"):
        schedules.from_dict({"name": "Halvin"})
    halved, plain = net(), net()
    for model, rate, given in ((halved, 0.2, [tt.Halving()]), (plain, 0.1, [])):
        with tt.scheduled(model, torch.optim.SGD(tt.parameters(model), lr=rate), *given) as s:
            loss(model, batch(0)).backward()
            s.step()
    assert all(torch.equal(a, b) for a, b in zip(halved.parameters(), plain.parameters(), strict=True))


def test_gradients_that_are_never_finite_are_told():
    model = net()
    with pytest.raises(FloatingPointError, match="first 31 steps"):
        with tt.scheduled(model, torch.optim.SGD(tt.parameters(model)), tt.Schedule()) as s:
            for step in range(40):
                (loss(model, batch(step)) * float("nan")).backward()
                s.step()


def test_a_model_that_is_not_the_one_of_the_run():
    model = net()
    with pytest.raises(RuntimeError, match="the very module that the loop calls"):
        with tt.scheduled(nn.Sequential(model), torch.optim.SGD(tt.parameters(model)), tt.Schedule()) as s:
            loss(model, batch(0)).backward()
            s.step()


def test_a_compiled_model_is_called_like_any_other():
    recorder, model = Recorder(), net()
    compiled = torch.compile(model, backend="eager")
    with tt.scheduled(compiled, torch.optim.SGD(tt.parameters(model), lr=0.1), recorder, steps=2) as s:
        for step in range(2):
            loss(compiled, batch(step)).backward()
            s.step()
    assert recorder.seen == ["start", "groups", *ONE_STEP * 2, "finish", "close"]


def test_state_is_of_the_same_schedules():
    model = net()
    with tt.scheduled(model, torch.optim.SGD(tt.parameters(model)), tt.Schedule()) as s:
        state = s.state_dict()
    with pytest.raises(ValueError, match=r"of the schedules \['Schedule'\], this run has \['Recorder'\]"):
        tt.scheduled(model, torch.optim.SGD(tt.parameters(model)), Recorder(), state=state)
