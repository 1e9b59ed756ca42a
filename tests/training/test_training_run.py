"""Runs: what they write, what they refuse, and that they are a function of their configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import trimtab as tt
from tiny_text import rows, settings, write_data, write_jsonl, write_model
from trimtab.core import registry
from trimtab.training import DataError, RunError, evaluate, load_config, train
from trimtab.training.trainer import AdapterTrainer

LEARNS = {"epochs": 8, "learning_rate": 1e-2, "dropout": 0.0, "head_dropout": 0.0}


def adapter_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The saved tensors by name."""
    (file,) = (folder / "adapter").glob("*.safetensors")
    return load_file(file)


def test_a_run_learns_and_writes_everything(tmp_path: Path):
    write_data(tmp_path / "data", train=120)
    config = settings(tmp_path, **LEARNS)
    result = train(config)
    assert result.metrics["test"]["accuracy"] == 1.0
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "adapter", "config.yaml", "curve.json", "curve.png", "result.json", "task.json",
    ]  # fmt: skip
    assert (tmp_path / "run" / "curve.png").read_bytes().startswith(b"\x89PNG")
    # LoRA rank 4 on q, k, v, o (32x32) and two feed-forward matrices (32x64) of 2 layers, and a head 32 -> 3 with bias
    assert result.trainable == 2 * (4 * 4 * (32 + 32) + 2 * 4 * (32 + 64)) + 3 * 32 + 3
    assert result.trainable == sum(v.numel() for v in adapter_tensors(tmp_path / "run").values())
    assert load_config(tmp_path / "run" / "config.yaml") == load_config(config)
    assert len([entry for entry in result.curve if "eval_accuracy" in entry]) == 8


def test_process_settings_are_put_back(tmp_path: Path):
    threads = torch.get_num_threads()
    train(settings(tmp_path, epochs=1, threads=threads + 1, deterministic=True))
    assert torch.get_num_threads() == threads and not torch.are_deterministic_algorithms_enabled()


def test_base_is_not_changed_and_not_saved(tmp_path: Path):
    from transformers import AutoModel

    config = settings(tmp_path)
    before = AutoModel.from_pretrained(config["model"]).state_dict()
    model = train(config).model
    after = model.state_dict()
    compared = [key for key in before if f"bert.{key}" in after]
    assert len(compared) > 30 and all(torch.equal(before[key], after[f"bert.{key}"]) for key in compared)


def test_checkpoints_hold_the_adapter_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[set[str]] = []
    original = AdapterTrainer._save_checkpoint

    def spy(self: AdapterTrainer, model: Any, trial: Any) -> None:
        original(self, model, trial)
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        seen.append({p.name for p in folder.iterdir()})
        (file,) = (folder / "adapter").glob("*.safetensors")
        stored = sum(v.numel() for v in load_file(file).values())
        assert stored == sum(p.numel() for p in tt.parameters(self.model))

    monkeypatch.setattr(AdapterTrainer, "_save_checkpoint", spy)
    train(settings(tmp_path))
    assert len(seen) == 2
    assert seen[0] == {"adapter", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}


def test_seed_decides_every_bit(tmp_path: Path):
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder, seed in zip(folders, (0, 0, 1), strict=True):
        train(settings(tmp_path, output=str(folder), seed=seed))
    first, again, other = map(adapter_tensors, folders)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first)


def test_accumulation_equals_the_larger_batch(tmp_path: Path):
    write_model(tmp_path / "model", dropout=0.0)
    changes = {"head_dropout": 0.0, "weight_decay": 0.01, "label_smoothing": 0.1}
    for name, batch, accumulation in (("large", 8, 1), ("small", 2, 4)):
        train(settings(tmp_path, output=str(tmp_path / name), batch_size=batch, accumulation=accumulation, **changes))
    large, small = adapter_tensors(tmp_path / "large"), adapter_tensors(tmp_path / "small")
    assert large.keys() == small.keys()
    for key in large:
        torch.testing.assert_close(large[key], small[key], atol=2e-5, rtol=1e-3)


def test_best_adapter_is_the_one_that_is_kept(tmp_path: Path):
    result = train(settings(tmp_path, epochs=6, learning_rate=3e-2))
    evaluated = {entry["step"]: entry["eval_accuracy"] for entry in result.curve if "eval_accuracy" in entry}
    assert evaluated[result.best_step] == max(evaluated.values()) == result.metrics["validation"]["accuracy"]


def test_patience_stops_early(tmp_path: Path):
    # a learning rate so small that no evaluation beats the first one
    result = train(settings(tmp_path, epochs=20, learning_rate=1e-9, patience=2))
    assert result.steps == 3 * 6 and result.best_step == 6


@pytest.mark.parametrize(
    "changes", [{"pooling": "own"}, {"pooling": "cls"}, {"precision": "bf16"}, {"method": None}, {"epochs": 0.5}]
)
def test_variants_train_and_evaluate_to_the_same(tmp_path: Path, changes: dict):
    result = train(settings(tmp_path, **changes))
    found = evaluate(tmp_path / "run").metrics["accuracy"]
    assert found == pytest.approx(result.metrics["test"]["accuracy"], abs=0.1 if "precision" in changes else 1e-6)


def test_head_learns_at_its_own_rate(tmp_path: Path):
    train(settings(tmp_path, head_learning_rate=1e-12, epochs=1))
    tensors = adapter_tensors(tmp_path / "run")
    head = {key: value for key, value in tensors.items() if "classifier" in key}
    bias = next(value for key, value in head.items() if value.ndim == 1)
    assert len(head) == 2 and float(bias.abs().max()) < 1e-9
    assert max(float(value.abs().max()) for key, value in tensors.items() if key not in head and value.shape[1] == 4) > 1e-3


def test_complete_run_is_returned_and_overwrite_trains_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = train(settings(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(AdapterTrainer, "train", lambda *a, **k: pytest.fail("trained again"))
        again = train(settings(tmp_path))
    assert again.metrics == first.metrics and again.curve == first.curve and again.model is None
    other = train(settings(tmp_path, epochs=1), overwrite=True)
    assert other.steps == 6


def test_a_method_from_a_test_file_trains(tmp_path: Path):
    from dataclasses import dataclass

    from trimtab.core.registry import method

    @dataclass(frozen=True)
    class RowGain(tt.MethodConfig):
        """W' = diag(1 + g) W."""

    @method(RowGain, paper="test")
    class RowGainAdapter(tt.Reparameterization):
        def __init__(self, config, site, *, rng):
            super().__init__(config, site)
            self.g = self.zeros(site.out_features, 1)

        def weight(self, W):
            return W * (1 + self.g)

    result = train(settings(tmp_path, method="RowGain", epochs=1))
    assert result.trainable == 2 * (5 * 32 + 64) + 99
    assert evaluate(tmp_path / "run").metrics["accuracy"] == pytest.approx(result.metrics["test"]["accuracy"])


def refused(tmp_path: Path, error: type[Exception], message: str, **changes: Any) -> None:
    """Training must raise ``error`` with ``message`` and leave nothing behind."""
    with pytest.raises(error, match=message):
        train(settings(tmp_path, **changes))
    assert not (tmp_path / "run").exists()


def test_unknown_labels_are_refused(tmp_path: Path):
    data = write_data(tmp_path / "data")
    write_jsonl(data / "test.jsonl", [*rows(3, seed=9), {"text": "cat", "label": "anmal"}])
    refused(tmp_path, DataError, "test.jsonl, line 4 .*'anmal' is not in the training data; nearest: animal")


def test_one_label_is_refused(tmp_path: Path):
    data = write_data(tmp_path / "data")
    write_jsonl(data / "train.jsonl", [{"text": "cat", "label": "animal"}] * 3)
    refused(tmp_path, DataError, "one label 'animal'")


def test_text_that_is_a_number_is_refused(tmp_path: Path):
    data = write_data(tmp_path / "data")
    write_jsonl(data / "train.jsonl", [{"text": 3, "label": "animal"}, {"text": "red", "label": "colour"}])
    write_jsonl(data / "validation.jsonl", [{"text": "red", "label": "colour"}])
    write_jsonl(data / "test.jsonl", [{"text": "red", "label": "colour"}])
    refused(tmp_path, DataError, "train.jsonl, line 1: the column 'text' must be text; found 3")


def test_targets_that_match_nothing_are_refused(tmp_path: Path):
    refused(tmp_path, tt.NoMatch, "quary", targets="quary")


def test_unknown_metric_is_refused(tmp_path: Path):
    refused(tmp_path, ValueError, "no metric 'acuracy'; nearest: accuracy", metric="acuracy")


def test_model_that_is_nowhere_is_refused(tmp_path: Path):
    refused(tmp_path, ValueError, "no packaged model", model="nobody/nothing-here")


def test_nan_in_the_base_is_refused(tmp_path: Path):
    from transformers import AutoModel

    folder = write_model(tmp_path / "model")
    model = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight[3, 4] = float("nan")
    model.save_pretrained(folder)
    refused(tmp_path, RunError, "NaN or infinite values in 1 of its tensors, first in .*layer.1.output.dense.weight")


def test_nan_loss_stops_and_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    original = AdapterTrainer.compute_loss

    def poisoned(self: AdapterTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = original(self, *args, **kwargs)
        return loss * float("nan") if self.is_in_train and self.state.global_step == 9 and self.model.training else loss

    monkeypatch.setattr(AdapterTrainer, "compute_loss", poisoned)
    with pytest.raises(RunError, match="the loss became nan at step 10 of 12.*checkpoint-8.*Lower learning_rate"):
        train(settings(tmp_path, save_every=4))
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-8"
    (file,) = (checkpoint / "adapter").glob("*.safetensors")
    assert all(bool(torch.isfinite(value).all()) for value in load_file(file).values())


def test_nan_at_the_first_step_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def infinite(self: AdapterTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        return sum(p.sum() for p in tt.parameters(self.model)) * float("inf")

    monkeypatch.setattr(AdapterTrainer, "compute_loss", infinite)
    refused(tmp_path, RunError, "at step 1 of 12, and training stopped; no checkpoint had been written yet")


def test_gradient_that_is_not_finite_stops_before_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stepped: list[int] = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: stepped.append(1))

    def flat(self: AdapterTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        # the root of zero: a finite loss with an infinite gradient
        return sum((p * 0).sum() for p in tt.parameters(self.model)).sqrt()

    monkeypatch.setattr(AdapterTrainer, "compute_loss", flat)
    refused(tmp_path, RunError, "the norm of the gradient became nan at step 1")
    assert stepped == []


@pytest.mark.skipif(torch.accelerator.is_available(), reason="fp16 works where there is an accelerator")
def test_fp16_without_an_accelerator_is_refused(tmp_path: Path):
    refused(tmp_path, ValueError, "precision fp16 needs an accelerator", precision="fp16")


def test_bf16_runs_the_forward_in_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from trimtab.tasks.text_classification import PooledClassifier

    seen: set[torch.dtype] = set()
    original = PooledClassifier.forward

    def spy(self: PooledClassifier, *args: Any, **kwargs: Any) -> dict:
        seen.add(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(PooledClassifier, "forward", spy)
    result = train(settings(tmp_path, precision="bf16", epochs=1))
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in tt.parameters(result.model)} == {torch.float32}


def test_folder_of_another_run_is_refused_and_left_alone(tmp_path: Path):
    train(settings(tmp_path))
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(RunError, match="another configuration .*seed = 0 there, 5 now"):
        train(settings(tmp_path, seed=5))
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


def test_folder_that_is_no_run_is_refused(tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match="holds no trimtab run"):
        train(settings(tmp_path))
    # overwrite is for runs; it does not delete what trimtab did not write
    with pytest.raises(RunError, match="holds no trimtab run"):
        train(settings(tmp_path), overwrite=True)
    assert (tmp_path / "run" / "thesis.tex").read_text() == "years of work"


def test_evaluate_predicts_texts_and_refuses_what_is_not_there(tmp_path: Path):
    write_data(tmp_path / "data", train=120)
    train(settings(tmp_path, **LEARNS))
    found = evaluate(tmp_path / "run", inputs=["tree cat", "house red house"])
    assert [entry["label"] for entry in found.predictions] == ["animal", "colour"] and found.metrics == {}
    file = write_jsonl(tmp_path / "more.jsonl", rows(9, seed=77))
    assert evaluate(tmp_path / "run", on=str(file)).rows == 9
    with pytest.raises(DataError, match="no split 'tset'; found train, validation, test"):
        evaluate(tmp_path / "run", on="tset")
    with pytest.raises(RunError, match="holds no finished run"):
        evaluate(tmp_path / "nowhere")


def test_evaluate_refuses_another_base(tmp_path: Path):
    from transformers import AutoModel, BertConfig

    train(settings(tmp_path))
    torch.manual_seed(99)
    AutoModel.from_config(BertConfig.from_pretrained(tmp_path / "model")).save_pretrained(tmp_path / "model")
    with pytest.raises(tt.CheckpointMismatch, match="another base"):
        evaluate(tmp_path / "run")


def test_one_verb_is_one_function():
    assert tt.train is train and tt.evaluate is evaluate


def test_curve_json_holds_no_timings(tmp_path: Path):
    train(settings(tmp_path))
    entries = json.loads((tmp_path / "run" / "curve.json").read_text())
    keys = set().union(*entries)
    assert {"loss", "eval_loss", "eval_accuracy", "learning_rate", "step"} <= keys
    assert not [key for key in keys if "runtime" in key or "second" in key]


@pytest.mark.parametrize("name", ["LoRAGA", "GPS", "SPT", "NormTuning", "BitFit", "VeRA", "OFT"])
def test_other_methods_train_from_the_same_file(name: str, tmp_path: Path):
    """Those with a start from gradients, with own targets, with shared tensors; LoRAGA's gradient is that of training rows."""
    more = registry.entry(name).tests[:1]
    config = settings(tmp_path, method={"name": name, **(more[0] if more else {})}, epochs=1)
    result = train(config)
    assert result.metrics["test"]["accuracy"] > 0 and result.trainable > 3 * 32 + 3
    again = evaluate(config["output"])
    assert again.metrics["accuracy"] == result.metrics["test"]["accuracy"]
