"""project: a saved adapter moved to a base of equal shape without data, by the subspaces of that base's weights.

At every place ``D' = U U^T D V V^T``: D (out, in) is the update, U (out, k) and V (in, k) the target weight's first k singular
vectors. What of the update lies in directions that the target does not use is dropped. A base line for ``transfer``, which trains:
it can help where both bases have a common origin, and hardly where they have not. Source: arXiv 2501.16559, Sec. 4.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.artifacts.base import Base, sample_of
from trimtab.artifacts.combine import check_size, merge_all, open_base
from trimtab.artifacts.heads import check_heads, common_notes
from trimtab.artifacts.rules import rule_entry
from trimtab.artifacts.saved import open_saved
from trimtab.artifacts.updates import reference
from trimtab.artifacts.writing import as_low_rank, write_adapters
from trimtab.core.checkpoint import find_module
from trimtab.core.contracts import Adapter, Selection
from trimtab.core.errors import NoMatch, NotMergeable, ShapeMismatch, TrimtabError, Unsupported, raise_all
from trimtab.core.folders import apart
from trimtab.core.site import Site
from trimtab.core.table import Table
from trimtab.kernels.thin import Thin, norm

__all__ = ["project"]


def project(
    adapter: str | os.PathLike,
    out: str | os.PathLike,
    *,
    target: str | os.PathLike | nn.Module,
    source: str | os.PathLike | nn.Module | None = None,
    energy: float = 0.99,
    rank: int | None = None,
    max_error: float | None = None,
    name: str | None = None,
    heads: str = "average",
) -> Table:
    """Write the adapter at ``adapter`` as a LoRA for ``target``, projected onto the subspaces of its weights.

    Args:
        target: the new base, a folder or a module, with the same places of the same shapes.
        source: the old base; needed where an update depends on its weights, as DoRA's or OFT's.
        energy: k is the smallest number of singular values with at least this share of the sum of their squares; 1: all.
        rank, max_error: of the LoRA, where the update is dense; see ``tt.convert``.
        name: of the new adapter; None: the old one's.
        heads: what becomes of a head that the adapter brings along whole: it is kept as it is (``"average"`` and ``"first"``), or
            left out (``"drop"``).

    Returns:
        A row a place: k, and ``kept``, the share of the update that is left, ``||D'|| / ||D||``.

    Raises:
        NoMatch, ShapeMismatch: the target lacks a place, or has it in another shape; all of them together.
        Unsupported: an update of something that is no matrix, or one that depends on ``source``. NotMergeable: ``out`` exists.
    """
    out = apart(out, [adapter, target, source])
    if out.exists():
        raise NotMergeable(f"{out} exists already; choose another folder for the projected adapter")
    if not 0 < energy <= 1:
        raise ShapeMismatch(f"energy is a share above 0 and at most 1; found {energy!r}")
    check_size(rank, max_error)
    check_heads(heads)
    before, after = open_base(source, [adapter]), open_base(target, [adapter])
    saved = open_saved(adapter, before)
    adapters, _ = merge_all([saved], [1.0], rule_entry("linear"), {}, before, rank=rank, max_error=max_error, seed=0, heads=heads)
    report = Table(("path", "shape", "k", "kept"), title=f"{saved.group.name} projected, energy {energy:g}")
    report.notes = [f"{each.site.name} is a head, kept as it is" for each in adapters if isinstance(each, Selection)]
    moved, problems = [], []
    for each in adapters:
        try:
            head = each.site.role == "head" and isinstance(each, Selection)
            moved.append(_kept(each, after, report) if head else _moved(each, after, energy, report))
        except TrimtabError as error:
            problems.append(error)
    raise_all(problems)
    made: dict[str, Any] = {"by": "project", "energy": energy, "source": Path(saved.source).name, "mark": saved.mark}
    made["kept"] = {row["path"]: row["kept"] for row in report}
    base = sample_of(after, moved)
    write_adapters(moved, out, name=name or saved.group.name, base=base, model=after, made=made, notes=common_notes([saved], heads))
    return report


def _moved(adapter: Adapter, target: Base, energy: float, report: Table) -> Adapter:
    """A LoRA of ``adapter``'s update in the target's subspaces."""
    site = adapter.site
    factors = adapter.factors()
    if factors is None:
        raise Unsupported(
            f"{site.name} is stored as its values; a projection is defined for updates of matrices alone, and only a head is kept "
            'as it is (heads="first") or left out (heads="drop")'
        )
    update = Thin(*(factor.double() for factor in factors))
    U, V = subspaces(_weight(site, target), energy)
    thin = Thin(U @ (U.mT @ update.b), (update.a @ V) @ V.mT)
    size = norm(update)
    report.add(site.name, "x".join(map(str, site.shape)), U.shape[-1], norm(thin) / size if size else 1.0)
    return as_low_rank(site, thin)


def _kept(adapter: Adapter, target: Base, report: Table) -> Adapter:
    """A head as it is.

    Raises:
        ShapeMismatch: the target has one there of another shape.
    """
    site, root = adapter.site, target.root
    there = root.get_submodule(site.path)._parameters.get(site.tensor) if site.path in dict(root.named_modules()) else None
    if there is not None and tuple(there.shape) != tuple(site.parameter().shape):
        raise ShapeMismatch(
            f"{site.name} is a head of shape {tuple(site.parameter().shape)}, and the target's is {tuple(there.shape)}; "
            'heads="drop" leaves it out'
        )
    report.add(site.name, "x".join(map(str, site.shape)), "", 1.0)
    return adapter


def _weight(site: Site, target: Base) -> Tensor:
    parameter = find_module(target.root, site.path)._parameters.get(site.tensor)
    if parameter is None:
        raise NoMatch(f"the target has no {site.path}.{site.tensor}; a projection needs the same places on both bases")
    there, here = tuple(parameter.shape), tuple(site.parameter().shape)
    if there != here and site.rows is None:  # of a fused layer the adapter may know its rows alone
        raise ShapeMismatch(
            f"{site.path}.{site.tensor} is {there} in the target and {here} in the adapter's base; a projection needs equal ones, "
            "tt.transfer does not"
        )
    return reference(site, target, torch.float64)


def subspaces(W: Tensor, energy: float) -> tuple[Tensor, Tensor]:
    """Leading singular vectors of W (..., out, in) that hold ``energy``: (..., out, k), (..., in, k); k is the batch's largest."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    shares = S.square().cumsum(-1)
    k = int((shares < energy * shares[..., -1:]).sum(-1).max()) + 1 if energy < 1 else S.shape[-1]
    return U[..., :k], Vh[..., :k, :].mT
