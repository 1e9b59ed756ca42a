"""``resize_token_embeddings`` of a transformers model with adapters on it: it sees the base's own weights, and the adapters follow.

Resizing reads a table's weight past its module's forward and writes a new one from what it read, which must not hold an update.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from trimtab.core.errors import NotMergeable
from trimtab.core.state import ATTRIBUTE, state_of

__all__ = ["RESIZE", "hook", "unhook"]

RESIZE = "resize_token_embeddings"


def hook(root: nn.Module) -> None:
    """From now on, resizing ``root``, or a model in it, is followed at once."""
    for module in root.modules():
        if callable(getattr(type(module), RESIZE, None)) and RESIZE not in module.__dict__:
            module.__dict__[RESIZE] = functools.partial(_resize, root, module)


def unhook(root: nn.Module) -> None:
    """Take ``hook`` back."""
    for module in root.modules():
        found = module.__dict__.get(RESIZE)
        if isinstance(found, functools.partial) and found.func is _resize:
            del module.__dict__[RESIZE]


def _resize(root: nn.Module, module: nn.Module, *args: Any, **options: Any) -> Any:
    """transformers' own, on the base alone."""
    own = getattr(type(module), RESIZE)
    if ATTRIBUTE not in root.__dict__:
        return own(module, *args, **options)
    from trimtab.core.activation import disabled

    merged = [group.name for group in state_of(root).groups.values() if group.merged]
    if merged:
        raise NotMergeable(f"{merged[0]!r} is merged into the weights; tt.unmerge it before the vocabulary is resized")
    with disabled(root):
        found = own(module, *args, **options)
    state_of(root)
    return found
