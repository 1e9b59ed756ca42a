"""What trimtab knows of one model: which adapters are on it, where, and which of them act. Kept on the root module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from trimtab.core.contracts import Adapter
from trimtab.core.errors import NoMatch, Unsupported, nearest
from trimtab.core.host import CHILD, Host
from trimtab.core.scope import Owner, present
from trimtab.core.site import Site, gathered

__all__ = ["Group", "ModelState", "adapter_group", "state_of", "unwrap"]

ATTRIBUTE = "_trimtab_state"


@dataclass(eq=False)
class Group:
    """All adapters that carry one name.

    Attributes:
        name: the adapter's name.
        adapters: in model order.
        trainable: declared at attach or load; nothing else ever changes it.
        merged: whether its update is written into the base weights now.
        checked: whether the first optimizer step has confirmed the gradients (or need not).
    """

    name: str
    adapters: list[Adapter] = field(default_factory=list)
    trainable: bool = True
    merged: bool = False
    checked: bool = False


@dataclass(eq=False)
class ModelState:
    """Adapters of a model by name, the active ones in order, the hosts, and what to restore at the end."""

    groups: dict[str, Group] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    hosts: dict[str, nn.Module] = field(default_factory=dict)
    #: base parameters that learnt before the first adapter came: (module, parameter name)
    thawed: list[tuple[nn.Module, str]] = field(default_factory=list)
    #: adapter name -> what unmerge puts back: (module, parameter name, tensor, whether the parameter object was replaced)
    originals: dict[str, list[tuple[nn.Module, str, Tensor, bool]]] = field(default_factory=dict)
    #: the model as contexts know it
    owner: Owner = field(default_factory=Owner)
    #: adapter name -> the configs whose flag its merge turned off, since it cut a tie
    untied: dict[str, list[Any]] = field(default_factory=dict)

    def refresh(self) -> None:
        """Rewrite what acts at every host outside of contexts. Merged adapters act through the weights."""
        acting = self.unmerged(self.active)
        for module in self.hosts.values():
            host(module).owner = self.owner
            host(module).refresh(acting)

    def unmerged(self, names: Iterable[str]) -> tuple[str, ...]:
        """Those of ``names`` that act beside the weights."""
        return tuple(name for name in names if not self.groups[name].merged)

    def acting(self) -> tuple[str, ...] | None:
        """Names of the adapters that act here, in this context, in order; None: the rows of a batch have adapters of their own."""
        plan = present(self.owner)
        if plan is None or (plan.names is None and plan.routes is None):
            return self.active
        return plan.names


def host(module: nn.Module) -> Host:
    """The host beneath an adapted module."""
    return module._modules[CHILD]  # type: ignore[return-value]


def unwrap(model: nn.Module) -> nn.Module:
    """The module that carries the state: ``model`` itself or what DDP (``module``) or compile (``_orig_mod``) wraps."""
    inner = model
    while ATTRIBUTE not in inner.__dict__:
        wrapped = inner._modules.get("_orig_mod") or inner._modules.get("module")
        if wrapped is None:
            return model
        inner = wrapped
    return inner


def state_of(model: nn.Module, *, create: bool = False, changed: bool = False) -> ModelState:
    """The model's state, after a look at whether the adapters' places are still there (``core.changes``).

    Args:
        changed: leave that look out, for taking adapters off.

    Raises:
        Unsupported: nothing is attached to ``model`` and ``create`` is False; or it was changed in a way that no adapter follows.
    """
    root = unwrap(model)
    state = root.__dict__.get(ATTRIBUTE)
    if state is None:
        if not create:
            owner = [path for path, module in model.named_modules() if ATTRIBUTE in module.__dict__]
            hint = f"; the adapters are on its submodule {owner[0]!r}: pass that" if owner else "; call tt.attach first"
            raise Unsupported(f"no adapter is attached to this {type(model).__name__}{hint}")
        state = ModelState()
        root.__dict__[ATTRIBUTE] = state
        if hasattr(root, "save_pretrained"):
            from trimtab.compat import beside, resizing

            beside.hook(root)
            resizing.hook(root)
    elif not changed:
        from trimtab.core.changes import verify

        verify(root, state)
    return state


def drop_state(model: nn.Module) -> None:
    """Forget the state; the model is as it was before the first attach."""
    root = unwrap(model)
    root.__dict__.pop(ATTRIBUTE, None)
    if "save_pretrained" in root.__dict__:
        from trimtab.compat import beside, resizing

        beside.unhook(root)
        resizing.unhook(root)


def adapter_group(state: ModelState, name: str) -> Group:
    """The group called ``name``.

    Raises:
        NoMatch: there is none; the message names those that exist.
    """
    if name not in state.groups:
        known = ", ".join(map(repr, state.groups)) or "none"
        raise NoMatch(f"no adapter is named {name!r}; attached: {known}{nearest(name, state.groups)}")
    return state.groups[name]


def dependants(state: ModelState, name: str) -> list[str]:
    """Names of the adapters that need the adapter ``name``."""
    return [
        group.name
        for group in state.groups.values()
        if any(name in type(a.config).adapter_class.needs(a.config) for a in group.adapters)
    ]


def parameter_users(root: nn.Module) -> dict[int, list[str]]:
    """``id(parameter)`` -> the names it has in ``root``; a tied tensor has more than one."""
    users: dict[int, list[str]] = {}
    for path, module in root.named_modules():
        for tensor, value in module._parameters.items():
            if value is not None:
                users.setdefault(id(value), []).append(f"{path}.{tensor}" if path else tensor)
    return users


def resolve_names(state: ModelState, name: str | None) -> list[Group]:
    """One named group, or all groups for None."""
    return list(state.groups.values()) if name is None else [adapter_group(state, name)]


def trainable_parameters(group: Group) -> list[nn.Parameter]:
    """The group's parameters that learn, each once."""
    seen: dict[int, nn.Parameter] = {}
    for adapter in group.adapters:
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                seen.setdefault(id(parameter), parameter)
    return list(seen.values())


def tensors_of(group: Group) -> dict[str, Tensor]:
    """Saved tensors of a group: ``<path>.<slot>.<name>`` -> parameter or persistent buffer."""
    found: dict[str, Tensor] = {}
    for adapter in group.adapters:
        for key, value in adapter.state_dict(keep_vars=True).items():
            found[f"{adapter.site.path}.{adapter.site.slot}.{key}"] = gathered(value.detach())
    return found


def shapes_by_place(tensors: Mapping[str, Mapping[str, Any]], sites: Sequence[Site]) -> list[dict[str, tuple[int, ...]]]:
    """For every site: name -> shape of the tensors that a manifest's ``tensors``, named as above, lists for it."""
    found: dict[str, dict[str, tuple[int, ...]]] = {f"{site.path}.{site.slot}": {} for site in sites}
    for key, entry in tensors.items():
        place = key.rpartition(".")[0]
        while place and place not in found:  # a tensor's own name may have dots
            place = place.rpartition(".")[0]
        if place:
            found[place][key[len(place) + 1 :]] = tuple(entry["shape"])
    return [found[f"{site.path}.{site.slot}"] for site in sites]
