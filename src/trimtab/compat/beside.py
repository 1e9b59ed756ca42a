"""``save_pretrained`` of a transformers model with adapters on it: they go into folders of their own beside the weights.

The weights' file holds the adapters' tensors too, so that a Trainer resumes from it; but ``from_pretrained`` knows no place for
them and opens the bare base. What is beside is read by ``tt.load(model, folder)``.
"""

from __future__ import annotations

import functools
import os
import warnings
from pathlib import Path
from typing import Any
from urllib.parse import quote

from torch import nn

from trimtab.core.adapter_folder import BESIDE
from trimtab.core.errors import TrimtabError
from trimtab.core.state import ATTRIBUTE, Group

__all__ = ["HOOKED", "hook", "save_pretrained", "unhook"]

HOOKED = "save_pretrained"


def hook(root: nn.Module) -> None:
    """Let ``root.save_pretrained`` save the adapters too, from now on; a module without it is left alone."""
    if callable(getattr(type(root), HOOKED, None)) and HOOKED not in root.__dict__:
        root.__dict__[HOOKED] = functools.partial(save_pretrained, root)


def unhook(root: nn.Module) -> None:
    """Take ``hook`` back."""
    found = root.__dict__.get(HOOKED)
    if isinstance(found, functools.partial) and found.func is save_pretrained:
        del root.__dict__[HOOKED]


def save_pretrained(model: nn.Module, save_directory: str | os.PathLike, *args: Any, **options: Any) -> Any:
    """transformers' own ``save_pretrained``, then every adapter that is not merged, and a warning that says how to open both."""
    found = getattr(type(model), HOOKED)(model, save_directory, *args, **options)
    state = model.__dict__.get(ATTRIBUTE)
    groups = [group for group in state.groups.values() if not group.merged] if state is not None else []
    if groups and (args[0] if args else options.get("is_main_process", True)):
        said = [_save(model, Path(save_directory), group) for group in groups]
        warnings.warn(
            f"{save_directory} holds the base and, beside it, {'; '.join(said)}. from_pretrained opens the bare base and calls the "
            f"adapters' tensors unexpected: then put them back with tt.load(model, {str(save_directory)!r})",
            stacklevel=2,
        )
    return found


def _save(model: nn.Module, folder: Path, group: Group) -> str:
    """Save one adapter; what became of it, in words."""
    from trimtab.core.checkpoint import save

    if any(hasattr(p, "full_tensor") for adapter in group.adapters for p in adapter.parameters()):
        return f"not the adapter {group.name!r}, whose tensors are shared out over processes: tt.save it on all of them"
    try:
        save(model, folder / BESIDE / quote(group.name, safe="").replace(".", "%2E"), name=group.name)
    except TrimtabError as error:
        return f"not the adapter {group.name!r}: {error}"
    return f"the adapter {group.name!r}"
