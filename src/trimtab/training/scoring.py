"""A finished run as a judge: its base, and what an adapter on it reaches on one of its splits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from torch import nn

from trimtab import tasks
from trimtab.core.errors import nearest
from trimtab.training.config import load_config
from trimtab.training.errors import ConfigError, RunError
from trimtab.training.run import CONFIG, INFO

__all__ = ["scorer"]


def scorer(
    run: str | Path, *, on: str = "validation", metric: str | None = None
) -> tuple[nn.Module, Callable[[nn.Module], float]]:
    """The base of a run with its head, no adapter on it, and a function from that model to its score: higher is better.

    Args:
        run: the run's folder.
        on: a split of the run's data, or a file with the same columns.
        metric: of the task; None: the run's own. The loss counts negative.

    Raises:
        RunError: there is no run. ConfigError: no such metric. DataError: no such split.
    """
    folder = Path(run)
    missing = [name for name in (CONFIG, INFO) if not (folder / name).is_file()]
    if missing:
        raise RunError(f"{folder} holds no run: there is no {missing[0]} in it; give the folder that trimtab train wrote")
    config = load_config(folder / CONFIG)
    task = tasks.get(config.task)
    name = metric or config.metric
    if name not in (*task.metrics, "loss"):
        raise ConfigError(f"the task {task.name} has no metric {name!r}{nearest(name, (*task.metrics, 'loss'))}")
    bundle = task.restore(config, json.loads((folder / INFO).read_text("utf-8")), on)
    silent = Console(quiet=True)

    def score(model: nn.Module) -> float:
        """The metric of ``model``, which must be the one returned beside this function."""
        value = float(task.evaluate(config, bundle, console=silent)[0][name])
        return -value if name == "loss" else value

    return bundle.model, score
