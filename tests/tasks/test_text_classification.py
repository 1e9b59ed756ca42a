"""Text classification: pooling ignores padding, pairs of texts, dropout, and what the metrics count."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tiny_text import settings, write_jsonl, write_model
from trimtab import tasks
from trimtab.training import DataError, load_config
from trimtab.training.evaluation import forward_all
from trimtab.training.metrics import classification


def prepare(config: dict):
    resolved = load_config(config)
    return resolved, tasks.get(resolved.task).prepare(resolved)


@pytest.mark.parametrize("pooling", ["mean", "cls", "own"])
def test_padding_changes_nothing(tmp_path: Path, pooling: str):
    _, bundle = prepare(settings(tmp_path, pooling=pooling))
    examples = bundle.splits["test"]
    alone, _ = forward_all(bundle, examples, 1)
    together, _ = forward_all(bundle, examples, 12)
    np.testing.assert_allclose(alone, together, atol=1e-5)


def test_mean_pooling_is_the_mean_of_the_real_tokens(tmp_path: Path):
    _, bundle = prepare(settings(tmp_path, pooling="mean"))
    batch = bundle.collate([{k: v for k, v in e.items() if k != "labels"} for e in bundle.splits["test"][:5]])
    model = bundle.model.eval()
    hidden = model.bert(**batch).last_hidden_state
    means = torch.stack([h[m.bool()].mean(0) for h, m in zip(hidden, batch["attention_mask"], strict=True)])
    torch.testing.assert_close(model(**batch)["logits"], model.classifier(means))


def test_head_start_is_a_function_of_the_seed(tmp_path: Path):
    weights = [prepare(settings(tmp_path, seed=seed))[1].model.classifier.weight for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_pairs_of_texts(tmp_path: Path):
    write_model(tmp_path / "model")
    entries = [{"a": "red cat", "b": "blue road", "y": 1}, {"a": "tree", "b": "flat", "y": 0}]
    for split in ("train", "validation"):
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", entries)
    data = {"source": str(tmp_path / "data"), "text": "a", "text_pair": "b", "label": "y"}
    config, bundle = prepare(settings(tmp_path, data=data))
    assert bundle.info == {"labels": ["0", "1"]}
    assert [len(e["input_ids"]) for e in bundle.splits["train"]] == [7, 5]
    task = tasks.get(config.task)
    restored = task.restore(config, bundle.info, [["red cat", "blue road"]])
    assert restored.splits["predict"][0]["input_ids"] == bundle.splits["train"][0]["input_ids"]
    with pytest.raises(DataError, match="input 1 has 1 texts; this task reads 2: a, b"):
        task.restore(config, bundle.info, ["red cat"])


@pytest.mark.parametrize("pooling", ["mean", "own"])
def test_dropout_reaches_every_layer(tmp_path: Path, pooling: str):
    _, bundle = prepare(settings(tmp_path, pooling=pooling, dropout=0.0, head_dropout=0.0))
    found = [m.p for name, m in bundle.model.named_modules() if isinstance(m, torch.nn.Dropout)]
    assert len(found) > 4 and set(found) == {0.0}


def test_long_texts_are_cut(tmp_path: Path):
    data = tmp_path / "data"
    for split in ("train", "validation"):
        write_jsonl(data / f"{split}.jsonl", [{"text": "cat " * 50, "label": "a"}, {"text": "red", "label": "b"}])
    _, bundle = prepare(settings(tmp_path, data={"source": str(data), "max_length": 10}))
    assert [bundle.length(example) for example in bundle.splits["train"]] == [10, 3]


def test_metrics_on_a_case_by_hand():
    logits = np.eye(3)[[0, 0, 1, 1]]
    found = classification(SimpleNamespace(predictions=logits, label_ids=np.array([0, 0, 0, 1])))
    # class 0: precision 1, recall 2/3; class 1: precision 1/2, recall 1; class 2 occurs nowhere
    assert found["accuracy"] == 0.75
    assert found["macro_f1"] == pytest.approx((0.8 + 2 / 3) / 2)


def test_smoothing_acts_in_training_alone(tmp_path: Path):
    _, bundle = prepare(settings(tmp_path, label_smoothing=0.3))
    outputs, labels = {"logits": torch.tensor([[4.0, 0.0, 0.0]])}, torch.tensor([0])
    plain = torch.nn.functional.cross_entropy(outputs["logits"], labels)
    bundle.model.train()
    assert bundle.loss(outputs, labels) > plain + 0.1
    bundle.model.eval()
    torch.testing.assert_close(bundle.loss(outputs, labels), plain)
