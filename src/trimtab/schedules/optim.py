"""What schedules do to an optimizer that runs: regroup, drop, move, reset and reslice the state of single parameters.

All of it works on any ``torch.optim.Optimizer``: a state tensor of the parameter's own shape follows it, all else (step counts) is
left alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trimtab.core.errors import Unsupported

__all__ = ["drop_state", "exchange", "forget", "move_state", "plain", "regroup", "reset_state", "reslice"]


def plain(optimizer: Any) -> Optimizer:
    """The optimizer itself, out of the wrapper that accelerate puts around it."""
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def regroup(optimizer: Optimizer, groups: list[dict[str, Any]]) -> None:
    """Replace the optimizer's groups, which hold the same parameters; their state stays. Equal groups are left alone.

    Raises:
        Unsupported: a learning-rate scheduler stands on the old groups already, or the optimizer steps inside backward.
    """
    if len(groups) == len(optimizer.param_groups) and all(map(_equal, groups, optimizer.param_groups)):
        return
    if hasattr(optimizer, "received"):
        raise Unsupported("an optimizer that steps inside backward has its groups fixed; make it of the schedules' groups")
    if len(groups) != len(optimizer.param_groups) and hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        raise Unsupported(
            f"a learning-rate scheduler was made for {len(optimizer.param_groups)} groups, and the schedules need {len(groups)}; "
            "make the scheduler after tt.scheduled"
        )
    optimizer.param_groups.clear()
    for group in groups:
        optimizer.add_param_group(group)


def _equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    ours, theirs = ([id(p) for p in group["params"]] for group in (a, b))
    return ours == theirs and a.keys() == b.keys() and all(a[key] is b[key] or a[key] == b[key] for key in a if key != "params")


def drop_state(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Forget moments and step counts; the next step starts them anew."""
    for p in parameters:
        optimizer.state.pop(p, None)


def move_state(optimizer: Optimizer, parameters: Iterable[nn.Parameter], device: torch.device | str | None) -> None:
    """Move state tensors, but for single numbers, to ``device``; None: to each parameter's."""
    for p in parameters:
        for key, value in optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor) and value.dim():
                optimizer.state[p][key] = value.to(p.device if device is None else device)


def forget(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Take parameters out of the optimizer, with their state."""
    gone = {id(p): p for p in parameters}
    drop_state(optimizer, gone.values())
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in gone]


@torch.no_grad()
def reset_state(
    optimizer: Optimizer, parameters: Iterable[nn.Parameter], *, prune: float = 1.0, by: str = "magnitude",
    rng: torch.Generator | None = None,
) -> None:  # fmt: skip
    """Zero the share ``prune`` of every state tensor of a parameter's shape: the smallest, or entries drawn at random.

    Step counts stay, as in ReLoRA's code.

    Args:
        by: ``"magnitude"`` or ``"random"``.
        rng: of the draw, on the CPU.
    """
    for p in parameters:
        for value in optimizer.state.get(p, {}).values():
            if not isinstance(value, Tensor) or value.shape != p.shape or not value.numel():
                continue
            if prune >= 1:
                value.zero_()
            elif by == "random":
                value.mul_((torch.rand(value.shape, generator=rng) > prune).to(value.device))
            else:
                threshold = torch.quantile(value.abs().flatten().double(), prune)
                value.mul_(value.abs() > threshold)


@torch.no_grad()
def reslice(optimizer: Optimizer | None, p: nn.Parameter, dim: int, index: Tensor) -> None:
    """Keep of ``p``, and of its state, the entries ``index`` along ``dim``; the parameter object stays the same.

    Raises:
        RuntimeError: its gradient stands: shapes change between steps only.
    """
    if p.grad is not None:
        raise RuntimeError(f"a parameter of shape {tuple(p.shape)} has a gradient; shapes change in step_begin only")
    index = index.to(p.device)
    if optimizer is not None:
        for key, value in optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor) and value.shape == p.shape:
                optimizer.state[p][key] = value.index_select(dim, index.to(value.device))
    exchange(p, p.data.index_select(dim, index))


def exchange(p: Tensor, data: Tensor) -> None:
    """Give a parameter or buffer other data, of any shape; the object stays the same.

    A graph of the last step that the loop still holds keeps autograd's accumulation node alive, with the old shape. torch
    makes a new one when the dtype changes: hence the detour.
    """
    if data.shape != p.shape:
        p.data = data.new_empty(0, dtype=torch.float16 if data.dtype != torch.float16 else torch.float32)
    p.data = data
