"""What acts inside a block of the program: ``disabled``, ``routed``, ``scaled`` and an ``activate`` within one of them.

It is a value of the caller's context (a context variable), never a state of the model: threads and tasks that share a model do not
see each other's blocks, a nested block gives back the outer one, and a copy or a saved model carries nothing of it.

A checkpointed part of a forward runs again in backward, perhaps after the block has ended or on another thread. It gets what held
in its own first run, which is noted with torch's record of that part.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import count
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction, _checkpoint_hook, _CheckpointFrame, checkpoint

from trimtab.core.errors import Unsupported

if TYPE_CHECKING:
    from trimtab.core.acts import Acts
    from trimtab.core.routing import Route

__all__ = ["Factor", "Owner", "Plan", "changed", "entered", "plan_for", "present", "within"]

_HOLDS: ContextVar[Mapping[str, Plan]] = ContextVar("trimtab_plans")


class _Present:
    """``_PRESENT.plans`` is what holds here, or ``_PRESENT`` itself where nothing was ever entered.

    A property whose getter is written in C is what torch.compile takes for an attribute: it reads the value while it traces, and
    guards on it at every call, so that a compiled model follows a context variable.
    """

    plans = property(_HOLDS.get)


_PRESENT = _Present()
_NUMBERS = count()


class Owner:
    """One model, as contexts know it. A copy is another one.

    Attributes:
        open: plans of ``routed`` blocks that are open now, in any thread.
        replays: whether a forward has run in a block with gradients on, so that a checkpoint may repeat it.
    """

    def __init__(self) -> None:
        self.id = f"model {next(_NUMBERS)}"
        self.open: set[Plan] = set()
        self.replays = False

    def __reduce__(self) -> tuple:
        return Owner, ()


@dataclass(frozen=True)
class Factor:
    """The factor on all that the adapters of a module change (``tt.scaled``).

    Attributes:
        value: a tensor, so that no graph depends on it.
        damped: whether it differs from 1; a compiled graph does not ask.
    """

    value: Tensor
    damped: bool

    @property
    def asks(self) -> bool:
        """Whether the base must be run beside the adapters."""
        return torch.compiler.is_compiling() or self.damped


@dataclass(eq=False, frozen=True)
class Plan:
    """What a block says of one model.

    Attributes:
        names: the adapters that act; None: those that act outside of the block, or those of each row.
        acts: path of a hosted module -> what acts there, if ``names`` says it.
        routes: path of a hosted module -> its route, in a routed batch.
        factors: path of a hosted module -> its factor.
        spans: which tokens of each row are its text (``tt.spans``): start, stop, the largest stop.
        learns: whether gradients were on where the block began.
        task: the backward pass that the block began in, -1 for none.
    """

    names: tuple[str, ...] | None = None
    acts: Mapping[str, Acts] | None = None
    routes: Mapping[str, Route] | None = None
    factors: Mapping[str, Factor] | None = None
    spans: tuple[Tensor, Tensor, int] | None = None
    learns: bool = field(default_factory=torch.is_grad_enabled)
    task: int = field(default_factory=torch._C._current_graph_task_id)


def present(owner: Owner) -> Plan | None:
    """What the innermost open block says of ``owner``; None outside of all."""
    plans = _PRESENT.plans
    return plans.get(owner.id) if isinstance(plans, dict) else None


def within(owner: Owner, **changes: Any) -> Plan:
    """What the innermost open block says of ``owner``, with ``changes``."""
    return replace(present(owner) or Plan(), learns=torch.is_grad_enabled(), task=torch._C._current_graph_task_id(), **changes)


def changed(owner: Owner, plan: Plan) -> None:
    """``plan`` replaces what the innermost open block says of ``owner``, until that block ends."""
    plans = _HOLDS.get({})
    _HOLDS.set({**plans, owner.id: plan})


@contextmanager
def entered(owner: Owner, plan: Plan) -> Iterator[None]:
    """``plan`` holds for ``owner`` inside the block."""
    before = _HOLDS.get({})
    if plan.routes is not None:
        owner.open.add(plan)
    _HOLDS.set({**before, owner.id: plan})
    try:
        yield
    finally:
        _HOLDS.set(before)
        owner.open.discard(plan)


def plan_for(owner: Owner) -> Plan | None:
    """What holds for ``owner`` in the forward that is running."""
    plans = _PRESENT.plans
    plan = plans.get(owner.id) if isinstance(plans, dict) else None
    if torch.compiler.is_compiling() or not (owner.replays or (plan is not None and plan.learns)):
        return plan
    return _noted(owner, plan)


# -- checkpoints

#: torch's record of a checkpointed part of a forward -> (model, what held for it)
_FRAMES: WeakKeyDictionary[Any, dict[str, Plan]] = WeakKeyDictionary()


def _noted(owner: Owner, plan: Plan | None) -> Plan | None:
    """``plan``, noted for the second run of a checkpoint; in that second run, what was noted.

    Raises:
        Unsupported: a module runs in backward, and nothing tells which forward it repeats.
    """
    task = torch._C._current_graph_task_id()
    if task != -1 and (plan is None or plan.task != task):
        return _again(owner)
    if plan is not None and plan.learns:
        owner.replays = True
        _note(owner, plan)
    return plan


def _note(owner: Owner, plan: Plan) -> None:
    """Note ``plan`` with every checkpointed part that runs for the first time now, one within another."""
    for part in _running_first():
        _FRAMES.setdefault(part, {})[owner.id] = plan


def _again(owner: Owner) -> Plan | None:
    part = _running_again()
    if part is None:
        raise Unsupported(
            "an adapted module runs inside backward, and nothing tells which forward it repeats, while tt.routed, tt.disabled or "
            "tt.scaled were used on this model with gradients on; checkpoint with torch.utils.checkpoint, or run what those "
            "blocks hold under torch.no_grad()"
        )
    plan = _FRAMES.get(part, {}).get(owner.id)
    if plan is not None:  # what runs again may hold further parts, which run for the first time in it
        _note(owner, plan)
    return plan


def _running_first() -> Iterator[Any]:
    """torch's records of the checkpointed parts that run for the first time now, innermost first."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    cells = () if hooks is None else getattr(hooks[0], "__closure__", None) or ()
    yield from (cell.cell_contents for cell in cells if isinstance(cell.cell_contents, _CheckpointFrame))
    plain, reentrant = inspect.unwrap(checkpoint).__code__, CheckpointFunction.forward.__code__
    again = {CheckpointFunction.backward.__code__, _unpacking()}
    for frame in _stack():
        if frame.f_code in again:
            return
        if frame.f_code is reentrant:
            yield frame.f_locals["ctx"]
        elif frame.f_code is plain and "gen" in frame.f_locals:
            yield frame.f_locals["gen"].gi_frame.f_locals["new_frame"]


def _running_again() -> Any:
    """torch's record of the checkpointed part that runs again now; None if there is none."""
    wanted = {CheckpointFunction.backward.__code__: "ctx", _unpacking(): "frame"}
    return next((frame.f_locals[wanted[frame.f_code]] for frame in _stack() if frame.f_code in wanted), None)


@cache
def _unpacking() -> Any:
    """The code that runs a part again: the hook that gives a saved tensor back."""
    constants = _checkpoint_hook.__init__.__code__.co_consts
    return next(c for c in constants if getattr(c, "co_name", "") == "unpack_hook")


def _stack() -> Iterator[Any]:
    """The frames that run now, innermost first."""
    frame = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
