"""What a run does for its schedules: find adapters, let parameters rest, cut ranks, draw, and agree over processes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from trimtab.core.contracts import Adapter
from trimtab.core.errors import Unsupported
from trimtab.core.state import ATTRIBUTE, state_of
from trimtab.schedules import optim

if TYPE_CHECKING:
    from trimtab.schedules.contract import Schedule

__all__ = ["Services"]


class Services:
    """Base of ``Run``, which has the attributes."""

    model: nn.Module
    root: nn.Module
    optimizer: Optimizer | None
    schedules: tuple[Schedule, ...]
    seed: int
    _running: bool

    def adapters(self) -> list[Adapter]:
        """The adapters of all trainable groups, in the model's order within each; none where nothing is attached."""
        if ATTRIBUTE not in self.root.__dict__:
            return []
        return [adapter for group in state_of(self.root).groups.values() if group.trainable for adapter in group.adapters]

    def set_trainable(self, parameters: Iterable[nn.Parameter], on: bool, *, state: str = "keep") -> None:
        """Let parameters learn or not; those that stop lose their gradient, so that the optimizer passes them by.

        Args:
            state: of the optimizer, for those that stop: ``"keep"`` it, ``"drop"`` it, or keep it on the ``"cpu"``.
        """
        parameters = list(parameters)
        for p in parameters:
            p.requires_grad_(on)
            if not on:
                p.grad = None
        if self.optimizer is None:
            return
        if not on and state == "drop":
            optim.drop_state(self.optimizer, parameters)
        elif state == "cpu":
            optim.move_state(self.optimizer, parameters, None if on else "cpu")

    def generator(self, schedule: Schedule) -> torch.Generator:
        """A generator on the CPU for a schedule's own draws, by the run's seed and its place in the list."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + self.schedules.index(schedule))

    def slice_rank(self, adapter: Adapter, index: Tensor) -> None:
        """Keep the ranks ``index`` of an adapter, with the optimizer's state; in ``step_begin`` or ``finish`` only.

        Raises:
            Unsupported: the method has no ranks that can be cut, or DDP holds buckets of the old shapes.
        """
        axes = type(adapter).rank_axes
        if not axes:
            raise Unsupported(f"{type(adapter.config).__name__} has no ranks that a schedule could cut (at {adapter.site.name})")
        if self.ddp and self._running:
            raise Unsupported("ranks cannot be cut inside DDP, whose buckets have the old shapes; cut them in finish, unwrapped")
        for name, dim in axes.items():
            tensor = getattr(adapter, name)
            optim.reslice(self.optimizer, tensor, dim, index)
            for each in self.schedules:
                each.resliced(tensor, dim, index)

    @property
    def ddp(self) -> bool:
        """Whether the loop's model is a DistributedDataParallel."""
        return isinstance(self.model, nn.parallel.DistributedDataParallel)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of ``value`` over all processes."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return value
        value = value.clone()
        distributed.all_reduce(value)
        return value / distributed.get_world_size()
