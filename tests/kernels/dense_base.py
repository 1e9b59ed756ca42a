"""A dense linear base without a model, and the bytes that autograd keeps: what the kernel tests build on."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from trimtab.core.site import Operation, Rows


class DenseBase(Operation):
    """``x W^T + bias`` with or without the dense matrix on show."""

    kind = "linear"

    def __init__(self, W: Tensor, bias: Tensor | None = None, *, show: bool = True):
        self.W, self._bias = W, bias
        self.out_features, self.in_features = W.shape
        self.dense = W if show else None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.W, self._bias)

    @property
    def weight(self) -> Tensor:
        return self.W

    @property
    def bias(self) -> Tensor | None:
        return self._bias

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight, self._bias)

    def project(self, x: Tensor, a: Tensor) -> Tensor:
        return F.linear(x, a)

    def emit(self, u: Tensor) -> Tensor:
        return u


class SlicedBase(DenseBase):
    """A base whose output is a view of a wider one, as the parts of a fused qkv give it."""

    def __init__(self, W: Tensor, rows: Rows):
        super().__init__(W, show=False)
        self.rows = rows

    def __call__(self, x: Tensor) -> Tensor:
        return self.rows.take(F.linear(x, self.W), -1)


def kept_bytes(run, *, without: tuple[Tensor, ...] = ()) -> int:
    """Bytes of the distinct storages that autograd saves while ``run()`` builds a graph, parameters left out."""
    skip = {t.untyped_storage().data_ptr() for t in without}
    seen: dict[int, int] = {}
    alive: list[Tensor] = []  # storages must not be freed and reused while they are counted

    def pack(t: Tensor) -> Tensor:
        key = t.untyped_storage().data_ptr()
        if key not in skip and not isinstance(t, torch.nn.Parameter):
            seen[key] = t.untyped_storage().nbytes()
            alive.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        alive.append(run())
    return sum(seen.values())
