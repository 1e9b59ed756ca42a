"""Checkpoint averaging on the fly: the average of a run's last checkpoints, with no checkpoint but the average in memory.

Every ``every`` steps, counted back from the last one, the adapters enter the average; of these the last ``last``. Weights are
those of ``artifacts.average_weights``, so that the result is what averaging saved checkpoints afterwards gives. With ``a = w_n
/ (w_1 + ... + w_n)``: ``mean += a (theta - mean)``, in float32 at least, and exact where checkpoints are equal. Source: arXiv
2504.18580 for weights by loss or step; arXiv 1803.05407 for uniform ones.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.artifacts.average_weights import STREAMED, log_weights, normalised
from trimtab.core.contracts import Adapter
from trimtab.schedules.contract import Schedule
from trimtab.schedules.registry import schedule

__all__ = ["CheckpointAveraging"]


@schedule(
    paper="arXiv:2504.18580",
    tests=({"every": 1, "last": 3}, {"every": 2, "last": None, "scheme": "exponential", "strength": 0.6},
           {"by": "step", "every": 1, "last": None, "scheme": "linear"}),
)  # fmt: skip
@dataclass(eq=False)
class CheckpointAveraging(Schedule):
    """The run delivers the average of its last checkpoints, weighted by loss or step, uniform, or exponential.

    Not where the learning rate has decayed to nothing long before the end: the checkpoints are then equal. While training, the
    adapters are those of the last step; evaluations, and the adapter that is delivered, are the average.

    Args:
        scheme: ``"power"``, ``"uniform"``, ``"exponential"``, ``"softmax"`` or ``"linear"``.
        by: ``"loss"``, the mean training loss since the checkpoint before, or ``"step"``.
        strength: the power, decay or temperature of the scheme.
        every: steps between two checkpoints; None: a twentieth of the run.
        last: how many count; None: all of them.
    """

    owns: ClassVar[frozenset[str]] = frozenset({"delivery"})
    whole_gradients: ClassVar[bool] = False

    scheme: str = "power"
    by: str = "loss"
    strength: float = 0.7
    every: int | None = None
    last: int | None = 10

    def __post_init__(self) -> None:
        if self.scheme not in STREAMED:
            raise ValueError(f"scheme must be one of {', '.join(STREAMED)} while training, found {self.scheme!r}")
        if self.by not in ("loss", "step"):
            raise ValueError(f"by must be loss or step while training, found {self.by!r}")
        log_weights([1.0], scheme=self.scheme, by=self.by, strength=self.strength)
        for name in ("every", "last"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be None or an integer of at least 1, found {value!r}")

    def start(self, model: nn.Module, *, steps: int | None) -> None:
        """Find what is averaged.

        Raises:
            ValueError: the length of the run is needed (``every`` is None, or ``last`` is not) and unknown.
        """
        self.needs_steps = self.every is None or self.last is not None
        super().start(model, steps=steps)
        self.interval = self.every or max(1, steps // 20)
        if self.every is not None:
            self.tell_if_never("takes a checkpoint before the last step", self.every)
        adapters = self.services.adapters()
        named = {f"{a.site.path}.{a.site.slot}.{key}": p for a in adapters for key, p in a.named_parameters() if p.requires_grad}
        self.parameters: dict[str, nn.Parameter] = named
        self.mean: dict[str, Tensor] = {}
        self.values: list[float] = []
        self._total: Tensor | float = 0.0
        self._count = 0

    @torch.no_grad()
    def step_done(self) -> None:
        """Take the loss, and where it is due the adapters.

        Raises:
            ValueError: weights by loss, and the loop does not tell the loss; or a loss that is not above 0.
        """
        if self.services.loss is not None:
            self._total, self._count = self._total + self.services.loss.double(), self._count + 1
        left = -self.step if self.steps is None else self.steps - self.step
        if left % self.interval:
            return
        if self.by == "loss" and self.scheme in ("power", "softmax") and not self._count:
            raise ValueError('CheckpointAveraging weighs by loss, and the loop does not tell it: s.step(loss), or by="step"')
        value = float(self._total) / max(1, self._count) if self.by == "loss" and self._count else float(self.step)
        self._total, self._count = 0.0, 0
        if not all(each.deliverable for each in self.services.schedules):
            return  # Light-PEFT has not cut the base yet, for which the adapters are meant
        if self.last is not None and left >= self.last * self.interval:
            return  # a checkpoint like the others, and too early to count
        self.values.append(value)
        share = self.weights_so_far()[-1]
        for key, p in self.parameters.items():
            wide = p.detach().to(torch.promote_types(p.dtype, torch.float32))
            if key in self.mean:
                self.mean[key].lerp_(wide, share)
            else:
                self.mean[key] = wide.clone()

    def weights_so_far(self) -> list[float]:
        """The weights of the checkpoints taken so far, in order."""
        return normalised(log_weights(self.values, scheme=self.scheme, by=self.by, strength=self.strength))

    @contextmanager
    def weights(self) -> Iterator[None]:
        """The average in place of the adapters; before the first checkpoint the adapters themselves."""
        if not self.mean:
            yield
            return
        own = {key: p.detach().clone() for key, p in self.parameters.items()}
        self._put(self.mean)
        try:
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for key, value in values.items():
            self.parameters[key].copy_(value)

    def resliced(self, parameter: nn.Parameter, dim: int, index: Tensor) -> None:
        for key, p in self.parameters.items():
            if p is parameter and key in self.mean:
                self.mean[key] = self.mean[key].index_select(dim, index.to(p.device))

    def removed(self, adapters: Collection[Adapter]) -> None:
        gone = {id(p) for adapter in adapters for p in adapter.parameters()}
        for key in [key for key, p in self.parameters.items() if id(p) in gone]:
            del self.parameters[key]
            self.mean.pop(key, None)

    def finish(self) -> None:
        """The adapters become their average."""
        self._put(self.mean)

    def state_dict(self) -> dict[str, Any]:
        total = float(self._total)
        mean = {key: value.clone() for key, value in self.mean.items()}
        return super().state_dict() | {"mean": mean, "values": list(self.values), "total": total, "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.mean = {key: value.to(self.parameters[key].device) for key, value in state["mean"].items()}
        self.values, self._total, self._count = list(state["values"]), state["total"], state["count"]
