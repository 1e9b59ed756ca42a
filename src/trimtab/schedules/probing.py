"""The loss on sample batches, as schedules probe it: in evaluation mode, without a graph, without touching global randomness."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from trimtab.core.errors import Unsupported

__all__ = ["Probes", "measuring"]

Loss = Callable[[nn.Module, Any], Tensor]


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without a graph; modes of all modules and the states of all random generators come back."""
    training = [module for module in model.modules() if module.training]
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    model.eval()
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


class _Copies:
    """Stands for the model in a user's loss: runs it once on the batch repeated, and hands out one copy's outputs."""

    def __init__(self, model: nn.Module, copies: int):
        self.model, self.copies, self.current, self.outputs = model, copies, 0, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.outputs is None:
            self.rows = next(t.shape[0] for t in _tensors((args, kwargs)) if t.dim())
            args, kwargs = tree_map_only(Tensor, self._repeated, (args, kwargs))
            self.outputs = self.model(*args, **kwargs)
        return tree_map_only(Tensor, self._own, self.outputs)

    def _repeated(self, t: Tensor) -> Tensor:
        return t.repeat(self.copies, *(1,) * (t.dim() - 1)) if t.dim() and t.shape[0] == self.rows else t

    def _own(self, t: Tensor) -> Tensor:
        if not t.dim() or t.shape[0] != self.rows * self.copies:
            raise Unsupported(
                f"the loss reads an output of shape {tuple(t.shape)} that is not one row an example, and cannot be told apart for "
                "several probes at once: compute the loss from the logits, or probe with batched=False"
            )
        return t[self.current * self.rows : (self.current + 1) * self.rows]


def _tensors(tree: Any) -> list[Tensor]:
    from torch.utils._pytree import tree_leaves

    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@dataclass
class Probes:
    """Sample batches and the loss on them.

    Attributes:
        loss: ``(model, batch) -> scalar``; it calls the model once.
        batches: a sequence, gone through again and again, or ``i -> batch``.
    """

    loss: Loss
    batches: Sequence[Any] | Callable[[int], Any] = field(repr=False)

    @classmethod
    def of(cls, loss: Loss | None, batches: Sequence[Any] | Callable[[int], Any] | None) -> Probes | None:
        """Both, or None where neither is given.

        Raises:
            ValueError: one is given without the other, or there are no batches.
        """
        if loss is None and batches is None:
            return None
        if loss is None or batches is None or (not callable(batches) and not len(batches)):
            raise ValueError("probing needs both loss=(model, batch) -> scalar and batches=, at least one of them")
        return cls(loss, batches)

    def batch(self, index: int) -> Any:
        """The batch of the ``index``-th probe."""
        return self.batches(index) if callable(self.batches) else self.batches[index % len(self.batches)]

    def measure(self, model: nn.Module, index: int) -> Tensor:
        """The loss on the ``index``-th batch, a scalar."""
        with measuring(model):
            return self.loss(model, self.batch(index)).detach().float()

    def measure_copies(self, model: nn.Module, index: int, copies: int) -> Tensor:
        """The loss on the ``index``-th batch, repeated ``copies`` times in one forward pass: shape ``(copies,)``.

        Raises:
            Unsupported: the loss reads outputs without one row an example.
        """
        with measuring(model):
            batch, shim, found = self.batch(index), _Copies(model, copies), []
            for shim.current in range(copies):
                found.append(self.loss(shim, batch).detach().float())
            return torch.stack(found)
