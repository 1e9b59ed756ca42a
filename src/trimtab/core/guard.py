"""The check at the first optimizer step: exactly the declared parameters received gradients."""

from __future__ import annotations

import weakref
from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from trimtab.core.errors import GradientMismatch
from trimtab.core.state import ATTRIBUTE, ModelState, trainable_parameters

__all__ = ["check_gradients", "watch"]

_WATCHED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_HOOK: Any = None


def watch(root: nn.Module) -> None:
    """Check ``root`` when any optimizer that holds its adapters first steps.

    One process-wide pre-step hook serves all models and removes itself when no model waits for its check.
    """
    global _HOOK
    _WATCHED.add(root)
    if _HOOK is None:
        _HOOK = register_optimizer_step_pre_hook(_before_step)


def _before_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    if getattr(optimizer, "in_backward", False):
        return  # one parameter's step inside backward: the optimizer over all of them steps at its end
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for root in list(_WATCHED):
        state: ModelState | None = root.__dict__.get(ATTRIBUTE)
        if state is None:
            _WATCHED.discard(root)
            continue
        waiting = [g for g in state.groups.values() if g.trainable and not g.checked]
        if any(id(p) in held for g in waiting for p in trainable_parameters(g)):
            check_gradients(root, held=held, received=getattr(optimizer, "received", frozenset()))
            _WATCHED.discard(root)
    _release()


def _release() -> None:
    global _HOOK
    if not _WATCHED and _HOOK is not None:
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
        GradientMismatch: a declared parameter got none, or a base parameter that nobody declared did.
    """
    state: ModelState = model.__dict__[ATTRIBUTE]
    declared = {id(p) for g in state.groups.values() for p in trainable_parameters(g)}
    acting = {id(p) for g in state.groups.values() if g.name in state.active for p in trainable_parameters(g)}
    names = {id(p): n for n, p in model.named_parameters(remove_duplicate=False)}
    silent = [names.get(i, "?") for i, p in _by_id(model, acting) if p.grad is None and i not in received]
    foreign = [n for n, p in model.named_parameters() if p.grad is not None and id(p) not in declared]
    lines = []
    if silent:
        lines.append(
            f"{len(silent)} of {len(acting)} declared parameters received no gradient ({_some(silent)}): the loss does not "
            "reach them; leave these places out of targets, or attach with check_gradients=False if that is meant"
        )
    if foreign:
        lines.append(
            f"{len(foreign)} parameters that no adapter declares received gradients ({_some(foreign)}) and would not be "
            "saved; declare them with tt.attach(model, tt.Unfreeze(), targets=..., name=...), or freeze them"
        )
    if lines:
        raise GradientMismatch("at the first optimizer step, " + "; and ".join(lines))
    for group in state.groups.values():
        group.checked = group.checked or group.name in state.active


def _by_id(model: nn.Module, wanted: set[int]) -> list[tuple[int, nn.Parameter]]:
    return [(id(p), p) for p in model.parameters() if id(p) in wanted]


def _some(names: list[str], n: int = 3) -> str:
    return ", ".join(names[:n]) + (", ..." if len(names) > n else "")
