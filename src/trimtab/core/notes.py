"""What a saved adapter remembers of its model besides weights, so that a merge can write a model that computes the same.

The manifest's entry ``model``: ``labels`` (names of the classes, in order) and ``pad_token_id`` of a model whose head the adapter
replaces, and what the model's own ``saved_notes`` says, such as how a classifier pools its tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from trimtab.core.contracts import Adapter, Selection

__all__ = ["notes_of"]


def notes_of(root: nn.Module, adapters: Iterable[Adapter]) -> dict[str, Any]:
    """``{"model": {...}}`` for a manifest, or nothing where there is nothing to remember."""
    notes = dict(getattr(root, "saved_notes", None) or {})
    config = getattr(root, "config", None)
    names = getattr(config, "id2label", None)
    whole = [a for a in adapters if isinstance(a, Selection) and tuple(a.value.shape) == tuple(a.site.shape)]
    heads = [a for a in whole if a.site.tensor == "weight" and len(a.site.shape) == 2]
    if isinstance(names, dict) and any(a.site.shape[0] == len(names) for a in heads):
        labels = [str(names[key]) for key in sorted(names, key=int)]
        if labels != [f"LABEL_{i}" for i in range(len(labels))]:
            notes["labels"] = labels
        if isinstance(getattr(config, "pad_token_id", None), int):
            notes["pad_token_id"] = config.pad_token_id
    return {"model": notes} if notes else {}
