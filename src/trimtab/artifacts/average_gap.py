"""How far the update of averaged parameters is from the average of the updates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.artifacts.starts import shells
from trimtab.core.checkpoint import fill, rebuild
from trimtab.core.contracts import Adapter, Reparameterization, Selection
from trimtab.core.errors import Unsupported
from trimtab.core.state import unwrap

__all__ = ["gap"]


@torch.no_grad()
def gap(
    manifest: Mapping[str, Any], tensors: Sequence[Mapping[str, Tensor]], weights: Sequence[float], mean: Mapping[str, Tensor],
    model: nn.Module | None,
) -> float | None:  # fmt: skip
    """``|sum_i w_i D_i - D| / |sum_i w_i D_i|``, Frobenius over all places, D the update of the averaged parameters.

    Factors are compared through their Gram matrices, so that no (out, in) matrix is made of them. Places that learn whole
    (selections) are left out: their average is exact.

    Returns:
        None where a place's update cannot be had: it acts on activations, or depends on the base, which is not there.
    """
    groups = [_filled(manifest, values, model) for values in (*tensors, mean)]
    if any(group is None for group in groups):
        return None
    signed = [*weights, -1.0]
    off = size = 0.0
    for effects in zip(*groups, strict=True):
        if isinstance(effects[0], Selection):
            continue
        square = _square(effects, signed)
        if square is None:
            return None
        off, size = off + square[0], size + square[1]
    return math.sqrt(max(0.0, off) / size) if size > 0 else 0.0


def _filled(manifest: Mapping[str, Any], values: Mapping[str, Tensor], model: nn.Module | None) -> list[Adapter] | None:
    try:
        adapters = shells(manifest) if model is None else rebuild(unwrap(model), dict(manifest))
    except Unsupported:
        return None  # a method that looks at its base's module, and there is no base
    for adapter in adapters:
        adapter.site.device = torch.device("cpu") if model is None else adapter.site.device
    fill(adapters, dict(values), manifest["name"])
    return [adapter.eval() for adapter in adapters]


def _square(effects: Sequence[Adapter], signed: Sequence[float]) -> tuple[float, float] | None:
    """Squared norms at one place: of the gap, and of the averaged update. The last effect is that of the averaged parameters."""
    if not isinstance(effects[0], Reparameterization):
        return None
    factors = [effect.factors() for effect in effects]
    if all(pair is not None for pair in factors):
        b = [weight * pair[0].double() for weight, pair in zip(signed, factors, strict=True)]
        a = [pair[1].double() for pair in factors]
        return _thin(b, a), _thin(b[:-1], a[:-1])
    dense = [_dense(effect) for effect in effects]
    if any(update is None for update in dense):
        return None
    total = sum(weight * update for weight, update in zip(signed[:-1], dense[:-1], strict=True))
    return float((total - dense[-1]).square().sum()), float(total.square().sum())


def _thin(b: Sequence[Tensor], a: Sequence[Tensor]) -> float:
    """``|sum_i b_i a_i|^2`` from (R, R) matrices."""
    left, right = torch.cat(list(b), -1), torch.cat(list(a), -2)
    return float(((left.mT @ left) * (right @ right.mT)).sum())


def _dense(effect: Adapter) -> Tensor | None:
    site = effect.site
    try:
        W = torch.zeros(site.shape) if effect.additive else site.weight.detach().float()
        return effect.weight(W).double() - W.double()
    except Unsupported:
        return None  # the base's weights are needed, and there is no base
