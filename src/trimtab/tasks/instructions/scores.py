"""Scores of generated answers: accuracies with standard errors, as the published reader and the corrected one see them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.core.table import Table
from trimtab.tasks.instructions.readers import Reader

__all__ = ["score", "scores_table", "standard_error"]


def standard_error(share: float, count: int) -> float:
    """Of a share of ``count`` independent rows: sqrt(p (1 - p) / n)."""
    return math.sqrt(share * (1 - share) / count)


def score(
    reader: Reader, outputs: Sequence[str], answers: Sequence[float | str], *, seen: Sequence[bool] | None = None
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Metrics of one data set and what was read from each text.

    Args:
        seen: whether the question of each text is among the training rows.

    Returns:
        ``accuracy`` (corrected reader), ``published`` (published reader), each with its ``_se``; ``unread``, the share of texts in
        which the corrected reader finds no answer; ``constant``, the accuracy of always giving the commonest answer; ``rows``;
        ``seen``, the share of questions among the training rows, and, if there are some, ``clean``, the accuracy on the others.
        And for each text what both readers read and whether it is right.
    """
    found = []
    for text, answer in zip(outputs, answers, strict=True):
        corrected, published = reader.read(text), reader.read(text, published=True)
        found.append({
            "output": text, "answer": answer, "read": _plain(corrected), "right": reader.right(corrected, answer),
            "published_read": _plain(published), "published_right": reader.right(published, answer),
        })  # fmt: skip
    count = len(found)
    accuracy, published = (sum(entry[key] for entry in found) / count for key in ("right", "published_right"))
    unread = sum(entry["read"] is None for entry in found) / count
    metrics = {
        "accuracy": accuracy, "accuracy_se": standard_error(accuracy, count),
        "published": published, "published_se": standard_error(published, count),
        "unread": unread, "constant": Counter(answers).most_common(1)[0][1] / count, "rows": count,
    }  # fmt: skip
    if seen is not None:
        metrics["seen"] = sum(seen) / count
        others = [entry["right"] for entry, known in zip(found, seen, strict=True) if not known]
        if 0 < len(others) < count:
            metrics["clean"] = sum(others) / len(others)
    return metrics, found


def _plain(value: float | str) -> float | str | None:
    """JSON has no infinity."""
    return None if value in ("", math.inf) else value


def scores_table(metrics: Mapping[str, Mapping[str, float]], *, title: str = "") -> Table:
    """A row a data set, in percent, and the mean over the sets; errors are one standard error."""
    table = Table(("set", "rows", "accuracy %", "published %", "unread %", "constant answer %", "in training %"), title=title)
    for name, row in metrics.items():
        table.add(name, int(row["rows"]), _share(row, "accuracy"), _share(row, "published"), *_bare(row))
    if len(metrics) > 1:
        rows = list(metrics.values())
        keys = ("accuracy", "published", "unread", "constant", "seen")
        mean: dict[str, float] = {key: sum(row.get(key, 0.0) for row in rows) / len(rows) for key in keys}
        for key in ("accuracy_se", "published_se"):
            mean[key] = math.sqrt(sum(row[key] ** 2 for row in rows)) / len(rows)
        total = sum(int(row["rows"]) for row in rows)
        table.add("mean", total, _share(mean, "accuracy"), _share(mean, "published"), *_bare(mean))
    return table


def _share(row: Mapping[str, float], key: str) -> str:
    return f"{100 * row[key]:.1f} +- {100 * row[f'{key}_se']:.1f}"


def _bare(row: Mapping[str, float]) -> list[str]:
    return [f"{100 * row.get(key, 0.0):.1f}" for key in ("unread", "constant", "seen")]
