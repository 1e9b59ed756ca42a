"""Steps inside backward: the same bits as the ordinary step, one gradient at a time, and what cannot work is refused."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import trimtab as tt
from tiny_text import settings
from trimtab.core.errors import GradientMismatch
from trimtab.training import train
from trimtab.training.backward_step import BackwardOptimizer
from trimtab.training.errors import ConfigError, RunError
from trimtab.training.trainer import AdapterTrainer

MAKES = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "adamw": partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1),
    "fused": partial(torch.optim.AdamW, lr=1e-2, fused=True),
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(64, 64) if i % 2 == 0 else nn.Tanh() for i in range(11)])


def batch(step: int) -> torch.Tensor:
    return torch.randn(8, 64, generator=torch.Generator().manual_seed(step))


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 5, start: int = 0, schedule=None) -> None:
    for step in range(start, start + count):
        model(batch(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if schedule:
            schedule.step()


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_bit_identical_to_the_ordinary_step(make):
    plain, inside = net(), net()
    usual = make(plain.parameters())
    early = BackwardOptimizer(inside.parameters(), make)
    rates = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)) for o in (usual, early)]
    steps(plain, usual, schedule=rates[0])
    steps(inside, early, schedule=rates[1])
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), inside.parameters(), strict=True))
    assert not torch.equal(next(inside.parameters()), next(net().parameters()))


def test_one_gradient_lives_at_a_time():
    """4,096 entries, the largest parameter, where the ordinary loop holds all 24,960."""
    for inside, peak in ((True, 4096), (False, 6 * (4096 + 64))):
        model, most = net(), 0
        parameters = list(model.parameters())

        def watch(p, parameters=parameters):
            nonlocal most
            most = max(most, sum(q.grad.numel() for q in parameters if q.grad is not None))

        for p in parameters:
            p.register_post_accumulate_grad_hook(watch)
        optimizer = BackwardOptimizer(parameters, MAKES["adamw"]) if inside else MAKES["adamw"](parameters)
        steps(model, optimizer, 2)
        assert most == peak and all(p.grad is None for p in parameters)


def test_state_goes_on_in_either_optimizer():
    """Saved inside backward, loaded into an ordinary optimizer, and the other way round."""
    make, whole = MAKES["adamw"], net()
    steps(whole, make(whole.parameters()), 6)
    for first, second in ((True, False), (False, True), (True, True)):
        model = net()
        one = BackwardOptimizer(model.parameters(), make) if first else make(model.parameters())
        steps(model, one, 3)
        if first:
            one.close()
        other = BackwardOptimizer(model.parameters(), make) if second else make(model.parameters())
        other.load_state_dict(one.state_dict())
        steps(model, other, 3, start=3)
        assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), model.parameters(), strict=True))


def test_a_gradient_that_comes_twice_is_refused():
    model = net()
    BackwardOptimizer(model.parameters(), MAKES["sgd"])
    model(batch(0)).sum().backward()
    with pytest.raises(RuntimeError, match="accumulation nor with reentrant"):
        model(batch(1)).sum().backward()


def test_a_parameter_used_twice_steps_once():
    plain, inside = nn.Linear(64, 64), nn.Linear(64, 64)
    inside.load_state_dict(plain.state_dict())
    for model, optimizer in ((plain, MAKES["sgd"](plain.parameters())),
                             (inside, BackwardOptimizer(inside.parameters(), MAKES["sgd"]))):  # fmt: skip
        model(model(batch(0))).square().mean().backward()
        optimizer.step()
    assert torch.equal(plain.weight, inside.weight)


def test_what_is_not_finite_is_not_stepped():
    model = net()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = BackwardOptimizer(model.parameters(), MAKES["sgd"])
    (model(batch(0)).sum() * float("nan")).backward()
    assert len(optimizer.refused) == 12 and all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_no_hook_is_left():
    model = net()
    BackwardOptimizer(model.parameters(), MAKES["sgd"]).close()
    model(batch(0)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("fault", ["none", "silent", "foreign"])
def test_the_first_step_is_checked_all_the_same(fault):
    """Declared parameters without a gradient, and others with one, are found although the gradients are gone by then."""
    model = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)])
    tt.attach(model, tt.LoRA(rank=2), targets=["0", "1"])
    if fault == "foreign":
        model[0].bias.requires_grad_(True)
    optimizer = BackwardOptimizer(tt.parameters(model), MAKES["adamw"])
    y = model[0](batch(0))
    y = y if fault == "silent" else model[1](y)
    y.square().mean().backward()
    if fault == "none":
        optimizer.step()
        return
    with pytest.raises(GradientMismatch, match="received no gradient" if fault == "silent" else "no adapter declares"):
        optimizer.step()


# -- in a run


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = (folder / "run" / "adapter").glob("*.safetensors")
    return load_file(file)


def test_a_run_ends_in_the_same_bits(tmp_path: Path):
    found = []
    for inside in (False, True):
        folder = tmp_path / str(inside)
        folder.mkdir()
        result = train(settings(folder, max_grad_norm=0.0, step_in_backward=inside))
        found.append(tensors(folder))
        result.model(input_ids=torch.ones(1, 4, dtype=torch.long), attention_mask=torch.ones(1, 4))["logits"].sum().backward()
        assert any(p.grad is not None for p in result.model.parameters())  # no hook has eaten it
    assert found[0].keys() == found[1].keys() and all(torch.equal(found[0][key], found[1][key]) for key in found[0])


@pytest.mark.parametrize("other", [{"max_grad_norm": 1.0}, {"accumulation": 2}, {"precision": "fp16"}], ids=str)
def test_what_needs_all_gradients_is_refused(tmp_path: Path, other: dict):
    with pytest.raises(ConfigError, match="step_in_backward frees each gradient"):
        train(settings(tmp_path, **({"max_grad_norm": 0.0, "step_in_backward": True} | other)))


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    original = AdapterTrainer.compute_loss

    def poisoned(self, *args, **kwargs):
        loss = original(self, *args, **kwargs)
        return loss + 0 * (loss - loss.detach()).sqrt() if self.state.global_step == 1 else loss

    monkeypatch.setattr(AdapterTrainer, "compute_loss", poisoned)
    with pytest.raises(RunError, match="a gradient became NaN or infinite at step 2"):
        train(settings(tmp_path, max_grad_norm=0.0, step_in_backward=True))
