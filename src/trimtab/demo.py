"""The demonstration: ``python -m trimtab.demo``, or ``make demo``. Two cores need about four minutes.

Trains LoRA and a fresh head on WordNet supersenses (20 classes from a noun's definition), compares with a linear probe on
the same frozen features, saves the adapter, and lets a new process load it and predict definitions that nobody trained on.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.cli._noise import hush
from trimtab.core.errors import TrimtabError
from trimtab.tasks import Bundle, get
from trimtab.training import TrainConfig, load_config, train
from trimtab.training.data import load_splits
from trimtab.training.evaluation import forward_all

__all__ = ["CONFIG", "main"]

#: the same as examples/supersense.yaml, which a test compares
CONFIG = {
    "task": "text-classification",
    "model": "all-minilm-l6-v2",
    "data": "wordnet-supersense",
    "method": {"name": "LoRA", "rank": 8},
    "pooling": "mean",
    "dropout": 0.0,
    "epochs": 4,
    "batch_size": 32,
    "learning_rate": 1e-3,
    "label_smoothing": 0.1,
    "seed": 0,
    "output": "runs/supersense",
}
SHOWN = 6  # predictions in the table


def pooled(bundle: Bundle, split: str, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """Frozen features ``(n, width)`` and labels ``(n,)`` of a split: the input of the head."""
    examples = bundle.splits[split]
    head, bundle.model.classifier = bundle.model.classifier, nn.Identity()
    try:
        values, _ = forward_all(bundle, [{k: v for k, v in e.items() if k != "labels"} for e in examples], config.eval_batch_size)
    finally:
        bundle.model.classifier = head
    return torch.from_numpy(values), torch.tensor([e["labels"] for e in examples])


def accuracy(head: nn.Linear, data: tuple[Tensor, Tensor]) -> float:
    """Share of rows of ``(features, labels)`` where the head's largest logit is the label."""
    with torch.inference_mode():
        return (head(data[0]).argmax(-1) == data[1]).float().mean().item()


def probe(train_data: tuple[Tensor, Tensor], validation: tuple[Tensor, Tensor], classes: int) -> nn.Linear:
    """Logistic regression by L-BFGS on features ``(n, width)``; its L2 penalty is chosen on the validation rows."""
    best, best_accuracy = nn.Linear(train_data[0].shape[1], classes), -1.0
    for penalty in (1e-3, 1e-4, 1e-5):
        head = nn.Linear(train_data[0].shape[1], classes)
        nn.init.zeros_(head.weight)
        optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

        def closure(head: nn.Linear = head, optimizer: Any = optimizer, penalty: float = penalty) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(head(train_data[0]), train_data[1]) + penalty * head.weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        found = accuracy(head, validation)
        if found > best_accuracy:
            best, best_accuracy = head, found
    return best


def linear_probe(config: TrainConfig) -> dict[str, Any]:
    """Train and measure the probe; ``before`` is the accuracy of the untrained head on the same features."""
    started = time.perf_counter()
    bundle = get(config.task).prepare(config)
    data = {split: pooled(bundle, split, config) for split in ("train", "validation", "test")}
    before = accuracy(bundle.model.classifier, data["test"])
    head = probe(data["train"], data["validation"], len(bundle.info["labels"]))
    return {
        "trainable": sum(p.numel() for p in head.parameters()),
        "seconds": time.perf_counter() - started,
        "before": before,
        "after": accuracy(head, data["test"]),
    }


def predict_elsewhere(output: Path, console: Console) -> list[dict[str, Any]]:
    """Let a new process load the saved adapter and predict the test split; raises if it fails."""
    file = output / "predictions.jsonl"
    command = [sys.executable, "-m", "trimtab.cli", "eval", str(output), "--on", "test", "--predictions", str(file)]
    console.print("$ " + " ".join(["trimtab", *command[3:]]), style="bold", highlight=False)
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        raise RuntimeError(f"the new process failed with exit code {finished.returncode}: {finished.stderr.strip()}")
    console.print(finished.stdout.strip().splitlines()[-1], highlight=False)
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def result_table(linear: dict[str, Any], adapter: Any) -> Table:
    """The comparison, one row a model."""
    table = Table(title="WordNet supersenses, 20 classes, 2,400 unseen definitions", title_justify="left")
    for column in ("", "trainable", "of the model", "size on disk", "time", "accuracy before", "after"):
        table.add_column(column, justify="left" if not column else "right")
    share = f"{linear['trainable'] / adapter.total:.2%}", f"{adapter.trainable / adapter.total:.2%}"
    before, size = f"{linear['before']:.1%}", f"{adapter.adapter_bytes / 2**20:.2f} MiB"
    times = f"{linear['seconds']:.0f} s", f"{adapter.seconds:.0f} s"
    after = f"{linear['after']:.1%}", f"{adapter.metrics['test']['accuracy']:.1%}"
    table.add_row("linear probe", f"{linear['trainable']:,}", share[0], "", times[0], before, after[0])
    table.add_row("LoRA, rank 8", f"{adapter.trainable:,}", share[1], size, times[1], before, after[1])
    return table


def main() -> int:
    """Run the demonstration; 0 if the new process predicts what this one measured."""
    hush()
    console = Console()
    started = time.perf_counter()
    config = load_config(CONFIG, overrides={"output": "runs/demo"})
    output = Path(config.output)
    shutil.rmtree(output, ignore_errors=True)
    console.print("1. a linear probe on the frozen model", style="bold")
    linear = linear_probe(config)
    console.print(f"test accuracy {linear['before']:.1%} before, {linear['after']:.1%} after, {linear['seconds']:.0f} s")
    console.print("2. LoRA", style="bold")
    adapter = train(config, console=console)
    console.print(result_table(linear, adapter))
    console.print("3. the saved adapter in a new process", style="bold")
    predictions = predict_elsewhere(output, console)
    rows = [row.values for row in load_splits(config.data, ["text", "label"])["test"]]
    share = float(np.mean([p["label"] == row["label"] for p, row in zip(predictions, rows, strict=True)]))
    table = Table(title="definitions that were not trained on", title_justify="left")
    for column in ("definition", "predicted", "probability", "label"):
        table.add_column(column)
    for prediction, row in list(zip(predictions, rows, strict=True))[:SHOWN]:
        table.add_row(row["text"], prediction["label"], f"{prediction['probability']:.2f}", row["label"])
    console.print(table)
    console.print(f"the demonstration took {time.perf_counter() - started:.0f} s")
    if abs(share - adapter.metrics["test"]["accuracy"]) > 1e-3:
        console.print(f"the new process is right on {share:.4f}, this one on {adapter.metrics['test']['accuracy']:.4f}")
        return 1
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except TrimtabError as error:
        sys.exit(f"trimtab: {error}")
