"""The contract of a schedule: the moments of a training run, and a state that resumes to the bit.

A schedule changes which part of a model learns, or how, while training runs. It is an object with keyword arguments, registered
by ``@tt.schedule(paper=...)``; it overrides the moments that matter and works in any loop::

    with tt.scheduled(model, optimizer, tt.IST(), tt.LoRAPlus(), steps=1000) as s:
        for batch in batches:              # made as ever; with accumulation, several backward passes a step
            loss(model, batch).backward()
            s.step()                       # clips if asked, steps the optimizer, clears the gradients

``trimtab train`` has ``schedules: [{name: IST}, ...]``. The moments, in order, each for all schedules in the order of the list:

====================  =====================================================================================================
``start``             the model carries its adapters, and there is no optimizer yet; resuming calls ``load_state_dict`` next
``groups``            the optimizer's groups are about to be made
``step_begin``        no gradients; ``step`` steps are done; once a step, whatever the accumulation. Shapes change here only
``extra_loss``        a loss of the parameters alone; its gradient is added once a step, after the last backward pass
``backward_end``      the gradients are complete: accumulated, reduced over processes, unscaled, not clipped
``before_optimizer``  the gradients are clipped
``rate_factor``       a factor on every learning rate of this step
``step_end``          the optimizer has stepped, and the gradients still stand
``step_skipped``      instead of all since ``extra_loss``: the gradient scaler found infinite gradients
``step_done``         the loop has said that the step is over; ``run.loss`` is its loss, if the loop tells it
``evaluate``          metrics of an evaluation; it ran, and the best adapter is saved, inside ``weights()``
``finish``            after the last step
``close``             the end of the run, an error included: take off what the schedule put on the model
====================  =====================================================================================================

``self.run`` (``trimtab.schedules.run.Run``) has the services: ``set_trainable``, ``slice_rank``, ``reset_state``, ``loss_at``...
A checkpoint is taken between two steps: after ``step_done``, before ``step_begin``.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

if TYPE_CHECKING:
    from trimtab.core.contracts import Adapter
    from trimtab.schedules.run import Run

__all__ = ["OWNERSHIPS", "Schedule"]

#: what one schedule of a run at most may own
OWNERSHIPS = ("trainability", "rank", "weights", "rates", "delivery")

Group = dict[str, Any]


class Schedule:
    """Base of all schedules; override the moments that matter, and call ``super()`` in those that say so.

    Class attributes:
        owns: of ``OWNERSHIPS``, what it alone may change: which parameters learn, ranks, values besides the optimizer's
            step, learning rates of groups, and what is delivered in place of the last step's values.
        whole_gradients: whether it needs all gradients of a step at once, so that a step inside backward is refused.
        needs_steps: whether it must know the length of the run.

    Attributes:
        run: the services, where the schedule is driven by ``tt.scheduled`` or ``trimtab train``; None by hand.
        model: the model with its adapters, from ``start`` on.
        steps: how many optimizer steps the whole run has; None if unknown.
        step: how many of them are done.
    """

    owns: ClassVar[frozenset[str]] = frozenset()
    whole_gradients: ClassVar[bool] = True
    needs_steps: ClassVar[bool] = False

    run: Run | None = None
    model: nn.Module
    steps: int | None = None
    step: int = 0

    @property
    def services(self) -> Run:
        """``run``, for schedules that cannot do without.

        Raises:
            RuntimeError: the schedule is driven by hand.
        """
        if self.run is None:
            raise RuntimeError(f"{type(self).__name__} needs the services of a run; drive it by tt.scheduled(model, optimizer)")
        return self.run

    # -- the moments

    def start(self, model: nn.Module, *, steps: int | None) -> None:
        """Before the optimizer is made; call ``super().start`` first.

        Raises:
            ValueError: ``steps`` is no positive integer (or None where the length must be known).
            Unsupported: the schedule cannot work with this model's adapters; the message says why.
        """
        if (steps is None and self.needs_steps) or (steps is not None and (not isinstance(steps, int) or steps < 1)):
            raise ValueError(
                f"{type(self).__name__} needs the number of optimizer steps of the whole run, at least 1; found {steps!r}: "
                "tt.scheduled(..., steps=...)"
            )
        self.model, self.steps, self.step = model, steps, 0

    def tell_if_never(self, what: str, every: int) -> None:
        """Warn where the run is too short for something that happens every so many steps."""
        if self.steps is not None and every >= self.steps:
            warnings.warn(
                f"{type(self).__name__} {what} every {every} steps, and so never in this run of {self.steps} steps", stacklevel=3
            )

    def groups(self, groups: list[Group]) -> list[Group]:
        """The optimizer's groups: ``{"params": [...], "lr": ..., ...}``, to be split or changed; returns the new list."""
        return groups

    def step_begin(self) -> None:
        """No gradients stand, the learning rate is this step's, and no forward pass has begun."""

    def extra_loss(self) -> Tensor | None:
        """A scalar added to the loss, a function of parameters alone; None adds nothing."""
        return None

    def backward_end(self) -> None:
        """The gradients of a step are complete, the extra losses' included, and neither clipped nor used."""

    def before_optimizer(self) -> None:
        """The gradients are clipped; the optimizer uses them next."""

    def rate_factor(self) -> float:
        """A factor on all learning rates of this step."""
        return 1.0

    def step_end(self) -> None:
        """The optimizer has stepped; gradients, and the step's learning rates, still stand. Call ``super().step_end`` first."""
        self.step += 1

    def step_skipped(self) -> None:
        """The optimizer did not step, since gradients were infinite; the step counts, its numbers do not."""
        self.step += 1

    def step_done(self) -> None:
        """The step is over, stepped or skipped; ``step`` counts it already."""

    def evaluate(self, metrics: dict[str, float]) -> None:
        """An evaluation gave ``metrics``."""

    @contextmanager
    def weights(self) -> Iterator[None]:
        """Inside, the adapters are what this schedule would deliver now; afterwards the very bytes from before."""
        yield

    @property
    def deliverable(self) -> bool:
        """Whether what the model is now could be what the run delivers; a best step is sought among such steps alone."""
        return True

    def resliced(self, parameter: nn.Parameter, dim: int, index: Tensor) -> None:
        """Of ``parameter`` only the entries ``index`` along ``dim`` are left; cut what is kept beside it likewise."""

    def removed(self, adapters: Collection[Adapter]) -> None:
        """These adapters are off the model for good, and their parameters out of the optimizer; forget what is kept beside them."""

    def finish(self) -> None:
        """After the last step."""

    def close(self) -> None:
        """The run is over, ``finish`` or an error behind it: what was put on the model for a time comes off."""

    # -- resuming

    def state_dict(self) -> dict[str, Any]:
        """Numbers, strings and tensors, in lists and dicts, that resuming needs; extend ``super().state_dict()``."""
        return {"step": self.step, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a stored state; after ``start``, before ``groups``. Call ``super().load_state_dict`` first.

        Raises:
            ValueError: the state is of a run of another length.
        """
        if self.needs_steps and state["steps"] != self.steps:
            raise ValueError(
                f"the stored schedule is of a run of {state['steps']} steps, this run has {self.steps}; resume with the same "
                "number of steps, or start the schedule anew"
            )
        self.step = state["step"]

    def rebuild(self, model: nn.Module, state: dict[str, Any]) -> None:
        """On resuming, before the adapter's tensors are loaded and ``start``: bring the base into the shape that they need."""
