"""A model of shapes alone: the modules that a saved adapter names, without values, so that it can be read without its base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from trimtab.core.site import Rows

__all__ = ["skeleton"]


class _Norm(nn.Module):
    """Holds parameters without a contraction."""


def skeleton(places: Iterable[Mapping[str, Any]], class_name: str = "Model") -> nn.Module:
    """A module tree on the meta device in which every place of a manifest exists with its shape and kind.

    A place of a fused matrix has as many rows as the rows it takes need; the true number is known to the base alone.

    Args:
        places: entries as in a manifest: ``path``, ``tensor``, ``kind``, ``shape``, and ``rows`` of fused ones.
        class_name: the name of the root's class.
    """
    root = type(class_name, (nn.Module,), {"__module__": __name__})()
    found: dict[str, list[Mapping[str, Any]]] = {}
    for place in places:
        found.setdefault(place["path"], []).append(place)
    for path in sorted(found, key=lambda path: path.count(".")):  # a module before what is below it
        parent, _, name = path.rpartition(".")
        _container(root, parent)._modules[name] = _leaf(found[path])
    return root


def _container(root: nn.Module, path: str) -> nn.Module:
    for name in filter(None, path.split(".")):
        root = root._modules.setdefault(name, nn.Module())
    return root


def _leaf(places: list[Mapping[str, Any]]) -> nn.Module:
    """A module with the parameters that one path's places name."""
    shapes: dict[str, list[int]] = {}
    for place in places:
        if place["tensor"]:
            shape = list(place["shape"])
            if "rows" in place:
                rows = Rows(*place["rows"])
                axis = 0 if len(shape) == 1 else len(shape) - 2
                shape[axis] = rows.start + (rows.blocks - 1) * rows.stride + rows.size
            known = shapes.setdefault(place["tensor"], shape)
            known[:] = [max(pair) for pair in zip(known, shape, strict=True)]
    kinds = {place["tensor"]: place["kind"] for place in places}
    module = _typed(kinds.get("weight"), shapes.get("weight"))
    for tensor, shape in shapes.items():
        if tensor == "weight" and type(module) not in (nn.Module, _Norm):
            continue
        module.register_parameter(tensor, nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False))
    if "" in kinds:  # a place on activations: its sizes are the module's
        module.out_features, module.in_features = next(p["shape"] for p in places if not p["tensor"])
    return module


def _typed(kind: str | None, shape: list[int] | None) -> nn.Module:
    """The module whose ``weight`` is a site of that kind and contraction shape."""
    if kind == "linear":
        return nn.Linear(shape[1], shape[0], bias=False, device="meta")
    if kind == "embedding":
        return nn.Embedding(shape[1], shape[0], device="meta")
    if kind in ("conv", "grouped"):  # the kernel's own shape is not known; the matrix's is
        groups = 1 if kind == "conv" else next((g for g in range(2, shape[0] + 1) if shape[0] % g == 0), 1)
        return nn.Conv1d(shape[1] * groups, shape[0], 1, groups=groups, bias=False, device="meta")
    return nn.Module() if kind in (None, "bare") else _Norm()
