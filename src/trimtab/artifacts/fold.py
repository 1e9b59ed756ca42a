"""Fold: learned tokens without the networks that made them while they trained."""

from __future__ import annotations

import torch
from torch import nn

from trimtab.core.attach import mount_group, remove_group
from trimtab.core.bank import build_adapter
from trimtab.core.contracts import Adapter, TokenAdapter
from trimtab.core.errors import Unsupported
from trimtab.core.state import adapter_group, state_of, unwrap

__all__ = ["fold"]


def fold(model: nn.Module, name: str) -> None:
    """Replace the adapter ``name`` in place by a smaller one that acts the same: what only training needs is gone.

    A prefix with a ``hidden`` network becomes a plain one, P-tuning becomes prompt tuning. It can train on, from there.

    Raises:
        NoMatch: no such adapter. Unsupported: nothing of it can be folded.
    """
    root = unwrap(model)
    state = state_of(root)
    group = adapter_group(state, name)
    folded = [_folded(adapter) for adapter in group.adapters]
    if all(new is old for new, old in zip(folded, group.adapters, strict=True)):
        raise Unsupported(f"the adapter {name!r} has no part that only training needs; save it as it is")
    active = state.active
    remove_group(root, name)
    mount_group(root, name, folded, trainable=group.trainable, check_gradients=not group.checked)
    state = state_of(root)
    state.active = active
    state.refresh()


def _folded(adapter: Adapter) -> Adapter:
    """The adapter itself, or the smaller one."""
    with torch.no_grad():
        found = adapter.folded() if isinstance(adapter, TokenAdapter) else None
    if found is None:
        return adapter
    config, tensors = found
    site = adapter.site
    new = build_adapter(config, site.shapes_only(), torch.Generator())
    new.site = site
    # copies: keys and values may be views of one tensor
    new.load_state_dict({key: value.detach().clone() for key, value in tensors.items()}, strict=True, assign=True)
    return new
