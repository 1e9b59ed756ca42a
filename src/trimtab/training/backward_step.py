"""An optimizer that steps inside backward: each parameter as soon as its gradient is complete, which is then freed.

Of all gradients only the largest single one then exists at a time, instead of their sum. The step itself is the wrapped
optimizer's, to the bit. What needs all gradients at once cannot work with it: accumulation over micro-batches, clipping by the
global norm, a gradient scaler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

__all__ = ["BackwardOptimizer"]


class BackwardOptimizer(Optimizer):
    """Wraps an optimizer class so that ``loss.backward()`` steps; ``step()`` and ``zero_grad()`` end the step.

    Learning-rate schedulers act on ``param_groups`` as ever; ``state_dict()`` is the wrapped optimizer's own.

    Args:
        params: parameters or groups, as any optimizer takes them.
        make: the optimizer for given groups, such as ``lambda groups: torch.optim.AdamW(groups, fused=True)``.

    Attributes:
        received: ids of the parameters that had a gradient since the last ``step()``.
        refused: names or shapes of the parameters whose gradient was not finite; they were not stepped.

    Raises:
        RuntimeError: in backward, if a parameter's gradient arrives twice before ``step()``.
    """

    def __init__(self, params: Iterable[Any], make: Callable[[list[Any]], Optimizer]):
        whole = make(list(params))
        super().__init__(whole.param_groups, whole.defaults)
        self.received: set[int] = set()
        self.refused: list[tuple[int, ...]] = []
        self._inner: dict[nn.Parameter, tuple[Optimizer, dict[str, Any]]] = {}
        self._hooks = []
        for group in self.param_groups:
            for p in group["params"]:
                inner = make([{**{k: v for k, v in group.items() if k != "params"}, "params": [p]}])
                inner.in_backward = True  # type: ignore[attr-defined]  one parameter: no moment to look at all gradients
                self._inner[p] = inner, group
                self._hooks.append(p.register_post_accumulate_grad_hook(self._arrived))
        self._link()

    def _link(self) -> None:
        """One state for all, keyed by parameter as every optimizer's is."""
        for inner, _ in self._inner.values():
            inner.state = self.state

    def _arrived(self, p: nn.Parameter) -> None:
        if id(p) in self.received:
            raise RuntimeError(
                f"the gradient of a parameter of shape {tuple(p.shape)} arrived twice before step(): a step inside backward works "
                "neither with gradient accumulation nor with reentrant checkpointing (use_reentrant=False works)"
            )
        self.received.add(id(p))
        inner, group = self._inner[p]
        if bool(torch.isfinite(p.grad).all()):
            inner.param_groups[0].update({k: v for k, v in group.items() if k != "params"})
            inner.step()
        else:
            self.refused.append(tuple(p.shape))
        p.grad = None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Nothing is left to do but to count: the parameters have been stepped by ``backward``."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.received.clear()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for p in group["params"]:
                self._inner[p] = self._inner[p][0], group
        self._link()

    def close(self) -> None:
        """Take the hooks off the parameters."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
