"""Trying settings of a compression on data: the adapter stays attached, and only its values change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.activation import activate
from trimtab.core.attach import detach
from trimtab.core.checkpoint import load
from trimtab.core.state import state_of, unwrap

__all__ = ["alone", "choose"]


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


@torch.no_grad()
def choose(
    folder: Path, ranked: Any, densities: Sequence[float], alphas: Sequence[float | None], *, model: nn.Module,
    score: Callable[[nn.Module], float], tolerance: float | None,
) -> tuple[float, float | None, list[dict[str, Any]]]:  # fmt: skip
    """The density and alpha to use, and a row for each trial.

    Densities are tried from the smallest on, every alpha with each, until one loses at most ``tolerance`` against the adapter
    as it is; without a tolerance all are tried, and the best score is taken.
    """
    source = ranked.source
    with alone(model, folder) as live:
        original = float(score(model))
        rows: list[dict[str, Any]] = [{"density": None, "alpha": None, "score": original}]
        for k in sorted(densities):
            signs = {entry.key: ranked.signs(entry, update, k) for entry, update in source.updates()}
            for alpha in alphas:
                scales = ranked.scales(k, alpha)
                for entry in source.ternary:
                    start = source.start(entry.key)
                    value = signs[entry.key] * scales[ranked.group(entry)]
                    value = value if start is None else value + start.float().reshape(-1)
                    live[entry.key].copy_(value.reshape(entry.shape))
                rows.append({"density": k, "alpha": alpha, "score": float(score(model))})
            best = max((row for row in rows[1:] if row["density"] == k), key=lambda row: row["score"])
            if tolerance is not None and best["score"] >= original - tolerance:
                return best["density"], best["alpha"], rows
    best = max(rows[1:], key=lambda row: row["score"])
    return best["density"], best["alpha"], rows
