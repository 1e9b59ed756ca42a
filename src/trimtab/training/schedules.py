"""Schedules on transformers' Trainer: its callbacks call their moments, checkpoints hold their state, and training rows probe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from trimtab.schedules.probing import Probes
from trimtab.schedules.run import Run
from trimtab.tasks import Bundle

__all__ = ["FILE", "Moments", "load_state", "probes", "save_state"]

FILE = "schedules.pt"
PROBE_ROWS = 16  # rows of a probe batch, as in IST's code


class Moments(TrainerCallback):
    """What transformers' loop tells by callbacks; the gradients' moments come from the optimizer's hooks.

    For a Trainer of one's own, whose schedules see clipped gradients, and whose checkpoints do not hold their state::

        with tt.scheduled(model, optimizer, tt.IST(), steps=...) as s:
            Trainer(model, args, optimizers=(optimizer, None), callbacks=[Moments(s)], ...).train()
    """

    def __init__(self, run: Run):
        self.run = run

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Once an optimizer step, before its first batch."""
        self.run.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The gradients are cleared; what is logged, evaluated and saved at this step comes after."""
        self.run.end()

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any) -> None:
        """With the names that a configuration uses."""
        self.run.evaluate({key.removeprefix("eval_"): value for key, value in (metrics or {}).items()})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the last step."""
        self.run.finish()


def save_state(run: Run, folder: Path) -> None:
    """Write the schedules' state into a checkpoint, if there are schedules."""
    if run.schedules:
        torch.save(run.state_dict(), folder / FILE)


def load_state(folder: Path) -> dict[str, Any] | None:
    """What ``save_state`` wrote; None without schedules."""
    file = folder / FILE
    return torch.load(file, map_location="cpu", weights_only=True) if file.is_file() else None


def probes(bundle: Bundle, device: torch.device, seed: int) -> Probes:
    """Losses on training rows, ``PROBE_ROWS`` at a time, in an order of their own: a permutation for each pass, by ``seed``."""
    rows = bundle.splits.get("train", [])
    size = min(PROBE_ROWS, len(rows))
    a_pass = max(1, len(rows) // max(1, size))

    def batch(index: int) -> dict[str, Tensor]:
        number, place = divmod(index, a_pass)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed * 1_000_003 + number))
        chosen = order[place * size : (place + 1) * size].tolist()
        found = bundle.collate([rows[i] for i in chosen])
        return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in found.items()}

    def loss(model: nn.Module | Callable[..., Any], batch: dict[str, Tensor]) -> Tensor:
        inputs = dict(batch)
        labels = inputs.pop("labels")
        return bundle.mean_loss(model(**inputs), labels)

    return Probes(loss, batch)
