"""Exact accounts of a piece of work: bytes that autograd keeps for backward, and floating-point operations.

Both work on real tensors and on the meta device, where they cost no memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

__all__ = ["LiveBytes", "Saved", "count_flops", "saved_bytes", "stored_bytes"]


def _as_registered(count: Callable[..., int]) -> Callable[..., int]:
    """A count of torch's own table under another operation; it takes tensors, not shapes, already."""

    def flops(*args, **kwargs) -> int:
        return count(*args, **kwargs)

    flops._get_raw = True
    return flops


# in-place products, which torch's own table leaves out
_IN_PLACE = {
    torch.ops.aten.addmm_: _as_registered(flop_registry[torch.ops.aten.addmm]),
    torch.ops.aten.baddbmm_: _as_registered(flop_registry[torch.ops.aten.baddbmm]),
}


@dataclass
class Saved:
    """What was kept for backward.

    Attributes:
        tensors: storage identity -> (bytes, shape, dtype) of the first tensor packed from it.
    """

    tensors: dict[int, tuple[int, tuple[int, ...], torch.dtype]] = field(default_factory=dict)
    #: every packed tensor, held so that a freed storage's identity is not given to another
    held: list[Tensor] = field(default_factory=list, repr=False)

    @property
    def total(self) -> int:
        """Bytes of all distinct storages."""
        return sum(size for size, _, _ in self.tensors.values())

    def by_shape(self) -> Counter:
        """(shape, dtype) -> bytes."""
        counts: Counter = Counter()
        for size, shape, dtype in self.tensors.values():
            counts[shape, dtype] += size
        return counts


def storages(module: nn.Module) -> set[int]:
    """Identities of the storages of a module's parameters and buffers; of a wrapper's (a quantised weight) those inside it."""
    tensors = [part for tensor in (*module.parameters(), *module.buffers()) for part in _parts(tensor)]
    return {tensor.untyped_storage()._cdata for tensor in tensors if _plain(tensor)}


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that a wrapper is made of, or ``tensor`` itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _parts(getattr(tensor, name))


def _plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter, nn.Buffer)


def stored_bytes(tensor: Tensor) -> int:
    """Bytes that ``tensor`` takes: of the tensors that it is made of where it is a wrapper (a quantised weight)."""
    return sum(part.numel() * part.element_size() for part in _parts(tensor))


@contextmanager
def saved_bytes(*modules: nn.Module, beside: tuple[Tensor, ...] = ()) -> Iterator[Saved]:
    """Collect what the work inside the block keeps for backward.

    Distinct storages are counted once, whole, since a view keeps all of its storage. Parameters and buffers of ``modules``
    and the tensors ``beside`` (an input that exists anyway) are not counted, nor are storages of tensor subclasses
    (quantised weights).
    """
    saved = Saved()
    skip = {identity for module in modules for identity in storages(module)}
    skip |= {tensor.untyped_storage()._cdata for tensor in beside}

    def pack(tensor: Tensor) -> Tensor:
        if _plain(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in skip and storage._cdata not in saved.tensors:
                saved.tensors[storage._cdata] = (storage.nbytes(), tuple(tensor.shape), tensor.dtype)
                saved.held.append(tensor)
        # detached: an operation that keeps its own output would otherwise hold itself alive, through C++
        return tensor.detach()

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield saved
    finally:
        # the graph keeps the hook, the hook keeps this record: holding the graph's tensors on would be a cycle that
        # passes through C++, where Python's collector cannot see it
        saved.held.clear()


@contextmanager
def count_flops() -> Iterator[FlopCounterMode]:
    """Count the operations inside the block, two a multiply-add; ``counter.get_total_flops()`` afterwards."""
    with FlopCounterMode(display=False, custom_mapping=_IN_PLACE) as counter:
        yield counter


class LiveBytes(TorchDispatchMode):
    """Peak of the bytes of tensors that are alive at once and were made inside the block; forward and backward.

    Deterministic, since it counts storages and not pages; works on the meta device. What stood before the block is not
    counted, and neither is an operation's own scratch memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.level = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        leaves = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.layout == torch.strided)
        before = {leaf.untyped_storage()._cdata for leaf in leaves}
        result = func(*args, **(kwargs or {}))
        for identity, (reference, size) in list(self.live.items()):
            if reference.expired():
                del self.live[identity]
                self.level -= size
        for leaf in tree_leaves(result):
            # a sparse tensor has no storage of its own: its parts were made by operations that this saw
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided and _plain(leaf):
                storage = leaf.untyped_storage()
                if storage._cdata not in before and storage._cdata not in self.live:
                    self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                    self.level += storage.nbytes()
        self.peak = max(self.peak, self.level)
        return result
