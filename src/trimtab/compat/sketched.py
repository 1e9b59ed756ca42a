"""A weight stored as a sketch: a tensor of shape (out, in) that holds packed codes and a table of values, and looks itself up.

``W[o, g s + j] = table[o, g, code[o, g, j]]`` (kernels/codes.py has the layout of the codes). To modules and sites it is a
quantised weight: ``F.linear`` runs on the codes, a run of rows at a time; everything else sees the dense values. It never learns
itself: ``tt.SketchTune`` learns the table, other methods stand beside it as beside any quantised weight.
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
from trimtab.kernels.codes import pack, unpack
from trimtab.kernels.kmeans import assign
from trimtab.kernels.sketch import dense_weight, sketched

__all__ = ["SketchedWeight"]

aten = torch.ops.aten


class SketchedWeight(Tensor):
    """A frozen weight (out, in) as packed codes and a table.

    Args:
        codes: (out, groups, s * bits / 8) uint8.
        table: (out, groups, 2^bits), in the dtype that the weight reads as.

    Attributes:
        sketch_codes, sketch_table: the two.
        bits: of a code.

    Raises:
        ShapeMismatch: the two do not belong together.
    """

    sketch_codes: Tensor
    sketch_table: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, table: Tensor) -> SketchedWeight:
        bits = table.shape[-1].bit_length() - 1
        if codes.dtype != torch.uint8 or table.dim() != 3 or codes.shape[:-1] != table.shape[:-1] or 1 << bits != table.shape[-1]:
            raise ShapeMismatch(
                "a sketch is codes (out, groups, bytes) uint8 and a table (out, groups, 2^bits); found "
                f"{tuple(codes.shape)} {codes.dtype} and {tuple(table.shape)}"
            )
        if codes.shape[-1] * 8 % bits:
            raise ShapeMismatch(f"{codes.shape[-1]} bytes a group end inside a code of {bits} bits")
        shape = table.shape[0], table.shape[1] * (codes.shape[-1] * 8 // bits)
        return Tensor._make_wrapper_subclass(cls, shape, dtype=table.dtype, device=table.device, requires_grad=False)

    def __init__(self, codes: Tensor, table: Tensor):
        self.sketch_codes, self.sketch_table = codes, table.detach()
        self.bits = table.shape[-1].bit_length() - 1

    def dequantize(self) -> Tensor:
        """The dense weight (out, in)."""
        return dense_weight(self.sketch_table, self.sketch_codes, self.bits)

    def with_table(self, table: Tensor) -> SketchedWeight:
        """The same codes with another table, cast to this one's dtype."""
        return type(self)(self.sketch_codes, table.to(self.sketch_table.dtype))

    def __repr__(self) -> str:  # type: ignore[override]
        groups, shape = self.sketch_table.shape[1], tuple(self.shape)
        return f"SketchedWeight(shape={shape}, bits={self.bits}, groups={groups}, dtype={self.dtype}, device={self.device})"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["sketch_codes", "sketch_table"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: None, size: Any, stride: Any) -> SketchedWeight:
        return SketchedWeight(inner["sketch_codes"], inner["sketch_table"])

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return _revive, (self.sketch_codes, self.sketch_table, isinstance(self, nn.Parameter))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.linear and len(args) >= 2 and isinstance(args[1], SketchedWeight):
            x, W, bias = args[0], args[1], args[2] if len(args) > 2 else (kwargs or {}).get("bias")
            return sketched(x, W.sketch_table, W.sketch_codes, W.bits, bias)
        with torch._C.DisableTorchFunctionSubclass():  # Tensor's own would turn every result into this class
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        change = _CHANGES.get(func)
        if change is not None:
            return change(*args, **kwargs)
        if func in (aten.copy_.default, aten.set_.source_Tensor) and isinstance(args[0], cls):
            raise ShapeMismatch('a sketched weight cannot be written; replace the parameter, or merge into="dequantised"')
        args, kwargs = tree_map_only(cls, lambda w: w.dequantize(), (args, kwargs))
        return func(*args, **kwargs)


def _copied(W: SketchedWeight, *, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> SketchedWeight:
    """``.to``: codes go to the device, the table to the dtype as well."""
    return SketchedWeight(W.sketch_codes.to(device=device, copy=True), W.sketch_table.to(device=device, dtype=dtype, copy=True))


def _same(W: SketchedWeight, *_: Any, **__: Any) -> SketchedWeight:
    return SketchedWeight(W.sketch_codes, W.sketch_table)


_CHANGES = {
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten.clone.default: lambda W, **_: SketchedWeight(W.sketch_codes.clone(), W.sketch_table.clone()),
    aten._to_copy.default: _copied,
}


def _revive(codes: Tensor, table: Tensor, parameter: bool) -> Tensor:
    W = SketchedWeight(codes, table)
    return nn.Parameter(W, requires_grad=False) if parameter else W


def _again(weight: Tensor, old: SketchedWeight) -> nn.Parameter:
    """``weight`` (out, in) as a sketch: exact with the old codes where they fit (a learned table), else by nearest values."""
    codes = unpack(old.sketch_codes, old.bits).long()
    values = weight.detach().reshape(codes.shape)
    table = old.sketch_table.scatter_reduce(-1, codes, values.to(old.dtype), "amax", include_self=False)
    kept = old.with_table(table)
    if torch.equal(kept.dequantize(), weight.to(old.dtype)):
        return nn.Parameter(kept, requires_grad=False)
    order = old.sketch_table.sort(-1).values
    rows = order.view(-1, order.shape[-1])
    nearest = assign(values.reshape(len(rows), -1).to(rows.dtype), rows).view(codes.shape)
    return nn.Parameter(SketchedWeight(pack(nearest, old.bits), order), requires_grad=False)


def _is_sketch(tensor: Tensor) -> bool:
    return isinstance(tensor, SketchedWeight)


register_storage(_is_sketch, lambda tensor, module: tensor.dequantize())
REQUANTISERS.append((_is_sketch, _again))
