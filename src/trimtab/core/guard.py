"""The check at the first optimizer step: exactly the declared parameters received gradients.

A declared parameter without a gradient is an error where a gradient could have come: an output of the model depends on it,
and the loss forgot that output, or cut it off. Where no output depends on it, nothing is wrong with the loss: its module did
not run (a dropped layer, an absent input, an idle expert), or ran for nothing (a last block that nobody reads, an index).
``trimtab.core.reach`` sees which of the two it is, in the forward itself. Such places are told once, and once more if no
gradient has come after ``LATE`` steps.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from trimtab.core import reach
from trimtab.core.changes import verify
from trimtab.core.contracts import Adapter
from trimtab.core.errors import GradientMismatch
from trimtab.core.reach import FAULT
from trimtab.core.state import ATTRIBUTE, ModelState, trainable_parameters

__all__ = ["LATE", "check_gradients", "release", "watch"]

#: optimizer steps after which a place that never got a gradient is told again
LATE = 100

_WATCHED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
#: models whose first step left parameters without a gradient, and these
_PENDING: weakref.WeakKeyDictionary[nn.Module, _Pending] = weakref.WeakKeyDictionary()
_HOOK: Any = None


@dataclass
class _Pending:
    """Parameters that still wait for their first gradient: id -> name of their place."""

    places: dict[int, str] = field(default_factory=dict)
    steps: int = 0


def watch(root: nn.Module) -> None:
    """Check ``root`` when any optimizer that holds its adapters first steps.

    One process-wide pre-step hook serves all models and removes itself when no model waits for its check.
    """
    global _HOOK
    _WATCHED.add(root)
    reach.begin(root)
    if _HOOK is None:
        _HOOK = register_optimizer_step_pre_hook(_before_step)


def release(root: nn.Module) -> None:
    """Forget ``root``, whose last adapter has gone."""
    _WATCHED.discard(root)
    _PENDING.pop(root, None)
    reach.end(root)
    _release()


def _before_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    if getattr(optimizer, "in_backward", False):
        return  # one parameter's step inside backward: the optimizer over all of them steps at its end
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    received = getattr(optimizer, "received", frozenset())
    for root in list(_PENDING):
        _wait(root, held, received)
    for root in list(_WATCHED):
        state: ModelState | None = root.__dict__.get(ATTRIBUTE)
        if state is None:
            _WATCHED.discard(root)
            continue
        waiting = [g for g in state.groups.values() if g.trainable and not g.checked]
        if any(id(p) in held for g in waiting for p in trainable_parameters(g)):
            if verify(root, state):
                raise GradientMismatch(
                    "at the first optimizer step, the model's vocabulary had grown since the adapters came, and this step's "
                    "forward ran without them there; they follow now: zero the gradients and run the step again"
                )
            check_gradients(root, held=held, received=received)
            _WATCHED.discard(root)
            reach.end(root)
    _release()


def _release() -> None:
    global _HOOK
    if not _WATCHED and not _PENDING and _HOOK is not None:
        _HOOK.remove()
        _HOOK = None


def check_gradients(
    model: nn.Module, *, held: set[int] | None = None, received: Collection[int] = frozenset()
) -> None:
    """Confirm that the trainable adapters that act, and nothing else of ``model``, have gradients now.

    Args:
        model: the model that the adapters are attached to.
        held: ids of the parameters that the optimizer holds; None: those are not looked at.
        received: ids of those whose gradient was used and freed inside backward.

    Raises:
        GradientMismatch: a declared parameter got none though the model's outputs depend on it; or none of them got any; or a
            base parameter that nobody declared did.
    """
    state: ModelState = model.__dict__[ATTRIBUTE]
    declared = {id(p) for g in state.groups.values() for p in trainable_parameters(g)}
    acting = [g for g in state.groups.values() if g.name in state.active]
    wanted = {id(p) for g in acting for p in trainable_parameters(g)}
    names = {id(p): n for n, p in model.named_parameters(remove_duplicate=False)}
    silent = {id(p) for p in model.parameters() if id(p) in wanted and p.grad is None and id(p) not in received}
    foreign = [n for n, p in model.named_parameters() if p.grad is not None and id(p) not in declared]
    seen = reach.seen(model)
    blamed, notes = _judge([a for g in acting for a in g.adapters], silent, wanted, seen)
    lines = []
    if blamed:
        lost = [names.get(i, "?") for i in names if i in blamed]
        lines.append(f"{len(lost)} of {len(wanted)} declared parameters received no gradient ({_some(lost)}): {_why(blamed, seen)}")
    if foreign:
        lines.append(
            f"{len(foreign)} parameters that no adapter declares received gradients ({_some(foreign)}) and would not be "
            "saved; declare them with tt.attach(model, tt.Unfreeze(), targets=..., name=...), or freeze them"
        )
    if lines:
        raise GradientMismatch("at the first optimizer step, " + "; and ".join(lines))
    for group in acting:
        group.checked = True
    if notes:
        _tell(model, notes, {i: names.get(i, "?") for i in silent})
    _tell_statistics(model)


def _judge(
    adapters: list[Adapter], silent: set[int], wanted: set[int], seen: reach.Reach | None
) -> tuple[set[int], dict[str, list[str]]]:
    """Ids of the parameters whose missing gradient is a fault; and, by reason, the names of the places where it is none."""
    notes: dict[str, list[str]] = {}
    blamed: set[int] = set()
    named: dict[str, list[Adapter]] = {}
    learning = {id(a): {id(p) for p in a.parameters() if p.requires_grad} & wanted for a in adapters}
    inside = any(a.site.block is not None and learning[id(a)] - silent for a in adapters)
    for adapter in adapters:
        lost = learning[id(adapter)] & silent
        if adapter.site.clause is not None and learning[id(adapter)]:
            named.setdefault(adapter.site.clause, []).append(adapter)
        if not lost:
            continue
        reason = FAULT if seen is None or lost >= wanted or silent >= wanted else seen.reason(adapter, lost, beside=inside)
        if reason == FAULT:
            blamed |= lost
        else:
            notes.setdefault(reason, []).append(adapter.site.name)
    for clause, its in named.items():
        if any(learning[id(a)] - silent for a in its):
            continue
        if seen is not None and any(a.site.path in seen.ran for a in its):
            blamed |= {i for a in its for i in learning[id(a)]}  # all that was named runs and cannot learn
        else:
            notes[f"nothing that targets={clause!r} names ran in this step"] = [a.site.name for a in its]
    return blamed, notes


def _why(blamed: set[int], seen: reach.Reach | None) -> str:
    """What to do about it."""
    if seen is not None and seen.cut:
        return (
            f"{_some(sorted(seen.cut))} ran inside torch.utils.checkpoint with use_reentrant=True on inputs that need no gradient, "
            "which cuts all gradients off; use use_reentrant=False, or call model.enable_input_require_grads()"
        )
    return (
        "the loss does not reach them; let the loss use what they give, leave these places out with exclude= or other targets, "
        "or attach with check_gradients=False if that is meant"
    )


def _tell(model: nn.Module, notes: dict[str, list[str]], silent: dict[int, str]) -> None:
    """Say once which places had no part in the step, and wait for them."""
    found = "; ".join(f"{reason}: {len(places)} ({_some(places)})" for reason, places in notes.items())
    warnings.warn(
        f"at the first optimizer step, places without a gradient: {found}. They stay as they are until one comes; if none ever "
        "will, leave them out with tt.attach(..., exclude=...)",
        stacklevel=6,
    )
    _PENDING[model] = _Pending(silent)


def _tell_statistics(model: nn.Module) -> None:
    """Say that norms of the base follow the batches: their statistics are no part of an adapter."""
    moving = [
        name
        for name, module in model.named_modules()
        if module.training and getattr(module, "track_running_stats", False) and "trimtab" not in name
    ]
    if moving:
        warnings.warn(
            f"{len(moving)} norms of the base ({_some(moving)}) take their running statistics from the training batches; these are "
            "saved with no adapter, and a fresh base has others: put these norms into eval() while training",
            stacklevel=6,
        )


def _wait(root: nn.Module, held: set[int], received: Collection[int]) -> None:
    """One more step: whose gradient has come, and who has waited too long."""
    pending = _PENDING[root]
    here = {id(p): p for p in root.parameters() if id(p) in pending.places}
    if not held & here.keys() and here:
        return  # another model's optimizer
    for i, p in here.items():
        if p.grad is not None or i in received or not p.requires_grad:
            del pending.places[i]
    pending.places = {i: name for i, name in pending.places.items() if i in here}
    pending.steps += 1
    if pending.places and pending.steps >= LATE:
        warnings.warn(
            f"after {pending.steps} optimizer steps {len(pending.places)} declared parameters have never had a gradient "
            f"({_some(list(pending.places.values()))}); they are as they were when they were attached, and take no part in what is "
            "learnt: leave their places out with tt.attach(..., exclude=...)",
            stacklevel=5,
        )
        pending.places.clear()
    if not pending.places:
        del _PENDING[root]


def _some(names: list[str], n: int = 3) -> str:
    return ", ".join(names[:n]) + (", ..." if len(names) > n else "")
