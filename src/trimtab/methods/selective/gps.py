"""GPS: in every row of a matrix the K entries with the largest gradient learn.

``W'[o, i] = W[o, i] + d[o, k]`` where ``i = columns[o, k]``, the K inputs of output ``o`` with the largest ``|dL/dW|`` summed over
sample batches; ``d`` (out, K) starts at zero, so training starts at the base and all other entries keep their bits. It equals
fine-tuning of W under a mask with Adam without weight decay, which is element-wise, with moments for K numbers a row alone.
Source: arXiv 2312.10136, Sec. 3. Trainable: ``K out``, and the columns (int16 up to 32,767 inputs) as a buffer. Saved for
backward: ``x`` alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core.contracts import MethodConfig, Reparameterization, Span
from trimtab.core.errors import TooSmall
from trimtab.core.registry import method
from trimtab.core.site import Operation, Site
from trimtab.kernels.entries import added, entries

__all__ = ["GPS", "GPSAdapter"]


@dataclass(frozen=True)
class GPS(MethodConfig):
    """The K inputs of each neuron that the loss's gradient points at; needs ``tt.attach(..., loss=...)``.

    The paper trains the head and the biases of the linear layers with it: attach ``Unfreeze`` and ``BitFit`` under the same
    name. Its loss is a supervised contrastive one (temperature 0.07) on fine-grained images, cross-entropy elsewhere. Not
    without sample data of the task, nor for a quantised base, whose gradient is not known.

    Args:
        entries: K, how many entries of each row learn; at most ``in``. The paper's: 1 to 20.
    """

    search = {"entries": (1, 2, 4, 8, 16)}
    learning_rate = Span(1e-4, 1e-2, log=True)

    entries: int = 1

    def __post_init__(self) -> None:
        k = self.entries
        self.require(
            isinstance(k, int) and not isinstance(k, bool) and k >= 1, f"entries must be an integer of at least 1, found {k!r}"
        )


@method(GPS, paper="arXiv:2312.10136 Sec. 3", tests=({"entries": 1}, {"entries": 3}))
class GPSAdapter(Reparameterization):
    """Deltas ``d`` (out, K) at the buffer ``columns`` (out, K)."""

    fast = frozenset({"linear"})
    needs_weight = False
    needs_gradient = True

    def __init__(self, config: GPS, site: Site, *, rng: torch.Generator):
        super().__init__(config, site)
        out, fan_in = site.shape
        dtype = torch.int16 if fan_in <= torch.iinfo(torch.int16).max else torch.int32
        columns = torch.empty(out, config.entries, dtype=dtype, device=site.device)
        if not site.is_meta:
            columns.copy_(site.gradient.abs().topk(config.entries, dim=1).indices.sort(dim=1).values)
        self.register_buffer("columns", columns)
        self.d = self.zeros(out, config.entries)

    @classmethod
    def check(cls, config: GPS, site: Site) -> None:
        if config.entries > site.shape[-1]:
            raise TooSmall(
                f"entries={config.entries} is more than the {site.shape[-1]} inputs of {site.name}; use at most {site.shape[-1]}"
            )

    def index(self) -> Tensor:
        """(out K,) places in the flattened matrix, ascending."""
        out, fan_in = self.site.shape[-2:]
        starts = torch.arange(0, out * fan_in, fan_in, device=self.columns.device)
        return (self.columns + starts[:, None]).flatten()

    def weight(self, W: Tensor) -> Tensor:
        return added(W, self.index(), self.d.flatten())

    def forward(self, x: Tensor, base: Operation) -> Tensor:
        return entries(x, base, self.index, self.d.flatten())
