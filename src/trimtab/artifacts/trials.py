"""Trying settings of a compression on data: the adapter stays attached, and only its values change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.artifacts.fitting import Losses, fit, spread
from trimtab.core.activation import activate
from trimtab.core.attach import detach
from trimtab.core.checkpoint import load
from trimtab.core.state import state_of, unwrap

__all__ = ["Choice", "alone", "choose"]


@contextmanager
def alone(model: nn.Module, folder: Path) -> Iterator[dict[str, Tensor]]:
    """The adapter in ``folder`` acting alone on ``model``, as its live tensors by saved name; then the model as it was."""
    root = unwrap(model)
    before = state_of(root).active if "_trimtab_state" in root.__dict__ else ()
    name = load(root, folder, name=f"trial of {folder.name}", active=False)
    activate(root, name)
    try:
        yield {
            f"{adapter.site.path}.{adapter.site.slot}.{key}": value
            for adapter in state_of(root).groups[name].adapters
            for key, value in adapter.state_dict(keep_vars=True).items()
        }
    finally:
        if before:
            activate(root, *before)
        detach(root, name)


@dataclass
class Choice:
    """The setting that was taken, and how it came about.

    Attributes:
        density, alpha: of the file.
        factors: by key, where scales were fitted.
        trials: a row for each setting that was tried.
    """

    density: float
    alpha: float | None
    factors: dict[str, Tensor] = field(default_factory=dict)
    trials: list[dict[str, Any]] = field(default_factory=list)


def choose(
    folder: Path, ranked: Any, densities: Sequence[float], alphas: Sequence[float | None], *, model: nn.Module,
    score: Callable[[nn.Module], float] | None, losses: Losses | None, tolerance: float | None,
) -> Choice:  # fmt: skip
    """The density and alpha to use, and the fitted factors.

    Densities are tried from the smallest on, every alpha with each, until one loses at most ``tolerance`` against the adapter
    as it is; without a tolerance all are tried, and the best score is taken. Without a score there is one setting, to be fitted.
    """
    with alone(model, folder) as live:
        if score is None:
            return Choice(densities[0], alphas[0], _put(ranked, densities[0], alphas[0], live, model, losses))
        original = float(score(model))
        rows: list[dict[str, Any]] = [{"density": None, "alpha": None, "score": original}]
        found: list[tuple[float, Choice]] = []
        for k in sorted(densities):
            for alpha in alphas:
                factors = _put(ranked, k, alpha, live, model, losses)
                reached = float(score(model))
                rows.append({"density": k, "alpha": alpha, "score": reached})
                found.append((reached, Choice(k, alpha, factors, rows)))
            best = max((pair for pair in found if pair[1].density == k), key=lambda pair: pair[0])
            if tolerance is not None and best[0] >= original - tolerance:
                return best[1]
    return max(found, key=lambda pair: pair[0])[1]


def _put(
    ranked: Any, k: float, alpha: float | None, live: dict[str, Tensor], model: nn.Module, losses: Losses | None
) -> dict[str, Tensor]:
    """Give the live adapter the values of a setting; the factors, if they were fitted."""
    source, scales = ranked.source, ranked.scales(k, alpha)
    entries = [replace(entry, scale=scales[ranked.group(entry)]) for entry in source.ternary]
    signs = {entry.key: ranked.signs(entry, update, k) for entry, update in source.updates()}
    if losses is not None:
        return fit(entries, signs, source.start, live, model, losses)
    with torch.no_grad():
        for entry in entries:
            value, start = spread(entry, None, signs[entry.key]), source.start(entry.key)
            value = value if start is None else value + start.float().reshape(-1)
            live[entry.key].copy_(value.reshape(entry.shape))
    return {}
