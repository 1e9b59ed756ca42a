"""Fresh heads: layers that adapters bring along whole and that their base has no values for, so that no change can be measured."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.artifacts.base import Base
from trimtab.artifacts.saved import Saved
from trimtab.artifacts.updates import Place
from trimtab.core.checkpoint import MANIFEST, read_manifest
from trimtab.core.errors import NotMergeable, ShapeMismatch, Unsupported, nearest

__all__ = ["HEADS", "check_heads", "check_sizes", "common_notes", "head_value", "is_fresh"]

HEADS = ("average", "first", "drop")
_WAYS = 'heads="first" takes the first adapter\'s, heads="drop" leaves it out'


def check_heads(heads: str) -> None:
    """Refuse a word that says nothing about heads."""
    if heads not in HEADS:
        raise Unsupported(f"heads must be one of {', '.join(HEADS)}, found {heads!r}{nearest(str(heads), HEADS)}")


def check_sizes(adapters: Sequence[str | os.PathLike], heads: str) -> None:
    """Refuse adapters that put heads of different sizes at one place of a base: its modules have room for one.

    Raises:
        NotMergeable: with what can be done.
    """
    found: dict[tuple[str, str], tuple[Path, tuple[int, ...]]] = {}
    for path in map(Path, adapters):
        places = read_manifest(path)["places"] if (path / MANIFEST).is_file() else []
        for place in places:
            if place.get("role") != "head":
                continue
            first, shape = found.setdefault((place["path"], place["tensor"]), (path, tuple(place["shape"])))
            if shape != tuple(place["shape"]):
                way = (
                    _WAYS
                    if heads == "average"
                    else "tt.combine them first without a base (trimtab merge without --base), then merge"
                )
                where, other = place["path"], tuple(place["shape"])
                raise NotMergeable(f"{first} and {path} have heads for different labels at {where}: {shape} and {other}; {way}")


def is_fresh(place: Place, base: Base | None) -> bool:
    """Whether the values at a place of whole values are no change of the base's: a head, or a tensor that the base does not have.

    Asked only where the base has no values there, or is not given.
    """
    return base is not None or place.site.role == "head"


def head_value(place: Place, values: Sequence[Tensor], weights: Sequence[float], heads: str) -> tuple[Tensor | None, list[float]]:
    """The value of a fresh head, None where it is left out, and the factors of ``values`` that it was made with.

    Args:
        values: of the adapters that have the head, in the order of ``place.effects``.
        weights: of all adapters.

    Raises:
        ShapeMismatch: an average of heads of different shapes. NotMergeable: of negative shares.
    """
    if heads == "drop":
        return None, []
    mine = [weights[number] for number, _ in place.effects]
    if heads == "first":
        factors = [1.0, *[0.0] * (len(values) - 1)]
    else:
        if len({tuple(v.shape) for v in values}) > 1:
            shapes = " and ".join(str(tuple(v.shape)) for v in values)
            raise ShapeMismatch(f"{place.name} is a head of its own in each adapter, {shapes}, which have no average; {_WAYS}")
        total = sum(mine)
        whole = len(mine) == len(weights) and abs(total - 1) < 1e-9
        if not whole and (min(mine) < 0 or total <= 0):
            raise NotMergeable(
                f"{place.name} is a head that the base has no values for, and of the weights {mine} there is no average; {_WAYS}"
            )
        factors = [w / total for w in mine]
    dtype = torch.promote_types(values[0].dtype, torch.float32)
    merged = values[0].to(dtype)  # an average of equal heads gives the very head
    for factor, value in zip(factors[1:], values[1:], strict=True):
        merged = merged + factor * (value.to(dtype) - values[0].to(dtype)) if factor else merged
    return merged, factors


def common_notes(opened: Sequence[Saved], heads: str) -> dict[str, Any]:
    """What the adapters remember of their model, as one.

    Raises:
        NotMergeable: an average of heads for different labels.
    """
    found = [saved for saved in opened if saved.notes]
    if not found or heads == "drop":
        return {}
    first = found[0].notes
    for saved in found[1:] if heads == "average" else ():
        for key in ("labels", "pooling"):
            ours, theirs = first.get(key), saved.notes.get(key)
            if ours is not None and theirs is not None and ours != theirs:
                raise NotMergeable(
                    f"the heads of {found[0].source} and {saved.source} are for different {key} ({_short(ours)} and "
                    f"{_short(theirs)}), and have no average; {_WAYS}"
                )
    return first


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) < 60 else f"{text[:60]} ..."
