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
from trimtab.training.folder import ADAPTER, CONFIG, INFO
from trimtab.training.metrics import IGNORED

LONGEST = 512  # tokens a row is cut to where no run says it; fewer where the model reads fewer

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
    run: str | Path,
    *,
    on: str = "test",
    inputs: Sequence[Any] | None = None,
    like: str | Path | None = None,
    console: Console | None = None,
) -> Evaluation:
    """Load a run's adapter onto its base, or a model that a run was merged into, and evaluate it, or predict.

    Args:
        run: the run's folder, or the configuration file whose ``output`` it is; or the folder of a merged model.
        on: a split of the run's data, or a file (.jsonl, .json, .csv, .parquet) with the same columns.
        inputs: raw inputs without labels, for text tasks texts; they are predicted instead.
        like: for a merged model, the run that it came from, whose data and settings are taken; None: a classifier whose labels
            stand in its folder, and the columns ``text`` and ``label`` of a file.
        console: where the configuration and the metrics are printed; None prints nothing.

    Raises:
        RunError: there is no finished run, or a merged model that does not say what is needed. DataError: no such split, or rows
            that cannot be used. CheckpointMismatch: the adapter is damaged, or the base is another one.
    """
    merged = (Path(run) / "config.json").is_file() and not (Path(run) / CONFIG).is_file()
    if like is not None and not merged:
        raise RunError(f"{run} is no merged model, and a run knows its own data: leave like={str(like)!r} out")
    folder, config, info = _merged(Path(run), like, on, inputs) if merged else _open(Path(run))
    console = console or Console(quiet=True)
    console.print(to_yaml(config), markup=False, highlight=False)
    task = tasks.get(config.task)
    bundle = task.restore(config, info, on if inputs is None else list(inputs))
    if not merged:
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


def _open(path: Path) -> tuple[Path, TrainConfig, dict[str, Any]]:
    """The run's folder, its configuration, and what its task noted; from the folder or the configuration."""
    folder = Path(load_config(path).output) if path.is_file() else path
    for name in (CONFIG, INFO, ADAPTER):
        if not (folder / name).exists():
            why = "it was interrupted; train again to resume it" if (folder / CONFIG).exists() else "train it first"
            raise RunError(f"{folder} holds no finished run: there is no {name} in it ({why})")
    return folder, load_config(folder / CONFIG), json.loads((folder / INFO).read_text("utf-8"))


def _merged(
    folder: Path, like: str | Path | None, on: str, inputs: Sequence[Any] | None
) -> tuple[Path, TrainConfig, dict[str, Any]]:
    """As ``_open``, for a merged model: by the run that it came from, or by what stands in its folder."""
    if like is not None:
        _, config, info = _open(Path(like))
        return folder, config.model_copy(update={"model": str(folder)}), {**info, "merged": True}
    if inputs is None and not Path(on).is_file():
        raise RunError(
            f"the merged model {folder} has no data of its own, and {on!r} is no file: name a file, or the run that it came from "
            "(--like RUN), whose splits are then known"
        )
    data = {"train": on, "max_length": LONGEST}
    config = load_config({"task": "text-classification", "model": str(folder), "data": data, "output": str(folder)})
    return folder, config, {"merged": True}


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
