"""Losses, metrics and averages against numbers worked out by hand, and what weight decay acts on."""

from __future__ import annotations

import io
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.nn import functional as F

from tiny_text import settings
from trimtab import tasks
from trimtab.artifacts.average import mean
from trimtab.tasks.instruction_tuning import _metrics
from trimtab.tasks.instructions.encoding import causal_loss, row_sums
from trimtab.tasks.instructions.readers import reader_for
from trimtab.tasks.instructions.scores import score
from trimtab.training import curve, load_config
from trimtab.training.arguments import arguments
from trimtab.training.metrics import LOSS, classification
from trimtab.training.run import attach_adapter
from trimtab.training.trainer import AdapterTrainer


def test_accuracy_and_macro_f1():
    """Guesses 0 1 1 2 2 0, labels 0 1 2 2 2 1: right in 4 of 6; F1 of 2/3, 1/2 and 4/5."""
    logits = np.eye(4)[[0, 1, 1, 2, 2, 0]]
    found = classification(SimpleNamespace(predictions=logits, label_ids=np.array([0, 1, 2, 2, 2, 1])))
    assert found == pytest.approx({"accuracy": 4 / 6, "macro_f1": (2 / 3 + 1 / 2 + 4 / 5) / 3})


def test_the_loss_of_texts_is_a_mean_and_a_share_of_a_step_s(tmp_path: Path):
    bundle = tasks.get("text-classification").prepare(load_config(settings(tmp_path)))
    logits, labels = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), torch.tensor([0, 2])
    losses = [-math.log(math.exp(2) / (math.exp(2) + 2)), -math.log(1 / (math.e + 2))]
    bundle.model.eval()
    assert float(bundle.mean_loss({"logits": logits}, labels)) == pytest.approx(sum(losses) / 2)
    assert float(bundle.loss({"logits": logits}, labels)) == pytest.approx(sum(losses) / 2)
    assert float(bundle.loss({"logits": logits}, labels, num_items_in_batch=8)) == pytest.approx(sum(losses) / 8)


def test_the_loss_of_answers_is_a_mean_over_the_tokens_that_are_learnt():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 4, 5), torch.tensor([[-100, -100, 3, 1], [-100, 2, -100, -100]])
    losses = [float(F.cross_entropy(logits[i, t - 1], labels[i, t])) for i, t in ((0, 2), (0, 3), (1, 1))]
    assert float(causal_loss({"logits": logits}, labels)) == pytest.approx(sum(losses) / 3)
    assert float(causal_loss({"logits": logits}, labels, 12)) == pytest.approx(sum(losses) / 12)
    rows = row_sums({"logits": logits}, labels)
    assert rows[:, 0].tolist() == pytest.approx([losses[0] + losses[1], losses[2]]) and rows[:, 1].tolist() == [2, 1]
    hits = sum(int(logits[i, t - 1].argmax()) == int(labels[i, t]) for i, t in ((0, 2), (0, 3), (1, 1)))
    found = _metrics(SimpleNamespace(predictions=rows.numpy()))
    wanted = {"loss": sum(losses) / 3, "perplexity": math.exp(sum(losses) / 3), "token_accuracy": hits / 3}
    assert found == pytest.approx(wanted)


def test_scores_of_a_test_set_are_shares_of_its_rows():
    texts = ["the answer is true", "the answer is false", "nothing", "the answer is true"]
    found, _ = score(reader_for("boolq"), texts, ["true", "true", "true", "false"], seen=[True, False, False, False])
    assert {key: found[key] for key in ("accuracy", "unread", "constant", "seen", "clean", "rows")} == pytest.approx(
        {"accuracy": 1 / 4, "unread": 1 / 4, "constant": 3 / 4, "seen": 1 / 4, "clean": 0.0, "rows": 4}
    )
    assert found["accuracy_se"] == pytest.approx(math.sqrt(0.25 * 0.75 / 4), rel=0.3)


def test_an_average_of_tensors_has_weights_of_sum_one():
    a, b, c = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0]), torch.tensor([5.0, -2.0])
    found = mean([{"x": a}, {"x": b}, {"x": c}], [0.5, 0.25, 0.25])["x"]
    assert found.tolist() == [0.5 * 1 + 0.25 * 3 + 0.25 * 5, 0.5 * 2 + 0.25 * 6 - 0.25 * 2]


def test_the_curve_shows_the_mean_of_the_losses_since_the_last_evaluation():
    entries = [
        {"step": 1, "epoch": 0.5, "loss": 4.0}, {"step": 2, "epoch": 1.0, "loss": 2.0},
        {"step": 2, "epoch": 1.0, "eval_loss": 1.5}, {"step": 3, "epoch": 1.5, "loss": 0.5},
        {"step": 3, "epoch": 1.5, "eval_loss": 1.25},
    ]  # fmt: skip
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(curve.as_table(entries, LOSS))
    lines = [line for line in console.export_text().splitlines() if "1.5000" in line or "1.2500" in line]
    assert "3.0000" in lines[0] and "0.5000" in lines[1] and "best" in lines[1] and "best" not in lines[0]


def optimizer_of(tmp_path: Path, **changes) -> tuple[AdapterTrainer, dict[int, dict]]:
    """A run's trainer with its optimizer, and the optimizer's group of each parameter."""
    config = load_config(settings(tmp_path, **changes))
    bundle = tasks.get(config.task).prepare(config)
    attach_adapter(bundle, config)
    args = arguments(config, tmp_path / "checkpoints", LOSS, rows=len(bundle.splits["train"]))
    trainer = AdapterTrainer(config, bundle, args, callbacks=[])
    groups = trainer.create_optimizer().param_groups
    return trainer, {id(p): group for group in groups for p in group["params"]}


def test_weight_decay_moves_matrices_and_no_vector(tmp_path: Path):
    """Without gradients of any size AdamW multiplies what decays by ``1 - rate decay``, and leaves all else."""
    # a trainer alone switches determinism on for the whole process; a run puts it back
    changes = {"deterministic": False, "weight_decay": 0.5, "head_learning_rate": 0.2, "learning_rate": 0.1, "method": "IA3"}
    trainer, groups = optimizer_of(tmp_path, **changes)
    lora = optimizer_of(tmp_path, **changes | {"method": {"name": "LoRA", "rank": 2}})
    for found, group_of in ((trainer, groups), lora):
        parameters = [p for p in found.model.parameters() if id(p) in group_of]
        vectors, matrices = ([p for p in parameters if (p.ndim >= 2) is wanted] for wanted in (False, True))
        assert vectors and matrices and len(parameters) == len(group_of)
        head = {id(p) for name, p in found.model.named_parameters() if "classifier" in name and id(p) in group_of}
        assert len(head) == 2
        before = {id(p): p.detach().clone() for p in parameters}
        for p in parameters:
            with torch.no_grad():
                p.add_(1.0)
                before[id(p)] = p.detach().clone()
            p.grad = torch.zeros_like(p)
        found.schedule.begin()
        found.optimizer.step()
        for p in parameters:
            rate = 0.2 if id(p) in head else 0.1
            factor = 1 - rate * 0.5 if p.ndim >= 2 else 1.0
            torch.testing.assert_close(p.detach(), before[id(p)] * factor, rtol=1e-6, atol=0)
