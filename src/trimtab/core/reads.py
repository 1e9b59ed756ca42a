"""What ``module.weight`` reads as past the module's own forward: the adapted value.

A parent may compute with its child's parameter and never call the child (``F.linear(x, self.out_proj.weight)``), or a loss may,
outside of every forward. The value would have to be made for every read, while most reads only ask for a dtype, compare shapes or
start the values anew. So a read gives an ``Adapted``: a tensor without storage that says of itself what the base's parameter would,
makes the adapted value, with its graph, where something computes with it, and hands what writes to it on to the base's parameter.

There is no way around it: a custom autograd function sees a tensor that needs a gradient, and gives it back to the factors; an
operation written in C++ meets ``__torch_dispatch__``.
"""

from __future__ import annotations

import copy
import operator
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils._pytree import tree_map

from trimtab.core.acts import Effect, value_of
from trimtab.core.errors import Unsupported
from trimtab.core.noting import note
from trimtab.core.site import is_quantised

if TYPE_CHECKING:
    from trimtab.core.contracts import Adapter
    from trimtab.core.host import Host
    from trimtab.core.scope import Factor

__all__ = ["Adapted", "Reading", "shown"]


class Reading:
    """One read of a parameter: whose, and what acted on it then.

    Attributes:
        stored: the base's parameter; None: a bias of a module that has none.
        chains: what acts on it.
        factor: of ``tt.scaled``.
        refusal: why there is no such value; None: there is one.
        host: beneath the module.
    """

    def __init__(
        self, host: Host, stored: Tensor | None, chains: list[list[Effect]], factor: Factor | None, refusal: str | None
    ):
        self.host, self.stored, self.chains, self.factor, self.refusal = host, stored, chains, factor, refusal
        #: what a gradient goes to, of the read that was given out
        self.leaves: list[Tensor] = []

    def same(self, other: Reading, leaves: list[Tensor]) -> bool:
        """Whether ``other``, with these leaves, is a read of the same."""
        mine = (self.stored, self.factor, *self.adapters(), *self.leaves)
        theirs = (other.stored, other.factor, *other.adapters(), *leaves)
        return self.refusal == other.refusal and len(mine) == len(theirs) and all(map(operator.is_, mine, theirs))

    def value(self) -> Tensor:
        """The adapted value, with its graph if gradients are on."""
        if self.refusal is not None:
            raise Unsupported(self.refusal)
        note(self.host)
        return value_of(self.chains, self.stored, self.factor)

    def adapters(self) -> list[Adapter]:
        """Whose effects the chains are."""
        return [getattr(each, "adapter", each) for chain in self.chains for each in chain]

    def learning(self) -> list[Tensor]:
        """What a gradient of the value goes to."""
        found = {id(p): p for adapter in self.adapters() for p in adapter.parameters() if p.requires_grad}
        if self.stored is not None and self.stored.requires_grad:
            found[id(self.stored)] = self.stored
        return list(found.values())


def shown(reading: Reading, given: dict[str, Tensor], tensor: str) -> Tensor:
    """What a read gives: an ``Adapted`` where one can stand for the parameter, else the value itself.

    Args:
        given: what earlier reads were given, by the parameter's name: the same object again while nothing has changed.
    """
    stored = reading.stored
    plain = type(stored) in (nn.Parameter, Tensor)
    if stored is not None and not plain:
        if is_quantised(stored):
            if not stored.is_floating_point():
                return stored  # packed: nothing but its own module's forward can compute with it
            plain = True
        elif sys._getframe(3).f_globals.get("__name__", "").startswith("torch.distributed."):
            return stored  # torch's sharding looks after what stands there
    if not plain or torch._C._are_functorch_transforms_active():
        return reading.value()
    learning = reading.learning() if torch.is_grad_enabled() and reading.refusal is None else []
    before = given.get(tensor)
    if before is not None and _alike(before, stored) and before._trimtab_reading.same(reading, learning):
        return before
    reading.leaves = learning
    given[tensor] = _Lazy.apply(reading, *learning) if learning else Adapted(reading)
    return given[tensor]


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device


class _Lazy(torch.autograd.Function):
    """An ``Adapted`` in the graph: its gradient is passed on through the value, which is made again for it."""

    @staticmethod
    def forward(ctx: Any, reading: Reading, *learning: Tensor) -> Tensor:
        ctx.reading, ctx.learning = reading, learning
        return Adapted(reading)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            value = ctx.reading.value()
            found = torch.autograd.grad(value, ctx.learning, gradient, allow_unused=True, create_graph=torch.is_grad_enabled())
        return None, *found


def _methods(names: str, attributes: str = "") -> set[Any]:
    """Methods of a tensor and getters of its attributes, as ``__torch_function__`` is told of them; those that this torch has."""
    found = {getattr(Tensor, name, None) for name in names.split()}
    return found | {getattr(getattr(Tensor, name, None), "__get__", None) for name in attributes.split()} - {None}


#: what the stand-in itself answers: a shape, a dtype, a device
_TOLD = {torch.is_floating_point, torch.is_complex, torch.numel} | _methods(
    "size dim numel ndimension nelement element_size is_floating_point is_complex get_device __len__",
    "requires_grad is_leaf shape dtype device ndim layout itemsize nbytes is_cuda is_cpu is_meta is_sparse is_quantized is_mps",
)
#: what the base's parameter answers, or keeps
_ASKED = _methods(
    "register_hook retain_grad register_post_accumulate_grad_hook is_shared is_pinned"
    " new_empty new_zeros new_ones new_full new_tensor new_empty_strided",
    "grad grad_fn _version _backward_hooks",
) | {torch.empty_like, torch.zeros_like, torch.ones_like, torch.full_like, torch.rand_like, torch.randn_like}
#: what of further arguments only shapes, dtypes and devices are asked of
_LIKE = _methods("to type_as view_as expand_as reshape_as")
#: another one without a graph, whose writes still reach the base
_DETACHED = {torch.detach} | _methods("detach", "data")
_INPLACE = {
    "__set__", "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__idiv__", "__ifloordiv__", "__imod__",
    "__ipow__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__",
}  # fmt: skip


class Adapted(Tensor):
    """The adapted value of a parameter, not made yet. ``isinstance(..., nn.Parameter)`` holds, as for the base's own."""

    _is_param = True
    _trimtab_reading: Reading

    @staticmethod
    def __new__(cls, reading: Reading) -> Adapted:
        like = reading.stored
        self = Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=like.device, layout=like.layout)
        self._trimtab_reading = reading
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_trimtab_reading"].stored, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_trimtab_reading" or hasattr(Tensor, name):
            super().__setattr__(name, value)
        else:  # a mark on the parameter
            setattr(self._trimtab_reading.stored, name, value)

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: Sequence[Any] = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, cls):
            reading = first._trimtab_reading
            if func in _TOLD:
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
            if func in _DETACHED:
                return Adapted(reading)
            if func is Tensor.__deepcopy__:
                return copy.deepcopy(reading.value().detach(), *args[1:])
            if func in _ASKED or _writes(func):
                return func(reading.stored, *tree_map(_made, tuple(args[1:])), **tree_map(_made, kwargs))
        elif func in _LIKE:
            return func(*tree_map(_stored, tuple(args)), **tree_map(_stored, kwargs))
        written = "out" if "out" in kwargs else "tensor" if _writes(func) else ""  # torch.nn.init names what it fills
        if isinstance(kwargs.get(written), cls):
            kwargs = {**kwargs, written: kwargs[written]._trimtab_reading.stored}
        return func(*tree_map(_made, tuple(args)), **tree_map(_made, kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict | None = None) -> Any:
        first = args[0] if args else None
        if isinstance(first, cls):
            if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
                return Adapted(first._trimtab_reading)
            if func._schema.is_mutable:
                args = (first._trimtab_reading.stored, *args[1:])
        return func(*tree_map(_made, tuple(args)), **tree_map(_made, kwargs or {}))


def _writes(func: Callable) -> bool:
    """Whether ``func`` writes to its first argument."""
    name = getattr(func, "__name__", "")
    return name in _INPLACE or (name.endswith("_") and not name.endswith("__"))


def _stored(value: Any) -> Any:
    return value._trimtab_reading.stored if isinstance(value, Adapted) else value


def _made(value: Any) -> Any:
    return value._trimtab_reading.value() if isinstance(value, Adapted) else value


def _own(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
    """A tie (``head.weight = embedding.weight``) ties to the base's parameter, not to what it reads as."""
    return parameter._trimtab_reading.stored if isinstance(parameter, Adapted) else None


register_module_parameter_registration_hook(_own)
