"""Slices (S2FT) as finished things: taken from weights that were tuned in place, and several fused into one."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from trimtab.core.attach import mount_group
from trimtab.core.errors import CheckpointMismatch, NotMergeable, ShapeMismatch, raise_all
from trimtab.core.state import adapter_group, state_of, unwrap
from trimtab.methods.reparameterized.s2ft import S2FTAdapter

__all__ = ["adopt", "fuse"]


def _slices(model: nn.Module, name: str) -> list[S2FTAdapter]:
    group = adapter_group(state_of(model), name)
    others = sorted({type(a.config).__name__ for a in group.adapters if not isinstance(a, S2FTAdapter)})
    if others:
        raise NotMergeable(f"{name!r} has {', '.join(others)} in it, which are no slices; only S2FT adapters are taken here")
    return group.adapters


@torch.no_grad()
def fuse(model: nn.Module, names: Sequence[str], *, into: str, weights: Sequence[float] | None = None) -> None:
    """One adapter that does what ``names`` do together: ``W + sum_i weights_i D_i``, at the union of their slices.

    Slices that share no entry never interact. The new adapter is attached, does not learn and does not act; the others stay.

    Args:
        into: name of the new adapter.
        weights: one for each of ``names``; None: 1.

    Raises:
        NotMergeable: an adapter is no S2FT, or two have their slices on different sides of one matrix.
        ShapeMismatch: fewer than two names, one of them twice, ``into`` is taken, or the number of weights is not theirs.
    """
    state = state_of(model)
    weights = [1.0] * len(names) if weights is None else list(weights)
    if len(set(names)) < max(2, len(names)) or into in state.groups or len(weights) != len(names):
        raise ShapeMismatch(
            f"fuse takes two or more different names, as many weights, and a new name; found {list(names)}, {weights}, {into!r}"
        )
    places: dict[tuple[str, str], list[tuple[float, S2FTAdapter]]] = {}
    for name, weight in zip(names, weights, strict=True):
        for adapter in _slices(model, name):
            places.setdefault((adapter.site.path, adapter.site.slot), []).append((weight, adapter))
    mixed = [found[0][1].site.name for found in places.values() if len({a.inputs for _, a in found}) > 1]
    if mixed:
        raise NotMergeable(
            f"slices along the inputs and along the outputs of {', '.join(mixed)} are no one slice; merge them in turn"
        )
    mount_group(unwrap(model), into, [_fused(found) for found in places.values()], trainable=False)


def _fused(found: list[tuple[float, S2FTAdapter]]) -> S2FTAdapter:
    """One adapter at the union of the indices of adapters at one place."""
    first = found[0][1]
    index = torch.cat([a.index for _, a in found]).unique()
    site = copy.copy(first.site)
    site.stored = {"index": tuple(index.shape)}
    fused = S2FTAdapter(first.config, site, rng=torch.Generator())
    site.stored = {}
    fused.index.copy_(index)
    for weight, adapter in found:
        if adapter.d is not None:
            fused.d.index_add_(0, torch.searchsorted(index, adapter.index), (weight * adapter.d).to(fused.d.dtype))
    return fused


@torch.no_grad()
def adopt(model: nn.Module, tuned: Mapping[str, Tensor], *, name: str = "default") -> None:
    """Give the adapter ``name`` the update of weights that were tuned in place: ``D = W_tuned - W`` on its slices.

    Args:
        tuned: a state dict of the base's, such as another framework's in-place training left it.

    Raises:
        CheckpointMismatch: a weight is missing, or differs from the base outside the adapter's slice, which would be lost.
        NotMergeable: the adapter is no S2FT.
    """
    adapters, problems = _slices(model, name), []
    updates: list[Tensor] = []
    for adapter in adapters:
        site = adapter.site
        key = f"{site.path}.{site.tensor}"
        if key not in tuned or tuned[key].shape != site.parameter().shape:
            found = "none" if key not in tuned else f"one of {tuple(tuned[key].shape)}"
            problems.append(CheckpointMismatch(f"the tuned weights need a {key} of {tuple(site.parameter().shape)}, found {found}"))
            continue
        new, old = (site.take(site.matrix(t)).to(adapter.site.adapter_dtype) for t in (tuned[key], site.parameter()))
        update = (new - old).t() if adapter.inputs else new - old
        outside = update.clone()
        outside[adapter.index.long()] = 0
        if outside.any():
            rows, what = int(outside.any(1).sum()), "inputs" if adapter.inputs else "outputs"
            problems.append(CheckpointMismatch(f"{key} differs from the base in {rows} {what} outside the slice of {name!r}"))
        updates.append(update[adapter.index.long()])
    raise_all(problems)
    for adapter, update in zip(adapters, updates, strict=True):
        if adapter.d is not None:
            adapter.d.copy_(update)
