"""Light-PEFT in ``trimtab train``: interrupted in either stage, evaluated, merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_in_training import resumed
from transformers import AutoModel

import trimtab as tt
from tiny_text import settings
from trimtab.cli import main
from trimtab.core.checkpoint import read_manifest
from trimtab.schedules import restoration
from trimtab.training import evaluate, train

SCHEDULE = {"name": "LightPEFT", "estimate": 3, "heads": 1, "channels": 0.4, "modules": 0.5, "mask_rate": 5.0}


def given(**changes: Any) -> dict[str, Any]:
    return {"method": {"name": "LoRA", "rank": 4}, "targets": "attention | mlp", "schedules": [SCHEDULE | changes]}


@pytest.mark.parametrize("step, masks", [(1, "reset"), (3, "keep"), (5, "reset")])
def test_an_interrupted_run_ends_in_the_same_bytes(tmp_path: Path, step: int, masks: str):
    """Checkpoints are at steps 2 and 4, the cut is before the fourth step, that with index 3."""
    whole, again = resumed(tmp_path, step, **given(masks=masks))
    assert whole.keys() == again.keys() and all(torch.equal(whole[key], again[key]) for key in whole)
    manifests = [read_manifest(tmp_path / name / "adapter") for name in ("whole", "again")]
    assert manifests[0]["cut"] == manifests[1]["cut"] and set(manifests[0]["cut"]) == {"heads", "channels"}


def test_a_finished_run_is_evaluated_and_merged(tmp_path: Path):
    """The best step is sought after the cut alone; the adapter serves on a cut base, and on a whole one, merged."""
    config = settings(tmp_path, **given(), max_steps=8, eval_every=2)
    result = train(config)
    assert result.best_step in (4, 6, 8)
    assert result.model.bert.encoder.layer[0].attention.self.query.out_features == 24
    assert evaluate(config["output"], on="test").metrics["loss"] == pytest.approx(result.metrics["test"]["loss"], abs=1e-6)
    assert train(config).metrics == result.metrics  # finished: nothing is trained again


def test_merging_from_the_command_line_gives_a_model_of_the_whole_shape(tmp_path: Path):
    base = tmp_path / "model"
    settings(tmp_path)  # writes it
    model = AutoModel.from_pretrained(base).eval()
    ids = torch.arange(5, 15).view(2, 5)
    tt.attach(model, tt.LoRA(rank=2), targets="attention | mlp", rng=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for p in tt.parameters(model):
            p.add_(0.1)
    from cut_models import some

    restoration.surgery.cut(model, some(model))
    tt.save(model, tmp_path / "a")
    assert main(["merge", str(tmp_path / "a"), "--base", str(base), "--out", str(tmp_path / "merged")]) in (0, None)
    merged = AutoModel.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        wanted, found = (m(input_ids=ids).last_hidden_state for m in (model, merged))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert merged.config.num_attention_heads == 4
    tt.combine([tmp_path / "a"], tmp_path / "one", base=base, rank=32)  # masks and update of one place are one update
    whole = AutoModel.from_pretrained(base).eval()
    tt.load(whole, tmp_path / "one")
    with torch.no_grad():
        torch.testing.assert_close(whole(input_ids=ids).last_hidden_state, wanted, atol=1e-4, rtol=1e-4)
    with pytest.raises(tt.Unsupported, match="trained on a cut base"):
        tt.combine([tmp_path / "a"], tmp_path / "two", rank=32)
