"""The learning curve: from the trainer's log to a table in the console and a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from trimtab.training.files import new_file
from trimtab.training.metrics import Metric

__all__ = ["as_table", "curve_of", "record_of", "write_png"]

WIDTH = 24  # characters of a bar


def curve_of(log_history: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """The log without timings: ``{step, epoch, loss, learning_rate}`` and ``{step, epoch, eval_...}`` entries, by step."""
    timings = ("runtime", "per_second", "_time")
    entries = []
    for entry in log_history:
        if "loss" in entry or "eval_loss" in entry:
            # in one order, whether the log stayed in memory or went through a checkpoint
            entries.append({key: entry[key] for key in sorted(entry) if not key.endswith(timings)})
    return entries


def record_of(log_history: Sequence[dict[str, Any]], after: int, step: int) -> dict[str, float]:
    """What was known of the adapter at ``step``: ``step``, the mean training ``loss`` since step ``after``, the last
    training loss that was logged, and every ``eval_...`` value measured at this very step.

    An entry of the log is the mean loss since the entry before it, so entries count by their steps.
    """
    record: dict[str, float] = {"step": step}
    total, before = 0.0, 0
    for entry in (entry for entry in curve_of(log_history) if entry["step"] <= step):
        if "loss" in entry:
            inside = entry["step"] - max(before, after)
            total += entry["loss"] * max(inside, 0)
            record["last_loss"], before = entry["loss"], entry["step"]
        elif entry["step"] == step:
            record |= {key: value for key, value in entry.items() if key.startswith("eval_")}
    if before > after:
        record["loss"] = total / (before - after)
    return record


def as_table(curve: Sequence[dict[str, float]], metric: Metric) -> Table:
    """One row an evaluation: step, epoch, training loss until then, the metric and a bar; the best one is marked."""
    key, best = metric.key, metric.best(curve)
    table = Table(title="learning curve", title_justify="left")
    for column in ("step", "epoch", "training loss", "validation loss", f"validation {metric.name}"):
        table.add_column(column, justify="right")
    table.add_column("")
    values = [entry[key] for entry in curve if key in entry]
    span = max(map(abs, values), default=0) or 1.0
    loss: list[float] = []
    for entry in curve:
        if "loss" in entry:
            loss.append(entry["loss"])
        if key in entry:
            mean = f"{sum(loss) / len(loss):.4f}" if loss else ""
            bar = "#" * round(WIDTH * max(0.0, entry[key]) / span) + (" best" if entry is best else "")
            place = f"{entry['step']:.0f}", f"{entry['epoch']:.2f}"
            table.add_row(*place, mean, f"{entry['eval_loss']:.4f}", f"{entry[key]:.4f}", bar)
            loss = []
    return table


def write_png(curve: Sequence[dict[str, float]], metric: str, path: Path) -> None:
    """Draw training loss, validation loss and the validation metric over steps; written in one step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left = figure.add_subplot()
    for key, label, style in (("loss", "training loss", "-"), ("eval_loss", "validation loss", "o--")):
        points = [(entry["step"], entry[key]) for entry in curve if key in entry]
        if points:
            left.plot(*zip(*points, strict=True), style, label=label)
    left.set(xlabel="optimizer step", ylabel="loss")
    handles, labels = left.get_legend_handles_labels()
    points = [(entry["step"], entry[f"eval_{metric}"]) for entry in curve if f"eval_{metric}" in entry]
    if points and metric != "loss":
        right = left.twinx()
        right.plot(*zip(*points, strict=True), "s-", color="tab:green", label=f"validation {metric}")
        right.set(ylabel=metric)
        handles += right.get_legend_handles_labels()[0]
        labels += right.get_legend_handles_labels()[1]
    if handles:
        left.legend(handles, labels, loc="center right")
    with new_file(path) as stage:
        figure.savefig(stage, format="png", dpi=120)
