"""A slice of a frozen matrix that learns: some of its columns (inputs) or some of its rows (outputs), as Rules of ``beside``.

``Columns``: ``y = x W^T + x[:, index] d``, d (k, out): ``k`` columns of x are kept for backward, gathered into a tensor of their
own; a view would keep the whole of x. Only where x is kept by the attention before it anyway, x itself is the smaller choice
(``kept_anyway``). ``Rows``: ``y[:, index] += x d^T``, d (k, in): keeps x.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.kernels.beside import Rule

__all__ = ["Columns", "Rows", "kept_anyway", "picked"]

_VIEWS = ("ViewBackward", "UnsafeViewBackward", "ReshapeAliasBackward", "TransposeBackward", "PermuteBackward")


def kept_anyway(x: Tensor) -> bool:
    """Whether ``x`` is a view of a fused attention's output, which that operation keeps for its own backward.

    While compiling nothing is known of that, nor needed: the compiler decides what is kept.
    """
    if torch.compiler.is_compiling():
        return False
    node = x.grad_fn
    while node is not None and node.name().startswith(_VIEWS):
        node = node.next_functions[0][0]
    return node is not None and node.name().startswith("ScaledDotProduct")


class Columns(Rule):
    """``x[:, index] d``; the one parameter is ``d`` (k, out).

    Args:
        index: (k,), each once.
        whole: keep x instead of a copy of its columns.
    """

    def __init__(self, index: Tensor, *, whole: bool):
        self.index, self.whole = index, whole

    def map(self, x: Tensor, d: Tensor) -> Tensor:
        return x[..., self.index] @ d

    def keep(self, x: Tensor) -> Tensor | None:
        return None if self.whole else x.index_select(1, self.index)

    def add_(self, y: Tensor, x: Tensor, kept: Tensor | None, d: Tensor) -> None:
        y.addmm_(x.index_select(1, self.index) if kept is None else kept, d)

    def pull(self, dy: Tensor, x: Tensor, gx: Tensor | None, needs: Sequence[bool], d: Tensor) -> tuple[Tensor | None, ...]:
        if gx is not None:
            gx.index_add_(1, self.index, dy @ d.t())
        if not needs[0]:
            return (None,)
        return ((x.index_select(1, self.index) if self.whole else x).t() @ dy,)


class Rows(Rule):
    """``x d^T`` added to the outputs ``index``; the one parameter is ``d`` (k, in).

    Args:
        index: (k,), each once.
        out: number of outputs.
    """

    def __init__(self, index: Tensor, out: int):
        self.index, self.out = index, out

    def map(self, x: Tensor, d: Tensor) -> Tensor:
        thin = x @ d.t()
        return thin.new_zeros(*thin.shape[:-1], self.out).index_add(-1, self.index, thin)

    def add_(self, y: Tensor, x: Tensor, kept: Tensor | None, d: Tensor) -> None:
        y.index_add_(1, self.index, x @ d.t())

    def pull(self, dy: Tensor, x: Tensor, gx: Tensor | None, needs: Sequence[bool], d: Tensor) -> tuple[Tensor | None, ...]:
        dy = dy.index_select(1, self.index)
        if gx is not None:
            gx.addmm_(dy, d)
        return (dy.t() @ x if needs[0] else None,)


def picked(index: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """(k, width): row j is the unit vector of ``index[j]``."""
    return torch.zeros(len(index), width, dtype=dtype, device=index.device).scatter_(1, index.long()[:, None], 1)
