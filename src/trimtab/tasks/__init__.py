"""Tasks: what a row means, which model it needs, which loss and metrics. One file a task, found by being here.

A task is a subclass of ``Task`` under the decorator ``@task(name)``; ``trimtab train`` chooses it by the key ``task``.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console
from torch import Tensor, nn

from trimtab.core.errors import NoMatch, nearest
from trimtab.training.config import TrainConfig
from trimtab.training.errors import ConfigError
from trimtab.training.metrics import LOSS, Metric, counted

__all__ = ["Bundle", "Task", "get", "names", "task"]


@dataclass
class Bundle:
    """Everything a run needs from its task.

    Attributes:
        model: the base with its fresh head; nothing attached.
        head: the part of ``model`` that is fresh and learns whole; None if there is none.
        splits: encoded examples of each split; an example is a dict that ``collate`` understands.
        length: size of one example, such as its tokens, so that examples of similar size can share a batch.
        collate: list of examples to a batch of tensors, with ``labels``.
        loss: ``(outputs, labels, num_items_in_batch=...)`` to the scalar loss: the sum over all labels that ``items`` counts,
            divided by that number.
        metrics: transformers' ``EvalPrediction`` to ``{name: value}``.
        info: what a fresh process needs besides the config to rebuild the same model (JSON values).
        items: labels of a batch to the number of terms in its loss; by default those that are not -100. Training and evaluation
            divide by it.
        reduce: ``(outputs, labels)`` to what ``metrics`` needs of each row, ``(n, ...)``; None keeps the logits.
    """

    model: nn.Module
    head: nn.Module | None
    splits: dict[str, list[dict[str, Any]]]
    length: Callable[[dict[str, Any]], int]
    collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]]
    loss: Callable[..., Tensor]
    metrics: Callable[[Any], dict[str, float]]
    info: dict[str, Any] = field(default_factory=dict)
    items: Callable[[Tensor], int] = counted
    reduce: Callable[[Any, Tensor], Tensor] | None = None

    def mean_loss(self, outputs: Any, labels: Tensor) -> Tensor:
        """The loss of one batch over its own labels."""
        return self.loss(outputs, labels, num_items_in_batch=self.items(labels))


class Task:
    """Base of all tasks; stateless.

    Class attributes:
        name: set by ``@task``.
        config: the configuration class, a subclass of ``TrainConfig``.
        metrics: what ``metric`` in a configuration may name, besides ``loss``: ``Metric("rmse", better="lower")``. A bare name
            says no direction, so that nothing can be chosen by it.
    """

    name: ClassVar[str]
    config: ClassVar[type[TrainConfig]]
    metrics: ClassVar[tuple[Metric | str, ...]]

    def metric(self, name: str) -> Metric:
        """The metric ``name``, which something is to be chosen by.

        Raises:
            ConfigError: there is none, or the task does not say which way it gets better.
        """
        stated = {each.name if isinstance(each, Metric) else each: each for each in self.metrics}
        found = {LOSS.name: LOSS, **stated}.get(name)
        if found is None:
            raise ConfigError(f"the task {self.name} has no metric {name!r}{nearest(name, (*stated, LOSS.name))}")
        if name == LOSS.name and found != LOSS:
            raise ConfigError(f"the task {self.name} states {found!r}, and a loss is better when lower; give it another name")
        if not isinstance(found, Metric):
            raise ConfigError(
                f"something is to be chosen by {name!r}, and the task {self.name} does not say which way it gets better; state it "
                f'among the task\'s metrics as Metric({name!r}, better="lower") or better="higher"'
            )
        return found

    def prepare(self, config: TrainConfig) -> Bundle:
        """Load and check the data, then build the model, for a new run."""
        raise NotImplementedError

    def restore(self, config: TrainConfig, info: dict[str, Any], inputs: Any) -> Bundle:
        """Rebuild the model of a finished run from ``info``.

        Args:
            inputs: name of a split to encode, or a list of raw inputs, which become the split ``predict``.
        """
        raise NotImplementedError

    def evaluate(self, config: TrainConfig, bundle: Bundle, *, console: Console) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Metrics and predictions of the one split of a restored bundle whose adapter is loaded; no metrics without labels."""
        from trimtab.training.evaluation import forward_all, metrics_of

        ((_, examples),) = bundle.splits.items()
        outputs, loss = forward_all(bundle, examples, config.eval_batch_size)
        metrics = {} if loss is None else {"loss": loss, **metrics_of(bundle, examples, outputs)}
        return metrics, self.decode(bundle.info, outputs)

    def finish(self, config: TrainConfig, bundle: Bundle, folder: Path, *, console: Console) -> dict[str, dict[str, float]]:
        """Further metrics of a finished run, ``{name: {metric: value}}``, with the best adapter loaded; may write into ``folder``.

        An interrupted process is followed by another that calls it again.
        """
        return {}

    def decode(self, info: dict[str, Any], outputs: Any) -> list[dict[str, Any]]:
        """What the model's raw outputs, a numpy array with one entry an example, say: one dict an example."""
        raise NotImplementedError


_TASKS: dict[str, Task] = {}


def task(name: str) -> Callable[[type[Task]], type[Task]]:
    """Class decorator that registers a task under ``name``."""

    def register(cls: type[Task]) -> type[Task]:
        cls.name = name
        _TASKS[name] = cls()
        return cls

    return register


def names() -> list[str]:
    """The names of all registered tasks."""
    for found in pkgutil.iter_modules(__path__, __name__ + "."):
        importlib.import_module(found.name)
    return sorted(_TASKS)


def get(name: str) -> Task:
    """The task ``name``.

    Raises:
        NoMatch: there is none; the message has the nearest names.
    """
    known = names()
    if name not in _TASKS:
        raise NoMatch(f"there is no task named {name!r}{nearest(str(name), known)}")
    return _TASKS[name]
