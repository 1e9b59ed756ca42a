"""What is missing from a base whose units were cut out: kept on the root module, and written into every adapter saved from it.

An adapter that was trained on a cut base fits that base alone, so its manifest has the entry ``cut``: for each layer that reads
units, how many there were, and which are left, as a bit mask in hexadecimal. ``trimtab.schedules.surgery`` cuts and restores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.errors import CheckpointMismatch, Unsupported
from trimtab.core.site import Rows

__all__ = ["Cut", "Kept", "Slice", "by_units", "check", "cut_of", "entry", "packed", "refuse", "unpacked"]

ATTRIBUTE = "_trimtab_cut"
#: kind of unit -> path of the layer that reads the units -> (how many there were, which are left, ascending, (kept,))
Kept = Mapping[str, Mapping[str, tuple[int, Tensor]]]


@dataclass(frozen=True, eq=False)
class Slice:
    """What is left of one module.

    Attributes:
        path: of the module.
        side: ``"out"`` or ``"in"``.
        index: rows or columns of its matrix (out, in) that are left, ascending.
    """

    path: str
    side: str
    index: Tensor

    def local(self, rows: Rows | None) -> Tensor:
        """The index counted within ``rows`` of a fused matrix; the index itself for a whole one."""
        if rows is None:
            return self.index
        return torch.isin(rows.index(torch.device("cpu")), self.index).nonzero().flatten()


def by_units(index: Tensor, size: int) -> Tensor:
    """The index of whole units of ``size`` neighbours, counted in units."""
    return index[::size] // size


@dataclass(eq=False)
class Cut:
    """A cut base.

    Attributes:
        kept: what is left of it.
        slices: the cut modules, by path.
        parameters: ``(path, module, tensor, the uncut parameter)``; None where it was dropped.
        numbers: ``(module, attribute, value before)``.
    """

    kept: Kept
    slices: dict[str, Slice]
    parameters: list[tuple[str, nn.Module, str, nn.Parameter | None]] = field(default_factory=list)
    numbers: list[tuple[nn.Module, str, int]] = field(default_factory=list)


def cut_of(root: nn.Module) -> Cut | None:
    """What was cut out of the base, if anything was."""
    return root.__dict__.get(ATTRIBUTE)


def packed(kept: Kept) -> dict[str, dict[str, list]]:
    """As the manifest stores it: kind -> path -> ``[count, hexadecimal mask]``, the first unit in the lowest bit."""
    return {
        kind: {path: [count, format(sum(1 << i for i in index.tolist()), "x")] for path, (count, index) in places.items()}
        for kind, places in kept.items()
    }


def unpacked(stored: Mapping[str, Mapping[str, list]]) -> Kept:
    """Inverse of ``packed``."""
    found: dict[str, dict[str, tuple[int, Tensor]]] = {}
    for kind, places in stored.items():
        for path, (count, mask) in places.items():
            bits = int(mask, 16)
            if bits >> count:
                raise CheckpointMismatch(f"{path} has {count} {kind}, and the mask of those that are left has more")
            index = torch.tensor([i for i in range(bits.bit_length()) if bits >> i & 1], dtype=torch.long)
            found.setdefault(kind, {})[path] = (count, index)
    return found


def entry(root: nn.Module) -> dict[str, Any]:
    """What the manifest of an adapter on ``root`` says of the base: ``{"cut": ...}``, or nothing of a whole one."""
    cut = cut_of(root)
    return {} if cut is None else {"cut": packed(cut.kept)}


def refuse(root: nn.Module, what: str) -> None:
    """Raise ``Unsupported`` if units were cut out of the base, since ``what`` cannot say so."""
    if cut_of(root) is not None:
        raise Unsupported(
            f"units were cut out of this base, which {what} cannot say; "
            "trimtab.schedules.restoration.restore(model) puts the adapter on the whole base, with masks"
        )


def check(root: nn.Module, manifest: Mapping[str, Any], source: str) -> None:
    """Confirm that the base is cut as it was when the adapter was saved.

    Raises:
        CheckpointMismatch: it is not.
    """
    ours, theirs = manifest.get("cut"), entry(root).get("cut")
    if ours == theirs:
        return
    if ours is None:
        raise CheckpointMismatch(
            f"{source} was made for the whole base, and units were cut out of this model; "
            "trimtab.schedules.restoration.restore(model) puts them back"
        )
    raise CheckpointMismatch(
        f"{source} was made for a base of which units were cut out"
        + (", others than from this model" if theirs else "")
        + '; trimtab.schedules.restoration.load(model, path, mode="index") cuts an uncut base likewise, mode="mask" leaves it whole'
    )
