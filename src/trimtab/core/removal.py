"""detach, and what takes adapters off."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from trimtab.core.contracts import Adapter
from trimtab.core.errors import Unsupported
from trimtab.core.guard import release
from trimtab.core.host import escape
from trimtab.core.mounting import dismount, retire
from trimtab.core.state import adapter_group, dependants, drop_state, host, state_of, unwrap

__all__ = ["detach", "remove_adapters", "remove_group"]


def detach(model: nn.Module, name: str) -> None:
    """Take the adapter ``name`` off; with the last one the model is exactly as it was before the first attach.

    Raises:
        NoMatch: no such adapter.
        Unsupported: it is merged (its update stands in the weights: unmerge first, or keep the merged weights with
            ``tt.merge(model, name, permanent=True)``); or another adapter needs it.
    """
    root = unwrap(model)
    state = state_of(root, changed=True)
    group = adapter_group(state, name)
    if group.merged:
        raise Unsupported(f"the adapter {name!r} is merged into the base; tt.unmerge(model, {name!r}) before detaching it")
    if others := dependants(state, name):
        raise Unsupported(f"the adapter {others[0]!r} needs {name!r}; tt.detach(model, {others[0]!r}) first")
    remove_group(root, name)


def remove_group(root: nn.Module, name: str) -> None:
    """Take a group off without looking at whether it is merged."""
    state = state_of(root, changed=True)
    state.groups.pop(name)
    state.active = tuple(other for other in state.active if other != name)
    for path, module in list(state.hosts.items()):
        dismount(module, name)
        if "trimtab" not in module._modules:
            del state.hosts[path]
    state.refresh()
    if not state.groups:
        for module, tensor in state.thawed:
            if module._parameters.get(tensor) is not None:
                module._parameters[tensor].requires_grad_(True)
        drop_state(root)
        release(root)


def remove_adapters(root: nn.Module, name: str, gone: Collection[Adapter]) -> None:
    """Take some of the adapters called ``name`` off; at least one stays."""
    state = state_of(root)
    group = state.groups[name]
    group.adapters = [adapter for adapter in group.adapters if adapter not in gone]
    for adapter in gone:
        named = host(adapter.site.module)._modules
        slots = named[escape(name)]._modules
        del slots[adapter.site.slot]
        if not slots:
            del named[escape(name)]
    for path, module in list(state.hosts.items()):
        retire(module, name, gone)
        if "trimtab" not in module._modules:
            del state.hosts[path]
    state.refresh()
