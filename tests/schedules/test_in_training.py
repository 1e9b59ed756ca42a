"""Schedules in ``trimtab train``: the same moments, and runs that end in the same bytes wherever they are interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_blocks import adamw, batch, loss, net, scheduled, steps

import trimtab as tt
from interrupted import interrupted_in
from tiny_text import settings
from trimtab.training import ConfigError, load_config, train

LOG: list[str] = []
MOMENTS = ("start", "groups", "step_begin", "extra_loss", "backward_end", "before_optimizer", "step_end", "step_done", "evaluate",
           "finish", "close", "load_state_dict")  # fmt: skip


@tt.schedule(paper="a test", tests=())
class Noted(tt.Schedule):
    """Writes down what is called."""

    def __getattribute__(self, name: str) -> Any:
        if name in MOMENTS:
            LOG.append(name)
        return object.__getattribute__(self, name)


def written(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = (folder / "adapter").glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize("max_grad_norm", [pytest.param(0.0, marks=pytest.mark.slow), 1.0])
def test_moments_of_a_run(tmp_path: Path, max_grad_norm: float):
    """Micro-batches of 4, two a step; one evaluation, at the end."""
    LOG.clear()
    config = settings(tmp_path, schedules=["Noted"], batch_size=4, accumulation=2, max_steps=3, max_grad_norm=max_grad_norm)
    train(config)
    step = ["step_begin", "extra_loss", "backward_end", "before_optimizer", "step_end", "step_done"]
    assert LOG == ["start", "groups", *step * 3, "evaluate", "finish", "close"]


def test_a_schedule_that_does_nothing_changes_no_byte(tmp_path: Path):
    found = []
    for name, given in (("without", []), ("with", ["Noted"])):
        train(settings(tmp_path, schedules=given, output=str(tmp_path / name), epochs=1))
        found.append(written(tmp_path / name))
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_what_a_configuration_may_not_say(tmp_path: Path):
    for given, message in (
        (["Note"], "there is no schedule named 'Note'; nearest: Noted"),
        ([{"name": "BilevelCompetition", "targe": 0.5}], "no argument 'targe'; nearest: target"),
        ([{"name": "BilevelCompetition", "target": 2}], "at least 0 and below 1"),
        (["BilevelCompetition"] * 2, "ilevelCompetition and BilevelCompetition both own rank"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(settings(tmp_path, schedules=given))
    with pytest.raises(ConfigError, match="BilevelCompetition needs all of them"):
        load_config(settings(tmp_path, schedules=["BilevelCompetition"], step_in_backward=True, max_grad_norm=0.0))
    assert load_config(settings(tmp_path, schedules=["Noted"])).schedules == [{"name": "Noted"}]


def resumed(folder: Path, step: int, **changes: Any) -> tuple[dict, dict]:
    """What an undisturbed run writes, and what one writes that was interrupted in ``step`` (0-based) and started again."""
    run = {"batch_size": 4, "accumulation": 2, "max_steps": 6, "save_every": 2, "eval_every": 3, "warmup": 0.3, "dropout": 0.2}
    config = settings(folder, **(run | changes))
    train(config | {"output": str(folder / "whole")})
    with interrupted_in(step):
        train(config | {"output": str(folder / "again")})
    train(config | {"output": str(folder / "again")})
    return written(folder / "whole"), written(folder / "again")


@pytest.mark.parametrize("step", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 5))])
def test_snella_with_its_schedule_resumes_to_the_bit(tmp_path: Path, step: int):
    given = {"method": {"name": "SNELLA", "rank": 4}, "schedules": [{"name": "BilevelCompetition", "target": 0.7, "warmup": 1}]}
    whole, again = resumed(tmp_path, step, **given)
    assert whole.keys() == again.keys() and all(torch.equal(whole[key], again[key]) for key in whole)
    kept = {key: value for key, value in whole.items() if key.endswith(".kept")}
    assert len(set(kept.values())) > 1  # the schedule has given different places different budgets


TOGETHER = [{"name": "IST", "updated": 1, "suppressed": 1, "candidates": 2, "interval": 2}, {"name": "LoRAPlus", "ratio": 4.0},
            {"name": "CheckpointAveraging", "every": 1, "last": 3}]  # fmt: skip
RUNS = {
    "together": {"schedules": TOGETHER},
    "budget": {"method": {"name": "AdaLoRA", "rank": 4}, "schedules": [{"name": "BudgetSchedule", "target": 2, "final": 2}]},
    "restarts": {"schedules": [{"name": "ReLoRA", "every": 2, "rewarm": 1}]},
    "galore": {"method": "Unfreeze", "targets": "attn.q", "schedules": [{"name": "GaLore", "rank": 4, "every": 2}]},
}


@pytest.mark.parametrize("name", ["together", *(pytest.param(n, marks=pytest.mark.slow) for n in RUNS if n != "together")])
def test_runs_resume_to_the_bit(tmp_path: Path, name: str):
    whole, again = resumed(tmp_path, 3 if name == "together" else 5, **RUNS[name])
    assert whole.keys() == again.keys() and all(torch.equal(whole[key], again[key]) for key in whole)


@pytest.mark.slow
def test_what_a_run_delivers(tmp_path: Path):
    """An adapter of the average, with ranks that were cut, or joined: it loads, and evaluates as it did while training."""
    from trimtab.training import evaluate

    for name in ("budget", "restarts", "together"):
        config = settings(tmp_path, max_steps=6, batch_size=4, output=str(tmp_path / name), **RUNS[name])
        result = train(config)
        found = evaluate(tmp_path / name)
        assert found.metrics == pytest.approx(result.metrics["test"])
        ranks = {value.shape[0] for key, value in written(tmp_path / name).items() if key.endswith((".a", ".e"))}
        assert (ranks == {12}) if name == "restarts" else (ranks == {4}) if name == "together" else min(ranks) < 4


class WithLoss(torch.nn.Module):
    """The tests' small model as transformers' Trainer wants it."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": loss(self.inner, (ids, labels))}


@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_trainer_of_one_s_own_equals_a_plain_loop(tmp_path: Path, accumulation: int):
    from transformers import Trainer, TrainingArguments

    from trimtab.training.schedules import Moments

    class InOrder(Trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    found = []
    for own in (True, False):
        model = net(tt.AdaLoRA(rank=3), moved=True)
        optimizer = adamw(model)
        given = tt.IST(updated=2, interval=2), tt.BudgetSchedule(target=2, final=1), tt.CheckpointAveraging(by="step", every=1)
        with scheduled(model, optimizer, *given, steps=4) as s:
            if own:
                rows = [{"ids": i, "labels": y} for n in range(4) for i, y in zip(*batch(n), strict=True)]
                args = TrainingArguments(
                    str(tmp_path), per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation,
                    max_steps=4, max_grad_norm=0.0, lr_scheduler_type="constant", save_strategy="no", report_to="none",
                    disable_tqdm=True, use_cpu=True,
                )  # fmt: skip
                InOrder(WithLoss(model), args, train_dataset=rows, optimizers=(optimizer, None), callbacks=[Moments(s)]).train()
            else:
                steps(model, optimizer, s, range(4), accumulation=accumulation)
        found.append(model)
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in found), strict=True))
