"""Sites: where an adapter acts. A site is a tensor with a declared contraction, not a module.

A site hides how the base stores its weight. Methods see the interface of ``Operation``: an affine map with a matrix
``W`` of shape ``(out, in)``, whatever the module behind it is:

=============  ========================================  ==========================  =====================
kind           module                                    matrix (out, in)            input ``x``
=============  ========================================  ==========================  =====================
``linear``     Linear, transformers' Conv1D, quantised   weight (Conv1D: transposed) ``(..., in)``
``linear``     a row range of a fused qkv Linear         those rows                  ``(..., in)``
``conv``       Conv1d/2d/3d, one group                   (out, in_channels * k...)   ``(n, in_channels, ...)``
``grouped``    Conv1d/2d/3d, several groups              (out, in / groups * k...)   ``(n, in_channels, ...)``
``embedding``  Embedding                                 (dim, entries), transposed  indices ``(...)``
``bare``       any parameter, read inside its module     the last two axes           none: weight form only
``vector``     a 1-d parameter (bias, norm)              none                        none
``module``     a whole module                            none                        its arguments
=============  ========================================  ==========================  =====================
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.core.errors import Unsupported

__all__ = [
    "CHILD", "Cohort", "Operation", "Rows", "Site", "base_class", "dense", "gathered", "inside", "is_quantised", "register_storage",
]  # fmt: skip

#: name of the child module beneath an adapted module
CHILD = "trimtab"

# (test, dequantise) pairs for weights whose class does not offer ``dequantize()``; filled by trimtab.compat
_STORAGES: list[tuple[Callable[[Tensor], bool], Callable[[Tensor, nn.Module], Tensor]]] = []


def register_storage(test: Callable[[Tensor], bool], dequantise: Callable[[Tensor, nn.Module], Tensor]) -> None:
    """Teach sites to read a quantised storage: ``dequantise(t, module)`` gives the dense ``(out, in)`` if ``test(t)``."""
    _STORAGES.append((test, dequantise))


def _storage(tensor: Tensor) -> Callable[[Tensor, nn.Module], Tensor] | None:
    import trimtab.compat.quantised  # noqa: F401  registers what it knows; a plain weight never gets here

    return next((dequantise for test, dequantise in _STORAGES if test(tensor)), None)


def is_quantised(tensor: Tensor) -> bool:
    """Whether ``tensor`` stores something else than its own floating-point values."""
    if type(tensor) in (nn.Parameter, Tensor):
        return not tensor.is_floating_point()
    return _storage(tensor) is not None


def dense(tensor: Tensor, module: nn.Module) -> Tensor:
    """``tensor`` itself, or its dequantised values if it is a quantised storage of ``module``'s."""
    if not is_quantised(tensor):
        return tensor
    dequantise = _storage(tensor)
    if dequantise is None:
        raise Unsupported(f"a weight of dtype {tensor.dtype} and class {type(tensor).__name__} cannot be dequantised")
    return dequantise(tensor, module)


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor (a collective call: every process must come here), or ``tensor`` itself."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def base_class(module: nn.Module) -> type[nn.Module]:
    """The class that ``module`` had before anything was attached to it."""
    return getattr(type(module), "_trimtab_base", type(module))


def inside(module: nn.Module) -> nn.Module:
    """``module`` as its own forward sees it: its parameters are the base's, unless an adapter acts by substitution."""
    host = module._modules.get(CHILD)
    return module if host is None else host.inside(module)


@dataclass(frozen=True)
class Rows:
    """Rows of a fused matrix: ``blocks`` runs of ``size`` rows, ``stride`` apart, from row ``start`` on."""

    start: int
    size: int
    blocks: int = 1
    stride: int = 0

    @property
    def count(self) -> int:
        """Number of rows."""
        return self.size * self.blocks

    def take(self, tensor: Tensor, dim: int) -> Tensor:
        """These rows of ``tensor`` along ``dim``; a view if they are one run."""
        if self.blocks == 1:
            return tensor.narrow(dim, self.start, self.size)
        return tensor.index_select(dim, self.index(tensor.device))

    def put(self, tensor: Tensor, dim: int, part: Tensor) -> Tensor:
        """``tensor`` with these rows along ``dim`` replaced by ``part``; ``tensor`` itself is left alone."""
        part = part.to(tensor.dtype)
        if self.blocks == 1:
            return tensor.slice_scatter(part, dim, self.start, self.start + self.size)
        return tensor.index_copy(dim, self.index(tensor.device), part)

    def index(self, device: torch.device) -> Tensor:
        """Row numbers, shape ``(count,)``."""
        runs = torch.arange(self.blocks, device=device) * self.stride + self.start
        return (runs[:, None] + torch.arange(self.size, device=device)[None, :]).reshape(-1)


@dataclass(eq=False)
class Cohort:
    """The sites that one ``attach`` gives to one method, so that they can share tensors (VeRA's projections)."""

    sites: list[Site] = field(default_factory=list)
    shared: dict[Any, Tensor] = field(default_factory=dict)

    def share(self, key: Any, make: Callable[[], Tensor]) -> Tensor:
        """The tensor stored under ``key``, made by ``make()`` at the first call."""
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]

    def __deepcopy__(self, memo: dict) -> Cohort:
        return Cohort()  # the shared tensors live on in the adapters' buffers; the list is needed while attaching alone


class Operation:
    """An affine map with a matrix ``W`` (out, in): the base of a method's forward, adapted by others before it or not."""

    kind: str
    out_features: int
    in_features: int
    #: whether a fast form may run: not where the operation itself does more with its matrix than multiply (an embedding's max_norm)
    multiplies: bool = True
    #: the dense, unquantised ``(out, in)`` matrix that a fused kernel may use directly, or None
    dense: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """The operation's output on ``x``, bias included."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The dense matrix, shape ``(out, in)``."""
        raise NotImplementedError

    @property
    def bias(self) -> Tensor | None:
        """The bias, shape ``(out,)``, or None."""
        raise NotImplementedError

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        """The same operation, same bias, with another dense matrix ``weight`` of shape ``(out, in)``."""
        raise NotImplementedError

    def rebiased(self, y: Tensor, bias: Tensor | None) -> Tensor:
        """An output ``y`` of ``apply`` with the operation's own bias replaced by ``bias`` (out,)."""
        old = self.bias
        if bias is None:
            return y if old is None else self.rebiased(y, torch.zeros_like(old))
        shift = bias if old is None else bias - old
        return y + self.emit(shift.to(y.dtype).view(*(1,) * (y.dim() - 1), -1))

    def matmul(self, x: Tensor) -> Tensor:
        """``x W^T`` without the bias; linear kinds only: ``(..., in) -> (..., out)``."""
        y = self(x)
        return y if self.bias is None else y - self.bias

    def project(self, x: Tensor, a: Tensor) -> Tensor:
        """The operation with a thin matrix ``a`` (r, in) and no bias: ``x -> (..., r)``, features last."""
        raise NotImplementedError

    def stilled(self, x: Tensor, y: Tensor) -> Tensor:
        """An output ``y`` of a fast form without the gradients that the operation keeps from its matrix."""
        return y

    def emit(self, u: Tensor) -> Tensor:
        """Bring an output with its features last, ``(..., out)``, into the operation's own layout."""
        raise NotImplementedError


@dataclass(eq=False)
class Site(Operation):
    """A place in a model. Subclasses, one a kind, are in ``trimtab.core.kinds``.

    Attributes:
        module: the module that holds the tensor; it stays the base's own.
        path: its dotted path in the model.
        tensor: the parameter's name in the module; ``""`` for a whole module.
        shape: ``(out, in)`` for matrices, ``(experts, out, in)`` for banks, the tensor's shape otherwise.
        part: ``q``, ``k`` or ``v`` where the site is a row range of a fused matrix.
        role: what the anatomy calls it, such as ``attn.q``; None if unknown.
        block: index of the block that it stands in; None outside the blocks.
        device, dtype: the base weight's.
        adapter_dtype: dtype in which the adapter's parameters are stored.
        gradient: dL/dW (or its squares) summed over batches, ``(out, in)``, only while a method that asks for it is being started.
        activation: root mean squares of the inputs (in,) and the outputs (out,) over tokens, likewise.
        head_size: channels of an attention head of its block, where that is known.
        vocabulary: ``ids (p,) -> (p, width)``, what enters the first block for the model's own tokens, and their number; only
            while a method that starts from them is being started.
        layer: tells methods apart that may stand at one place under one name; ``Adapter.layer`` of its method.
        stored: shapes of the tensors saved for this place, by name, only while a load rebuilds its adapter: for sizes
            that the data chose, and not the config.
        source: another module whose first input an activation adapter reads here, and its path; None: the module's own input.
        clause: the clause of ``targets`` that named it at attach; None where the method's default did, and after a load.
    """

    module: nn.Module
    path: str
    tensor: str
    shape: tuple[int, ...]
    part: str | None = None
    rows: Rows | None = None
    role: str | None = None
    block: int | None = None
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype = torch.float32
    cohort: Cohort = field(default_factory=Cohort)
    gradient: Tensor | None = None
    activation: tuple[Tensor, Tensor] | None = None
    head_size: int | None = None
    vocabulary: tuple[Callable[[Tensor], Tensor], int] | None = None
    layer: str = ""
    stored: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    source: nn.Module | None = None
    source_path: str | None = None
    clause: str | None = None
    kind = "?"
    #: sites of these kinds act by replacing the tensor that the module reads, not by the module's forward
    substitutes = False

    @property
    def slot(self) -> str:
        """Name of the site beneath its module: the tensor, the part of it, and the layer."""
        return "_".join(filter(None, (self.tensor or "module", self.part, self.layer)))

    @property
    def name(self) -> str:
        """Path, tensor and part, as messages and tables show it."""
        tail = f".{self.tensor}" if self.tensor not in ("", "weight") else ""
        return self.path + tail + (f"[{self.part}]" if self.part else "")

    @property
    def out_features(self) -> int:  # type: ignore[override]
        """Rows of the matrix."""
        return self.shape[-2]

    @property
    def in_features(self) -> int:  # type: ignore[override]
        """Columns of the matrix."""
        return self.shape[-1]

    @property
    def carries_bias(self) -> bool:
        """Whether the module's forward adds a bias if there is one: it has a place for it, empty or not."""
        if self.bias_name == "bias":
            return "bias" in self.module._parameters
        return self.module._parameters.get(self.bias_name) is not None

    @property
    def bias_name(self) -> str:
        """The name of the bias that belongs to the tensor."""
        return "in_proj_bias" if self.tensor == "in_proj_weight" else "bias"

    @property
    def has_rows_of_bias(self) -> bool:
        """Whether a bank has biases, (experts, out), beside it."""
        return self.module._parameters.get(f"{self.tensor}_bias") is not None

    @property
    def is_meta(self) -> bool:
        """Whether the site has shapes only (dry run, planning, loading)."""
        return self.device.type == "meta"

    def shapes_only(self) -> Site:
        """The same site on the meta device: adapters built on it have shapes and no values."""
        twin = copy.copy(self)
        twin.device = torch.device("meta")
        return twin

    def parameter(self) -> Tensor:
        """The base's own parameter, as it is stored."""
        return self.module._parameters[self.tensor]  # type: ignore[return-value]

    def dequantize(self) -> Tensor:
        """The dense base matrix ``(out, in)``, detached from no graph; the storage itself if it is dense already."""
        return self.weight


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x weight^T + bias`` in ``x``'s dtype unless autocast decides otherwise."""
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight, bias)
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
