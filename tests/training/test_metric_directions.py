"""Which adapter is the best one, whichever way a metric gets better; and one loss, however it is measured."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import trimtab as tt
from tiny_text import LABELS, WORDS, settings
from trimtab import tasks
from trimtab.artifacts.average import average
from trimtab.tasks import Bundle
from trimtab.tasks.text_classification import TextClassification, TextClassificationConfig
from trimtab.training import RunError, evaluate, load_config, train
from trimtab.training.callbacks import exhausted
from trimtab.training.metrics import Metric, counted
from trimtab.training.run import attach_adapter
from trimtab.training.scoring import scorer


def graded(stated: tuple[Metric | str, ...], name: str, gives: tuple[str, ...] = ("rmse", "skill")) -> str:
    """Register a task on labelled texts that measures the root of a mean of squares, and the same turned round; its name."""

    def measured(prediction: Any) -> dict[str, float]:
        guesses = torch.as_tensor(prediction.predictions).softmax(-1).numpy()
        right = np.eye(guesses.shape[-1])[prediction.label_ids]
        rmse = float(np.sqrt(((guesses - right) ** 2).mean()))
        return {key: value for key, value in {"rmse": rmse, "skill": -rmse}.items() if key in gives}

    class Graded(TextClassification):
        metrics = stated

        def prepare(self, config: TextClassificationConfig) -> Bundle:
            return dataclasses.replace(super().prepare(config), metrics=measured)

        def restore(self, config: TextClassificationConfig, info: dict[str, Any], inputs: Any) -> Bundle:
            return dataclasses.replace(super().restore(config, info, inputs), metrics=measured)

    tasks.task(name)(Graded)
    return name


RISING = {"epochs": 5, "learning_rate": 3e-2, "keep_adapters": 20}  # evaluations differ, and the last is not the best


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same run, once chosen by an error and once by a score, which is the error turned round."""
    folder = tmp_path_factory.mktemp("directions")
    name = graded((Metric("rmse", better="lower"), Metric("skill", better="higher")), "graded")
    results = {m: train(settings(folder, task=name, metric=m, output=str(folder / m), **RISING)) for m in ("rmse", "skill")}
    return {"folder": folder, **results}


def test_the_best_adapter_has_the_best_metric_whichever_way_it_goes(runs: dict[str, Any]):
    for name, choose in (("rmse", min), ("skill", max)):
        values = {entry["step"]: entry[f"eval_{name}"] for entry in runs[name].curve if f"eval_{name}" in entry}
        assert len(set(values.values())) == len(values) == 5
        assert values[runs[name].best_step] == choose(values.values())
        assert runs[name].metrics["validation"][name] == pytest.approx(choose(values.values()), abs=1e-6)
    assert runs["rmse"].best_step == runs["skill"].best_step


def test_patience_counts_from_the_best_whichever_way_it_goes():
    logs = [{"step": i, "eval_loss": 1.0, "eval_rmse": v} for i, v in enumerate([3.0, 1.0, 2.0, 2.5])]
    state = type("State", (), {"log_history": logs})()
    assert exhausted(state, 2, Metric("rmse", "lower")) and not exhausted(state, 3, Metric("rmse", "lower"))
    assert exhausted(state, 3, Metric("rmse", "higher"))


def test_what_is_not_a_number_is_never_the_best():
    entries = [{"step": 1, "eval_rmse": math.nan}, {"step": 2, "eval_rmse": 4.0}]
    assert all(Metric("rmse", way).best(entries)["step"] == 2 for way in ("lower", "higher"))
    assert Metric("rmse", "lower").best(entries[:1]) is None


def test_a_score_is_higher_for_the_better_model(runs: dict[str, Any]):
    values = {}
    for name in ("rmse", "skill"):
        run = runs["folder"] / name
        model, score = scorer(run)
        bare = score(model)
        tt.load(model, run / "adapter")
        values[name] = (bare, score(model))
    assert values["rmse"] == pytest.approx(values["skill"]) and values["rmse"][1] > values["rmse"][0]


def test_averaging_takes_the_best_and_weighs_by_what_the_run_recorded(runs: dict[str, Any], tmp_path: Path):
    run = runs["folder"] / "rmse"
    steps = sorted((run / "steps").iterdir(), key=lambda p: int(p.name[5:]))
    errors = {p: json.loads((p / "record.json").read_text())["eval_rmse"] for p in steps}
    best = average(run, tmp_path / "a", best=2, scheme="uniform")  # by the run's own metric
    assert sorted(best.used) == sorted(sorted(errors, key=errors.get)[:2])
    weighed = average(run, tmp_path / "b", by="loss", metric="eval_rmse", strength=1.0)
    inverse = np.array([1 / errors[p] for p in steps])
    assert weighed.weights == pytest.approx(list(inverse / inverse.sum()))
    with pytest.raises(tt.Unsupported, match="eval_rmse is not better when higher, .*take by='loss'"):
        average(run, tmp_path / "c", by="score")
    with pytest.raises(tt.Unsupported, match="eval_skill is not better when lower, .*take by='score'"):
        average(run, tmp_path / "c", by="loss", metric="eval_skill")


def test_a_recorded_value_without_a_direction_is_not_chosen_by(runs: dict[str, Any], tmp_path: Path):
    run = runs["folder"] / "rmse"
    old = [tmp_path / step.name for step in sorted((run / "steps").iterdir())[:3]]
    for folder in old:
        folder.mkdir()
        for file in (run / "steps" / folder.name).iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        record = json.loads((folder / "record.json").read_text())
        (folder / "record.json").write_text(json.dumps({k: v for k, v in record.items() if k != "better"}))
    with pytest.raises(tt.Unsupported, match="does not tell which way eval_rmse gets better; pass better="):
        average(old, tmp_path / "out", best=1, scheme="uniform", metric="eval_rmse")
    lowest = min(old, key=lambda f: json.loads((f / "record.json").read_text())["eval_rmse"])
    assert average(old, tmp_path / "out", best=1, scheme="uniform", metric="eval_rmse", better="lower").used == [lowest]


def test_a_metric_without_a_direction_is_refused_at_the_start(tmp_path: Path):
    name = graded(("rmse", Metric("skill", "higher")), "undirected")
    with pytest.raises(ValueError, match="chosen by 'rmse', and the task undirected does not say which way it gets better"):
        train(settings(tmp_path, task=name, metric="rmse"))
    assert not (tmp_path / "run").exists()
    train(settings(tmp_path, task=name, metric="skill", epochs=1))  # what nothing is chosen by needs none


def test_a_direction_is_higher_or_lower_and_a_loss_falls():
    with pytest.raises(tt.Unsupported, match="found better='up'"):
        Metric("rmse", better="up")
    name = graded((Metric("loss", "higher"),), "rising-loss")
    with pytest.raises(ValueError, match="a loss is better when lower"):
        tasks.get(name).metric("loss")


def test_a_metric_that_the_evaluation_does_not_give_is_told(tmp_path: Path):
    name = graded((Metric("rmse", "lower"), Metric("skill", "higher")), "forgetful", gives=("rmse",))
    with pytest.raises(RunError, match="gave no 'skill', by which the best adapter is chosen; found loss, rmse"):
        train(settings(tmp_path, task=name, metric="skill"))
    assert not (tmp_path / "run").exists()


# -- one loss


def tagging(name: str = "tagging") -> str:
    """Register a task with a label a token, none on special tokens and the last word of the vocabulary. Its name."""
    kinds = {word: i % 3 for i, word in enumerate(WORDS[:-1])}

    class Tagging(TextClassification):
        metrics = (Metric("right", "higher"),)

        def prepare(self, config: TextClassificationConfig) -> Bundle:
            return self._tags(super().prepare(config), config)

        def restore(self, config: TextClassificationConfig, info: dict[str, Any], inputs: Any) -> Bundle:
            return self._tags(super().restore(config, info, inputs), config)

        def _tags(self, bundle: Bundle, config: TextClassificationConfig) -> Bundle:
            from transformers import AutoModelForTokenClassification, AutoTokenizer, DataCollatorForTokenClassification

            torch.manual_seed(config.seed)
            tokenizer = AutoTokenizer.from_pretrained(config.model)
            model = AutoModelForTokenClassification.from_pretrained(config.model, num_labels=len(LABELS))
            for examples in bundle.splits.values():
                for example in examples:
                    words = tokenizer.convert_ids_to_tokens(example["input_ids"])
                    example["labels"] = [kinds.get(word, -100) for word in words]

            def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
                logits = outputs["logits"].transpose(1, 2)
                total = F.cross_entropy(logits, labels, reduction="sum")
                return total / ((labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)

            def right(prediction: Any) -> dict[str, float]:
                chosen = prediction.label_ids != -100
                return {"right": float((prediction.predictions.argmax(-1) == prediction.label_ids)[chosen].mean())}

            collate = DataCollatorForTokenClassification(tokenizer)
            return Bundle(model, model.classifier, bundle.splits, bundle.length, collate, loss, right, bundle.info)

        def decode(self, info: dict[str, Any], outputs: Any) -> list[dict[str, Any]]:
            return [{"tags": row.argmax(-1).tolist()} for row in outputs]

    tasks.task(name)(Tagging)
    return name


def test_training_and_evaluation_divide_the_loss_by_the_labels_that_count(tmp_path: Path):
    changes = {"eval_batch_size": 5, "epochs": 1, "metric": "right"}
    result = train(settings(tmp_path, task=tagging(), **changes))
    found = evaluate(tmp_path / "run", on="test").metrics
    # by hand: one row at a time, the mean over all labels of the split
    config = load_config(tmp_path / "run" / "config.yaml")
    bundle = tasks.get("tagging").restore(config, {"labels": LABELS}, "test")
    attach_adapter(bundle, config)
    tt.detach(bundle.model, "default")
    tt.load(bundle.model, tmp_path / "run" / "adapter")
    bundle.model.eval()
    losses = []
    with torch.no_grad():
        for row in bundle.splits["test"]:
            logits = bundle.model(torch.tensor([row["input_ids"]])).logits[0]
            losses += [float(F.cross_entropy(x, torch.tensor(y))) for x, y in zip(logits, row["labels"], strict=True) if y != -100]
    counts = [sum(y != -100 for y in row["labels"]) for row in bundle.splits["test"]]
    assert len(losses) == sum(counts) and len(set(counts)) > 1 and len(counts) % 5 != 0  # no row, and no batch, counts like another
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert result.metrics["test"] == pytest.approx(found, rel=1e-5)


def test_labels_that_count_are_those_that_are_not_minus_100():
    labels = torch.full((3, 7), -100)
    labels[0, :2], labels[2, 6] = 1, 0
    assert counted(labels) == 3 and counted(torch.tensor([0, -100, 2])) == 2
    assert Bundle.items is counted
