"""The contract of a schedule: four moments of a training run, and a state that resumes to the bit.

In a plain loop::

    schedule.start(model, steps=len(loader) * epochs)
    for batch in batches:
        loss(model, batch).backward()
        schedule.backward_end()
        optimizer.step()
        schedule.step_end()  # before the gradients are cleared
        optimizer.zero_grad()
    schedule.finish()
"""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["Schedule"]


class Schedule:
    """Base of all schedules; override the moments that matter.

    Attributes:
        model: the model with its adapters, from ``start`` on.
        steps: how many optimizer steps the whole run has.
        step: how many of them are done.
    """

    model: nn.Module
    steps: int
    step: int = 0

    def start(self, model: nn.Module, *, steps: int) -> None:
        """Before the first step, or before ``load_state_dict`` on a run that goes on.

        Raises:
            ValueError: ``steps`` is no positive integer.
        """
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"a schedule needs the number of optimizer steps of the whole run, at least 1; found {steps!r}")
        self.model, self.steps, self.step = model, steps, 0

    def backward_end(self) -> None:
        """The gradients of a step are complete, and the optimizer has not used them."""

    def step_end(self) -> None:
        """The optimizer has stepped; the gradients still stand."""
        self.step += 1

    def finish(self) -> None:
        """After the last step."""

    def state_dict(self) -> dict[str, Any]:
        """Numbers and tensors that resuming needs."""
        return {"step": self.step, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a stored state.

        Raises:
            ValueError: the state is of a run of another length.
        """
        if state["steps"] != self.steps:
            raise ValueError(
                f"the stored schedule is of a run of {state['steps']} steps, this run has {self.steps}; resume with the same "
                "number of steps, or start the schedule anew"
            )
        self.step = state["step"]
