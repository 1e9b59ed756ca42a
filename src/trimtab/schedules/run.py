"""A run of schedules over a plain loop: calls their moments in order, and gives them their services.

``tt.scheduled`` is for loops; ``trimtab train`` drives the same object from transformers' Trainer (training/schedules.py). The
moments around the optimizer's step hang on the optimizer's own hooks, so that they come at the right time whoever calls it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trimtab.core.errors import Unsupported
from trimtab.core.state import unwrap
from trimtab.schedules import optim
from trimtab.schedules.contract import Schedule
from trimtab.schedules.probing import Probes
from trimtab.schedules.registry import check_owners
from trimtab.schedules.services import Services

__all__ = ["Run", "scheduled"]

SKIPPED_AT_FIRST = 30  # steps that a gradient scaler unknown to us may skip before its first one


def scheduled(
    model: nn.Module,
    optimizer: Optimizer,
    *schedules: Schedule,
    steps: int | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    batches: Sequence[Any] | Callable[[int], Any] | None = None,
    scaler: Any = None,
    seed: int = 0,
    state: Mapping[str, Any] | None = None,
) -> Run:
    """Run schedules over a loop of one's own: a context whose ``step()`` takes the place of ``optimizer.step()``.

    A loop may go on calling ``optimizer.step()`` itself, and ``s.step()`` behind it; gradients that it clips before are seen
    clipped. A learning-rate scheduler is made after this call, and stepped by the loop. On leaving the block the model is as a run
    without schedules would leave it: all that was declared trainable is, nothing is suppressed, and the base is untouched.

    Args:
        model: with its adapters; wrapped in DDP or compiled or not, but what the loop calls.
        optimizer: over all trainable parameters.
        schedules: in the order in which their moments are called.
        steps: optimizer steps of the whole run; some schedules need it.
        loss: ``(model, batch) -> scalar``, for schedules that probe the model (IST); it calls the model once.
        batches: what they probe it on: a sequence, gone through again and again, or ``i -> batch``.
        scaler: a ``torch.amp.GradScaler``; ``s.step()`` then unscales, steps and updates it.
        seed: of the schedules' own draws; the same on all processes.
        state: what ``s.state_dict()`` gave, to go on from there; load the optimizer's own state after this call.

    Raises:
        ValueError: two schedules own one thing (both are named), or an argument is out of its range.
        Unsupported: a schedule cannot work with this model; nothing has been changed.
    """
    run = Run(model, schedules, steps=steps, probes=Probes.of(loss, batches), scaler=scaler, seed=seed)
    try:
        run.start(state)
        run.bind(optimizer)
    except BaseException:
        run.close()
        raise
    return run


class Run(Services):
    """The schedules of one run.

    Attributes:
        model, root: what the loop calls, and the module that carries the adapters.
        optimizer: without accelerate's wrapper; None before it is made.
        schedules: in order.
        probes: the loss on sample batches; None if none were given.
        loss: of the present step, where the loop tells it (``s.step(loss=...)``); a detached scalar.
        step_number: optimizer steps done, skipped ones included.
        idle_steps: the first steps, whose learning rate is known to be zero.
    """

    def __init__(
        self, model: nn.Module, schedules: Sequence[Schedule], *, steps: int | None = None, probes: Probes | None = None,
        scaler: Any = None, seed: int = 0, idle_steps: int = 0,
    ):  # fmt: skip
        check_owners(schedules)
        self.idle_steps = idle_steps
        self.model, self.root = model, unwrap(model)
        self.schedules, self.steps, self.probes, self.scaler, self.seed = tuple(schedules), steps, probes, scaler, seed
        self.optimizer: Optimizer | None = None
        self.loss: Tensor | None = None
        self.step_number = 0
        self._handles: list[Any] = []
        self._begun = self._ready = self._skipping = self._stepped = self._stepping = False
        self._running = self._closed = False
        self._loop_steps: bool | None = None  # whether the loop calls optimizer.step() itself; None: not seen yet
        self._rates: list[Any] = []
        self._refuse_ddp()

    # -- the run's ends

    def start(self, state: Mapping[str, Any] | None = None) -> None:
        """Start the schedules, and put them where ``state`` was."""
        for each in self.schedules:
            each.run = self
            each.start(self.root, steps=self.steps)
        self._running = True
        if state is not None:
            self.load_state_dict(state)

    def bind(self, optimizer: Any, *, regroup: bool = True) -> None:
        """Take the optimizer: its groups go through the schedules, unless the maker has done that, and hooks go on it."""
        self.optimizer = optim.plain(optimizer)
        self._check_held()
        if self.schedules and regroup:
            optim.regroup(self.optimizer, self.grouped([dict(group) for group in self.optimizer.param_groups]))
        self.keep(self.optimizer.register_step_pre_hook(lambda *_: self._before()))
        self.keep(self.optimizer.register_step_post_hook(lambda *_: self._after()))

    def grouped(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The optimizer's groups as the schedules want them."""
        for each in self.schedules:
            groups = each.groups(groups)
        return groups

    def __enter__(self) -> Run:
        self.keep(self.model.register_forward_pre_hook(lambda *_: self._entered()))
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self.finish()
        self.close()

    def finish(self) -> None:
        """After the last step; a second call does nothing."""
        if not self._running:
            return
        self._running = False
        for each in self._deliverers:
            each.finish()

    def close(self) -> None:
        """Take off hooks and whatever stands on the model for a time; a second call does nothing."""
        if self._closed:
            return
        self._closed, self._running = True, False
        for each in reversed(self.schedules):
            each.close()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def keep(self, handle: Any) -> Any:
        """A hook's handle that is removed at the end of the run."""
        self._handles.append(handle)
        return handle

    # -- one step

    def _entered(self) -> None:
        """The model is called: the first training pass of a step begins it."""
        if not self._begun and self.model.training and torch.is_grad_enabled():
            self.begin()

    def begin(self) -> None:
        """The step begins; a plain loop need not call it, unless it never calls the model itself."""
        self._begun = True
        for each in self.schedules:
            each.step_begin()

    @torch.no_grad()
    def gradients_ready(self) -> None:
        """The last backward pass of the step is done, and the gradients are unscaled; once a step."""
        if self._ready:
            return
        if not self._begun:
            raise RuntimeError(
                "the optimizer steps, and the model that tt.scheduled was given has not been called in training mode; give "
                "tt.scheduled the very module that the loop calls, or call s.begin() before the forward pass"
            )
        self._ready = True
        self._skipping = self._scales() and not self._finite()
        if not self._skipping:
            self._add_extra()
            for each in self.schedules:
                each.backward_end()

    def step(self, loss: Tensor | None = None, *, max_grad_norm: float | None = None) -> None:
        """The optimizer's step with all moments around it; if the loop has stepped the optimizer itself, what is left of them.

        Args:
            loss: the step's loss, for schedules that weigh by it; with accumulation the mean over the micro-batches.
            max_grad_norm: clip the gradients' norm to it.
        """
        self.loss = None if loss is None else loss.detach()
        if not self._stepped and not self._loop_steps:
            self._step(max_grad_norm)
        self.end()

    def _step(self, max_grad_norm: float | None) -> None:
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        if self._scales():
            self.scaler.unscale_(self.optimizer)
        elif self._loop_steps is None and not self._finite():
            if self.step_number >= SKIPPED_AT_FIRST:
                raise FloatingPointError(
                    f"the gradients of the first {SKIPPED_AT_FIRST + 1} steps hold NaN or infinite values; lower the learning "
                    "rate, check data and precision, and give tt.scheduled the loop's gradient scaler, if it has one, as scaler="
                )
            return  # a scaler that the loop keeps to itself has skipped its first step
        self.gradients_ready()
        if max_grad_norm and not self._skipping:
            nn.utils.clip_grad_norm_(held, max_grad_norm)
        self._stepping = True
        try:
            if self._scales():
                self.scaler.step(self.optimizer)
                self.scaler.update()
            else:
                self.optimizer.step()
        finally:
            self._stepping = False
        self.optimizer.zero_grad(set_to_none=True)

    def end(self) -> None:
        """The step is over, whether the optimizer stepped or not."""
        if not self._stepped:
            for each in self.schedules:
                each.step_skipped()
        for each in self.schedules:
            each.step_done()
        self.step_number += 1
        self._begun = self._ready = self._skipping = self._stepped = False

    def _before(self) -> None:
        """The optimizer is about to step."""
        self.gradients_ready()
        if self._skipping:
            return  # a fused optimizer is called all the same, and does nothing
        for each in self.schedules:
            each.before_optimizer()
        factor = math.prod(each.rate_factor() for each in self.schedules)
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        if factor != 1:
            for group in self.optimizer.param_groups:
                group["lr"] = group["lr"] * factor

    def _after(self) -> None:
        """The optimizer has stepped."""
        if self._skipping:
            return
        self._stepped = True
        self._loop_steps = not self._stepping
        for each in self.schedules:
            each.step_end()
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate

    def _add_extra(self) -> None:
        """The gradients of the extra losses, added beside autograd's own accumulation, which DDP and hooks watch."""
        with torch.enable_grad():
            found = [extra for each in self.schedules if (extra := each.extra_loss()) is not None]
            if not found:
                return
            learns = [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]
            gradients = torch.autograd.grad(sum(found), learns, allow_unused=True)
        for p, g in zip(learns, gradients, strict=True):
            if g is not None:
                p.grad = g if p.grad is None else p.grad.add_(g)

    def _scales(self) -> bool:
        return self.scaler is not None and self.scaler.is_enabled()

    def _finite(self) -> bool:
        held = (p.grad for group in self.optimizer.param_groups for p in group["params"])
        gradients = [g for g in held if g is not None and g.numel()]
        largest = torch._foreach_norm(gradients, ord=math.inf) if gradients else []
        return all(bool(torch.isfinite(each)) for each in largest)

    @property
    def _deliverers(self) -> list[Schedule]:
        """The schedules in the order in which they make what is delivered: other values first, then other shapes."""
        return sorted(self.schedules, key=lambda each: "delivery" not in each.owns)

    def evaluate(self, metrics: Mapping[str, float]) -> None:
        """Tell the schedules what an evaluation gave, while the run lasts."""
        for each in self.schedules if self._running else ():
            each.evaluate(dict(metrics))

    @contextmanager
    def weights(self) -> Iterator[None]:
        """Inside, the adapters are what the run would deliver if it ended now (averages, restarts joined); then as before.

        After the run they are that anyway.
        """
        with ExitStack() as stack:
            for each in self._deliverers if self._running else ():
                stack.enter_context(each.weights())
            yield

    # -- resuming

    def state_dict(self) -> dict[str, Any]:
        """The state of all schedules; to be taken between two steps, and stored beside adapter and optimizer."""
        return {
            "step": self.step_number,
            "schedules": [{"name": type(each).__name__, "state": each.state_dict()} for each in self.schedules],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put started schedules where ``state`` was.

        Raises:
            ValueError: it is of other schedules.
        """
        names = [type(each).__name__ for each in self.schedules]
        stored = [each["name"] for each in state["schedules"]]
        if names != stored:
            raise ValueError(f"the stored state is of the schedules {stored}, this run has {names}; resume with the same list")
        self.step_number = state["step"]
        for each, kept in zip(self.schedules, state["schedules"], strict=True):
            each.load_state_dict(kept["state"])

    def rebuild(self, state: Mapping[str, Any]) -> None:
        """Before the adapters are loaded: what the base needs so that they fit."""
        for each, kept in zip(self.schedules, state["schedules"], strict=True):
            each.rebuild(self.root, kept["state"])

    def _refuse_ddp(self) -> None:
        owner = next((each for each in self.schedules if "trainability" in each.owns), None)
        if owner is not None and self.ddp and not self.model.find_unused_parameters:
            raise Unsupported(
                f"{type(owner).__name__} lets parameters rest, and DDP would wait for their gradients; wrap the model with "
                "find_unused_parameters=True"
            )

    def _check_held(self) -> None:
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        missing = [a.site.name for a in self.adapters() if any(p.requires_grad and id(p) not in held for p in a.parameters())]
        if missing:
            raise RuntimeError(
                f"the optimizer lacks parameters of {len(missing)} adapted places, first {missing[0]}; make it over all of "
                "tt.parameters(model) while all of them are trainable"
            )
