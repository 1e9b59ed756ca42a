"""Metrics from predictions, with numpy alone."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["classification"]


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
