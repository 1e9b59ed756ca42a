"""A finished run as a judge: its base, what an adapter on it reaches on one of its splits, and losses on its training rows."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from accelerate.utils import send_to_device
from rich.console import Console
from torch import Tensor, nn

from trimtab import tasks
from trimtab.training.config import TrainConfig, load_config
from trimtab.training.errors import RunError
from trimtab.training.folder import CONFIG, INFO
from trimtab.training.sampler import EpochSampler

__all__ = ["scorer", "training_losses"]


def _opened(run: str | Path) -> tuple[Path, TrainConfig]:
    folder = Path(run)
    missing = [name for name in (CONFIG, INFO) if not (folder / name).is_file()]
    if missing:
        raise RunError(f"{folder} holds no run: there is no {missing[0]} in it; give the folder that trimtab train wrote")
    return folder, load_config(folder / CONFIG)


def scorer(
    run: str | Path, *, on: str = "validation", metric: str | None = None
) -> tuple[nn.Module, Callable[[nn.Module], float]]:
    """The base of a run with its head, no adapter on it, and a function from that model to its score: higher is better.

    Args:
        run: the run's folder.
        on: a split of the run's data, or a file with the same columns.
        metric: of the task; None: the run's own. One that is better when lower counts negative.

    Raises:
        RunError: there is no run. ConfigError: no such metric, or one without a direction. DataError: no such split.
    """
    folder, config = _opened(run)
    task = tasks.get(config.task)
    chosen = task.metric(metric or config.metric)
    bundle = task.restore(config, json.loads((folder / INFO).read_text("utf-8")), on)
    silent = Console(quiet=True)

    def score(model: nn.Module) -> float:
        """The metric of ``model``, which must be the one returned beside this function."""
        return chosen.goodness(float(task.evaluate(config, bundle, console=silent)[0][chosen.name]))

    return bundle.model, score


def training_losses(run: str | Path, batches: int) -> Callable[[nn.Module], Iterator[Tensor]]:
    """Losses of a run's own kind on its first training batches, in the order that its seed gives them.

    Raises:
        RunError: there is no run. DataError: its training rows are not there.
    """
    folder, config = _opened(run)
    bundle = tasks.get(config.task).restore(config, json.loads((folder / INFO).read_text("utf-8")), "train")
    rows = bundle.splits["train"]

    def losses(model: nn.Module) -> Iterator[Tensor]:
        lengths = [bundle.length(row) for row in rows]
        order: list[int] = []
        for epoch in itertools.count():
            sampler = EpochSampler(lengths, batch_size=config.batch_size, seed=config.seed, bucket=config.bucket)
            sampler.set_epoch(epoch)
            order += list(sampler)
            if len(order) >= batches * config.batch_size:
                break
        device = next(model.parameters()).device
        for start in range(0, batches * config.batch_size, config.batch_size):
            batch = send_to_device(bundle.collate([rows[i] for i in order[start : start + config.batch_size]]), device)
            labels = batch.pop("labels")
            yield bundle.mean_loss(model(**batch), labels)

    return losses
