"""A weight stored as a sketch: a tensor of shape (out, in) that holds packed codes and a table of values, and looks itself up.

``W[o, g s + j] = table[o, g, code[o, g, j]]`` (kernels/codes.py has the layout of the codes). To modules and sites it is a
quantised weight: ``F.linear``, transformers' Conv1D (whose weight is stored (in, out)) and ``F.embedding`` run on the codes, a run
of rows at a time; everything else sees the dense values. It never learns itself: ``tt.SketchTune`` learns the table, other methods
stand beside it as beside any quantised weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from trimtab.core.errors import ShapeMismatch
from trimtab.core.merging import REQUANTISERS
from trimtab.core.site import register_storage
from trimtab.kernels.codes import gather, pack, unpack
from trimtab.kernels.kmeans import assign
from trimtab.kernels.sketch import dense_weight, sketched

__all__ = ["SketchedWeight", "dense_"]

aten = torch.ops.aten


class SketchedWeight(Tensor):
    """A frozen weight (out, in) as packed codes and a table.

    Args:
        codes: (out, groups, s * bits / 8) uint8.
        table: (out, groups, 2^bits), in the dtype that the weight reads as.
        transposed: the module stores its weight as (in, out), and so does this; codes and table stay by outputs.

    Attributes:
        sketch_codes, sketch_table: the two.
        bits: of a code.

    Raises:
        ShapeMismatch: the two do not belong together.
    """

    sketch_codes: Tensor
    sketch_table: Tensor
    transposed: bool

    @staticmethod
    def __new__(cls, codes: Tensor, table: Tensor, *, transposed: bool = False) -> SketchedWeight:
        bits = table.shape[-1].bit_length() - 1
        if codes.dtype != torch.uint8 or table.dim() != 3 or codes.shape[:-1] != table.shape[:-1] or 1 << bits != table.shape[-1]:
            raise ShapeMismatch(
                "a sketch is codes (out, groups, bytes) uint8 and a table (out, groups, 2^bits); found "
                f"{tuple(codes.shape)} {codes.dtype} and {tuple(table.shape)}"
            )
        if codes.shape[-1] * 8 % bits:
            raise ShapeMismatch(f"{codes.shape[-1]} bytes a group end inside a code of {bits} bits")
        shape = table.shape[0], table.shape[1] * (codes.shape[-1] * 8 // bits)
        shape = shape[::-1] if transposed else shape
        return Tensor._make_wrapper_subclass(cls, shape, dtype=table.dtype, device=table.device, requires_grad=False)

    def __init__(self, codes: Tensor, table: Tensor, *, transposed: bool = False):
        self.sketch_codes, self.sketch_table, self.transposed = codes, table.detach(), transposed
        self.bits = table.shape[-1].bit_length() - 1

    def dequantize(self) -> Tensor:
        """The dense weight, (out, in), or (in, out) where it is stored so."""
        W = dense_weight(self.sketch_table, self.sketch_codes, self.bits)
        return W.t() if self.transposed else W

    def with_table(self, table: Tensor) -> SketchedWeight:
        """The same codes with another table, cast to this one's dtype."""
        return self.made_of(self.sketch_codes, table.to(self.sketch_table.dtype))

    def made_of(self, codes: Tensor, table: Tensor) -> SketchedWeight:
        """Another sketch, stored the way that this one is."""
        return type(self)(codes, table, transposed=self.transposed)

    def __repr__(self) -> str:  # type: ignore[override]
        groups, shape = self.sketch_table.shape[1], tuple(self.shape)
        return f"SketchedWeight(shape={shape}, bits={self.bits}, groups={groups}, dtype={self.dtype}, device={self.device})"

    def __tensor_flatten__(self) -> tuple[list[str], bool]:
        return ["sketch_codes", "sketch_table"], self.transposed

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], transposed: bool, size: Any, stride: Any) -> SketchedWeight:
        return SketchedWeight(inner["sketch_codes"], inner["sketch_table"], transposed=transposed)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return _revive, (self.sketch_codes, self.sketch_table, self.transposed, isinstance(self, nn.Parameter))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        on_codes = _ON_CODES.get(func)
        if on_codes is not None:
            found = on_codes(*args, **(kwargs or {}))
            if found is not None:
                return found
        with torch._C.DisableTorchFunctionSubclass():  # Tensor's own would turn every result into this class
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        change = _CHANGES.get(func)
        if change is not None:
            return change(*args, **kwargs)
        written = (s.alias_info is not None and s.alias_info.is_write for s in func._schema.arguments)
        if any(isinstance(value, cls) and write for value, write in zip(args, written, strict=False)):
            raise ShapeMismatch('a sketched weight cannot be written; replace the parameter, or merge into="dequantised"')
        args, kwargs = tree_map_only(cls, lambda w: w.dequantize(), (args, kwargs))
        return func(*args, **kwargs)


def _linear(x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """``F.linear`` on codes; None where the weight is another argument."""
    if isinstance(W, SketchedWeight) and not W.transposed and not isinstance(x, SketchedWeight):
        return sketched(x, W.sketch_table, W.sketch_codes, W.bits, bias)
    return None


def _addmm(bias: Tensor, x: Tensor, W: Tensor, **scales: Any) -> Tensor | None:
    """``bias + x W`` with W (in, out): what Conv1D calls."""
    if isinstance(W, SketchedWeight) and W.transposed and not scales and bias.dim() == 1:
        return sketched(x, W.sketch_table, W.sketch_codes, W.bits, bias)
    return None


def _embedding(index: Tensor, W: Tensor, padding_idx: int | None = None, max_norm: float | None = None, *_: Any, **__: Any):
    """Looked-up rows (..., width), read from their codes alone."""
    if not isinstance(W, SketchedWeight) or W.transposed or max_norm is not None:
        return None
    flat = index.reshape(-1)
    rows = gather(W.sketch_table[flat], W.sketch_codes[flat], W.bits)
    return rows.view(*index.shape, W.shape[1])


_ON_CODES = {F.linear: _linear, torch.addmm: _addmm, F.embedding: _embedding}


def _copied(W: SketchedWeight, *, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> SketchedWeight:
    """``.to``: codes go to the device, the table to the dtype as well."""
    return W.made_of(W.sketch_codes.to(device=device, copy=True), W.sketch_table.to(device=device, dtype=dtype, copy=True))


def _same(W: SketchedWeight, *_: Any, **__: Any) -> SketchedWeight:
    return W.made_of(W.sketch_codes, W.sketch_table)


_CHANGES = {
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten.clone.default: lambda W, **_: W.made_of(W.sketch_codes.clone(), W.sketch_table.clone()),
    aten._to_copy.default: _copied,
}


def _revive(codes: Tensor, table: Tensor, transposed: bool, parameter: bool) -> Tensor:
    W = SketchedWeight(codes, table, transposed=transposed)
    return nn.Parameter(W, requires_grad=False) if parameter else W


def _again(weight: Tensor, old: SketchedWeight) -> nn.Parameter:
    """``weight``, stored as ``old`` is, as a sketch: exact with the old codes where they fit, else by nearest values."""
    codes = unpack(old.sketch_codes, old.bits).long()
    values = (weight.t() if old.transposed else weight).detach().reshape(codes.shape)
    table = old.sketch_table.scatter_reduce(-1, codes, values.to(old.dtype), "amax", include_self=False)
    kept = old.with_table(table)
    if torch.equal(kept.dequantize(), weight.to(old.dtype)):
        return nn.Parameter(kept, requires_grad=False)
    order = old.sketch_table.sort(-1).values
    rows = order.view(-1, order.shape[-1])
    nearest = assign(values.reshape(len(rows), -1).to(rows.dtype), rows).view(codes.shape)
    return nn.Parameter(old.made_of(pack(nearest, old.bits), order), requires_grad=False)


def dense_(model: nn.Module) -> nn.Module:
    """Replace every sketched weight of ``model`` by its dense values, exactly; ties stay ties. Returns ``model``."""
    done: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, value in module._parameters.items():
            if isinstance(value, SketchedWeight):
                if id(value) not in done:
                    done[id(value)] = nn.Parameter(value.dequantize().contiguous(), requires_grad=False)
                module._parameters[name] = done[id(value)]
    return model


def _is_sketch(tensor: Tensor) -> bool:
    return isinstance(tensor, SketchedWeight)


register_storage(_is_sketch, lambda tensor, module: tensor.dequantize())
REQUANTISERS.append((_is_sketch, _again))
