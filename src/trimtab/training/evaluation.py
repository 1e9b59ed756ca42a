"""evaluate: a saved run in a fresh process, on a split, a file, or raw inputs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from rich.console import Console

from trimtab import tasks
from trimtab.schedules.restoration import load
from trimtab.tasks import Bundle
from trimtab.training.config import TrainConfig, load_config, to_yaml
from trimtab.training.errors import RunError
from trimtab.training.metrics import IGNORED
from trimtab.training.run import ADAPTER, CONFIG, INFO

__all__ = ["Evaluation", "evaluate", "forward_all", "metrics_of"]


@dataclass
class Evaluation:
    """What an evaluation gave.

    Attributes:
        run: the run's folder.
        on: name of the split or file, or ``predict`` for raw inputs.
        rows: number of examples.
        metrics: ``{name: value}``; empty for raw inputs.
        predictions: one dict an example, in the order of the data, as the task decodes its outputs.
    """

    run: str
    on: str
    rows: int
    metrics: dict[str, float]
    predictions: list[dict[str, Any]] = field(repr=False)


def evaluate(
    run: str | Path, *, on: str = "test", inputs: Sequence[Any] | None = None, console: Console | None = None
) -> Evaluation:
    """Load a run's adapter onto its base and evaluate it, or predict.

    Args:
        run: the run's folder, or the configuration file whose ``output`` it is.
        on: a split of the run's data, or a file (.jsonl, .json, .csv, .parquet) with the same columns.
        inputs: raw inputs without labels, for text tasks texts; they are predicted instead.
        console: where the configuration and the metrics are printed; None prints nothing.

    Raises:
        RunError: there is no finished run. DataError: no such split, or rows that cannot be used.
        CheckpointMismatch: the adapter is damaged, or the base is another one.
    """
    folder, config = _open(Path(run))
    console = console or Console(quiet=True)
    console.print(to_yaml(config), markup=False, highlight=False)
    task = tasks.get(config.task)
    info = json.loads((folder / INFO).read_text("utf-8"))
    bundle = task.restore(config, info, on if inputs is None else list(inputs))
    load(bundle.model, folder / ADAPTER, name=config.adapter, originals="drop")
    metrics, predictions = task.evaluate(config, bundle, console=console)
    if metrics:
        console.print(f"{folder} on {on}: " + ", ".join(f"{key} {value:.4f}" for key, value in metrics.items()))
    return Evaluation(str(folder), on if inputs is None else "predict", len(predictions), metrics, predictions)


def metrics_of(bundle: Bundle, examples: list[dict[str, Any]], outputs: np.ndarray) -> dict[str, float]:
    """The task's metrics of ``outputs``, one entry an example."""
    labels = [np.asarray(0 if bundle.reduce else example["labels"]) for example in examples]
    return bundle.metrics(_Prediction(outputs, _stacked(labels)))


@dataclass
class _Prediction:
    """The two fields of transformers' ``EvalPrediction`` that metrics read."""

    predictions: np.ndarray
    label_ids: np.ndarray


def _open(path: Path) -> tuple[Path, TrainConfig]:
    """The run's folder and configuration, from either."""
    folder = Path(load_config(path).output) if path.is_file() else path
    for name in (CONFIG, INFO, ADAPTER):
        if not (folder / name).exists():
            why = "it was interrupted; train again to resume it" if (folder / CONFIG).exists() else "train it first"
            raise RunError(f"{folder} holds no finished run: there is no {name} in it ({why})")
    return folder, load_config(folder / CONFIG)


def _stacked(rows: list[np.ndarray]) -> np.ndarray:
    """One entry a row; rows of different lengths are filled up with -100, as they are in the evaluations of training."""
    if rows[0].ndim == 0:
        return np.stack(rows)
    width = max(row.shape[0] for row in rows)
    fill = [[(0, width - row.shape[0]), *[(0, 0)] * (row.ndim - 1)] for row in rows]
    return np.stack([np.pad(row, pad, constant_values=IGNORED) for row, pad in zip(rows, fill, strict=True)])


@torch.inference_mode()
def forward_all(bundle: Bundle, examples: list[dict[str, Any]], batch_size: int) -> tuple[np.ndarray, float | None]:
    """Raw outputs in the order of ``examples``, and the mean loss if they have labels; similar lengths run together."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    model = bundle.model.to(device).eval()
    order = sorted(range(len(examples)), key=lambda i: bundle.length(examples[i]))
    rows: list[Any] = [None] * len(examples)
    total, items = 0.0 if examples and "labels" in examples[0] else None, 0
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = send_to_device(bundle.collate([examples[i] for i in chosen]), device)
        labels = batch.pop("labels", None)
        outputs = model(**batch)
        if total is not None:
            total += bundle.loss(outputs, labels, num_items_in_batch=1).item()
            items += bundle.items(labels)
        kept = outputs["logits"].float() if bundle.reduce is None else bundle.reduce(outputs, labels)
        for i, row in zip(chosen, kept.cpu().numpy(), strict=True):
            rows[i] = row
    mean = None if total is None else total / items
    if mean is not None and not math.isfinite(mean):
        raise RunError(f"the loss of the loaded adapter is {mean}; the base or the adapter holds values that are not finite")
    return _stacked(rows), mean
