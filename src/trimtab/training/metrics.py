"""Metrics: which way they get better, how many labels they count, and classification's, with numpy alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor

from trimtab.core.errors import Unsupported

__all__ = ["IGNORED", "LOSS", "Metric", "classification", "counted"]

IGNORED = -100  # the label that losses and transformers' count of labels leave out


@dataclass(frozen=True)
class Metric:
    """A number that an evaluation gives, and which way it gets better: ``Metric("rmse", better="lower")``.

    Attributes:
        name: as the task's metrics give it, without a split.
        better: ``"higher"`` or ``"lower"``. No name decides it.

    Raises:
        Unsupported: ``better`` is neither.
    """

    name: str
    better: Literal["higher", "lower"]

    def __post_init__(self) -> None:
        if self.better not in ("higher", "lower"):
            raise Unsupported(f"the metric {self.name!r} gets better when it is 'higher' or 'lower', found better={self.better!r}")

    @property
    def key(self) -> str:
        """Its name in the log of an evaluation."""
        return f"eval_{self.name}"

    def goodness(self, value: float) -> float:
        """``value`` on a scale on which higher is better; what is not a number is worse than anything."""
        if math.isnan(value):
            return -math.inf
        return value if self.better == "higher" else -value

    def best(self, entries: Iterable[dict[str, float]]) -> dict[str, float] | None:
        """The first of the logged evaluations with the best value; None if none has a number."""
        found = [entry for entry in entries if not math.isnan(entry.get(self.key, math.nan))]
        return max(found, key=lambda entry: self.goodness(entry[self.key]), default=None)


LOSS = Metric("loss", "lower")


def counted(labels: Tensor) -> int:
    """How many labels, of any shape, count: those that are not -100."""
    return int((labels != IGNORED).sum())


def classification(prediction: Any) -> dict[str, float]:
    """Accuracy and macro F1.

    Args:
        prediction: has ``predictions``, logits ``(n, classes)``, and ``label_ids``, ``(n,)``.

    Returns:
        ``{"accuracy", "macro_f1"}``; F1 is averaged over the classes that occur in labels or predictions.
    """
    guesses, labels = np.argmax(prediction.predictions, -1), prediction.label_ids
    classes = prediction.predictions.shape[-1]
    hits = np.bincount(labels[guesses == labels], minlength=classes)
    total = np.bincount(labels, minlength=classes) + np.bincount(guesses, minlength=classes)
    f1 = 2 * hits[total > 0] / total[total > 0]
    return {"accuracy": float((guesses == labels).mean()), "macro_f1": float(f1.mean())}
