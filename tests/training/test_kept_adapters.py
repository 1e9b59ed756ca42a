"""Adapters of earlier checkpoints that stay after a run, with what was known of each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import trimtab as tt
from tiny_text import settings
from trimtab.training import train
from trimtab.training.curve import record_of
from trimtab.training.trainer import kept_steps


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def test_the_newest_adapters_stay_with_their_metrics(tmp_path: Path):
    result = train(settings(tmp_path, epochs=3, save_every=3, eval_every=3, keep_adapters=4))
    kept = kept_steps(tmp_path / "run" / "steps")
    assert sorted(kept) == [9, 12, 15, 18] and result.steps == 18
    records = {step: json.loads((path / "record.json").read_text()) for step, path in kept.items()}
    for step, record in records.items():
        entry = next(e for e in result.curve if e["step"] == step and "eval_loss" in e)
        assert record["step"] == step and record["eval_accuracy"] == entry["eval_accuracy"]
        # logs fall on steps 1, 2, 3, ...: the mean since the checkpoint before is the mean of three of them
        losses = [e["loss"] for e in result.curve if step - 3 < e["step"] <= step and "loss" in e]
        assert len(losses) == 3 and record["loss"] == pytest.approx(sum(losses) / 3)
    best = tensors(tmp_path / "run" / "adapter")
    if result.best_step in kept:
        assert all(torch.equal(value, best[key]) for key, value in tensors(kept[result.best_step]).items())
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert not torch.equal(*(next(iter(tensors(kept[step]).values())) for step in (9, 18)))


def test_entries_of_the_log_count_by_their_steps():
    log = [{"step": 4, "loss": 1.0}, {"step": 6, "loss": 0.5}, {"step": 6, "eval_loss": 0.3}, {"step": 8, "loss": 0.1}]
    assert record_of(log, 0, 6) == {"step": 6, "loss": (4 * 1.0 + 2 * 0.5) / 6, "last_loss": 0.5, "eval_loss": 0.3}
    assert record_of(log, 2, 6)["loss"] == (2 * 1.0 + 2 * 0.5) / 4  # the first entry's steps 3 and 4 alone
    assert "eval_loss" not in record_of(log, 6, 8)


def test_the_seed_of_a_start_is_saved_where_it_can_be_made_again(tmp_path: Path):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    tt.attach(model, tt.LoRA(rank=2), rng=torch.Generator().manual_seed(5))
    drawn = torch.Generator().manual_seed(6)
    torch.rand(1, generator=drawn)
    tt.attach(model, tt.LoRA(rank=2), rng=drawn, name="drawn")
    tt.attach(model, tt.LoRA(rank=2), name="own")
    for name in ("default", "drawn", "own"):
        tt.save(model, tmp_path / name, name=name)
    places = {name: json.loads((tmp_path / name / "manifest.json").read_text())["places"] for name in ("default", "drawn", "own")}
    assert [place["origin"] for place in places["default"]] == [[5, 0], [5, 1]]
    assert all("origin" not in place for place in places["drawn"])
    seed, order = places["own"][1]["origin"]
    again = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    tt.attach(again, tt.LoRA(rank=2), rng=torch.Generator().manual_seed(seed))
    assert order == 1 and torch.equal(tt.parameters(again, name="default")[2], tt.parameters(model, name="own")[2])
    # a loaded adapter, trained on and saved again, still knows its start
    tt.detach(model, "default")
    tt.load(model, tmp_path / "default", check_base=False)
    tt.save(model, tmp_path / "again", name="default")
    assert json.loads((tmp_path / "again" / "manifest.json").read_text())["places"] == places["default"]
