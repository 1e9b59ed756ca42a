"""What watches a run: the progress bar, early stopping, and logging whenever a checkpoint is due."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

from trimtab.training.curve import curve_of
from trimtab.training.metrics import Metric

__all__ = ["LogWithCheckpoint", "Patience", "ProgressBar", "exhausted"]


def exhausted(state: Any, patience: int | None, metric: Metric) -> bool:
    """Whether ``patience`` evaluations have passed since the best one, as the saved log of ``state`` tells."""
    curve = curve_of(state.log_history)
    best = metric.best(curve)
    if patience is None or best is None:
        return False
    return sum(entry["step"] > best["step"] for entry in curve if "eval_loss" in entry) >= patience


class LogWithCheckpoint(TrainerCallback):
    """Logs at every step that writes a checkpoint: the loss since the last log would be lost to a resumed run."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Runs after transformers' own flow callback, which decided ``should_save``."""
        control.should_log = control.should_log or control.should_save


class Patience(TrainerCallback):
    """Stops after ``evaluations`` evaluations without a better ``metric``; reads the saved log, so it survives a resume."""

    def __init__(self, evaluations: int, metric: Metric):
        self.evaluations, self.metric = evaluations, metric

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Counts the evaluations since the best one."""
        if exhausted(state, self.evaluations, self.metric):
            control.should_training_stop = True
            control.should_save = True


class ProgressBar(TrainerCallback):
    """One line: step, time left, loss, the last metric. Silent where the output is no terminal, one line an evaluation."""

    def __init__(self, console: Console, metric: Metric):
        self.console, self.metric = console, metric
        self.loss = self.last = ""
        self.running = False
        columns = (
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )  # fmt: skip
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Shows the bar, at the step where a resumed run continues."""
        self.running = True
        self.task = self.progress.add_task("", total=state.max_steps, completed=state.global_step, note="")
        self.progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Moves the bar."""
        self.progress.update(self.task, completed=state.global_step, note=f"{self.loss} {self.last}")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Takes up the loss and the metric; prints an evaluation where there is no bar."""
        logs = logs or {}
        if "loss" in logs:
            self.loss = f"loss {logs['loss']:.3f}"
        if self.metric.key in logs:
            self.last = f"{self.metric.name} {logs[self.metric.key]:.4f}"
            if self.progress.disable and self.running:
                self.console.print(f"step {state.global_step} of {state.max_steps}: {self.loss} {self.last}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes the bar away."""
        self.running = False
        self.progress.stop()
