"""The cached subclass that runs a host, and how adapters come beneath a module and leave it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor, nn

from trimtab.core.contracts import Adapter, TokenAdapter
from trimtab.core.flows import ATTENTION_DUTIES
from trimtab.core.host import CHILD, Host, by_weight, escape
from trimtab.core.site import base_class

__all__ = ["adapted_class", "dismount", "feed", "mount", "retire", "serve"]

Key = tuple[type, frozenset[str], frozenset[str], bool]
_CLASSES: dict[Key, type] = {}


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return self._modules[CHILD].run(self, args, kwargs)


def _apply(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """``to``, ``half``, ``cuda``: the sites keep up with their tensors' dtype and device."""
    self._trimtab_base._apply(self, *args, **kwargs)
    for slots in self._modules[CHILD]._modules.values():
        for adapter in slots._modules.values():
            site = adapter.site
            stored = self._parameters.get(site.tensor) if site.tensor else next(self.parameters(recurse=False), None)
            if stored is not None:
                site.device = stored.device
                site.dtype = stored.dtype if stored.is_floating_point() else site.dtype
    return self


def _property(tensor: str, reading: Callable[[Host, nn.Module, str], Tensor | None]) -> property:
    def read(self: nn.Module) -> Tensor | None:
        try:
            return reading(self._modules[CHILD], self, tensor)
        except AttributeError as error:  # nn.Module would answer with the base's parameter instead
            raise RuntimeError(f"reading {tensor!r} of an adapted {type(self).__name__} failed: {error}") from error

    def write(self: nn.Module, value: Any) -> None:
        self.__dict__[tensor] = value  # nn.Module has kept parameters for itself: what comes here is anything else

    return property(read, write)


def _redirecting() -> property:
    """The attribute by which an attention finds its function (see ``trimtab.compat.attention``)."""
    from trimtab.compat.attention import ATTRIBUTE, redirected, register

    register()
    return property(
        lambda self: redirected(self, self.__dict__[ATTRIBUTE]), lambda self, value: self.__dict__.__setitem__(ATTRIBUTE, value)
    )


def _reduce_ex(self: nn.Module, protocol: int) -> tuple:
    """Pickle and deepcopy by the base class, since the subclass is made at run time."""
    return _revive, type(self)._trimtab_key, self.__dict__.copy()


def _revive(base: type, tensors: frozenset[str], shown: frozenset[str] = frozenset(), redirected: bool = False) -> nn.Module:
    cls = adapted_class(base, tensors, shown, redirected)
    return cls.__new__(cls)


def _setstate(self: nn.Module, state: dict) -> None:
    type(self)._trimtab_base.__setstate__(self, state)
    host = self._modules.get(CHILD)
    if host is not None and "_modules" in host.__dict__:
        host.inside(self)


class _Sequence:
    """What an adapted nn.Sequential shows of its children: those that it runs, not its host."""

    def _shown(self) -> dict[str, nn.Module]:
        return {name: module for name, module in self._modules.items() if name != CHILD}

    def __iter__(self) -> Any:
        return iter(list(self._shown().values()))

    def __len__(self) -> int:
        return len(self._shown())

    def __getitem__(self, index: Any) -> nn.Module:
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(self._shown().items())[index]))
        return list(self._shown().values())[index]


def adapted_class(
    base: type, tensors: frozenset[str] = frozenset(), shown: frozenset[str] = frozenset(), redirected: bool = False
) -> type:
    """The subclass of ``base`` that runs a host; cached, so that equal places have equal classes.

    Args:
        tensors: parameters that the module's own forward reads adapted.
        shown: parameters, these among them, that others read adapted.
        redirected: whether it is an attention whose function is found by name.
    """
    key = (base, tensors, shown, redirected)
    if key not in _CLASSES:
        common = {
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "_trimtab_base": base,
            "_apply": _apply,
            "_trimtab_key": key,
        }
        if redirected:
            common["config"] = _redirecting()
        bases = (_Sequence, base) if issubclass(base, nn.Sequential) else (base,)
        inside = {tensor: _property(tensor, Host.substitute) for tensor in tensors}
        outside = {tensor: _property(tensor, Host.read) for tensor in shown}
        outside |= {"forward": _forward, "__reduce_ex__": _reduce_ex, "__setstate__": _setstate}
        outside["_trimtab_inside"] = type(base.__name__, bases, {**common, **inside}) if shown else None
        _CLASSES[key] = type(base.__name__, bases, {**common, **outside})
    return _CLASSES[key]


def _shown(adapter: Adapter) -> frozenset[str]:
    """Parameters that others must not read as the base's while ``adapter`` acts: those that it changes; of a module whose
    activations it changes in a way that no weight does, all."""
    effects = by_weight(adapter)
    if effects:
        return frozenset(each.site.tensor for each in effects)
    if isinstance(adapter, TokenAdapter) and adapter.duty not in ATTENTION_DUTIES:
        return frozenset()
    return frozenset(name for name, value in adapter.site.module._parameters.items() if value is not None)


def mount(module: nn.Module, name: str, adapter: Adapter) -> Host:
    """Put ``adapter`` beneath ``module``; the module's class becomes (or stays) an adapted one."""
    shown = _shown(adapter)
    tensors = shown if adapter.site.substitutes else frozenset()
    attends = isinstance(adapter, TokenAdapter) and adapter.duty in ATTENTION_DUTIES
    host = _hosted(module, tensors, shown, attends=attends)
    host.path = adapter.site.path
    host.put(name, adapter.site.slot, adapter)
    return host


def feed(source: nn.Module, name: str, adapter: Adapter) -> None:
    """Let ``adapter``, mounted already, read ``source``'s input."""
    host = _hosted(source)
    host.path = adapter.site.source_path
    slots = host.slots(name)
    slots.feeds.append((adapter.site.module._modules[CHILD], adapter.site.source_path))


def serve(module: nn.Module, path: str, name: str, duty: str, adapter: TokenAdapter) -> Host:
    """Let ``module`` at ``path`` do its part for a token adapter called ``name`` that stands elsewhere."""
    host = _hosted(module, attends=duty in ATTENTION_DUTIES)
    host.path = path
    host.served.setdefault(name, []).append((duty, adapter))
    return host


def _hosted(
    module: nn.Module, tensors: frozenset[str] = frozenset(), shown: frozenset[str] = frozenset(), *, attends: bool = False
) -> Host:
    """The host beneath ``module``, made if there is none.

    Args:
        tensors, shown: as in ``adapted_class``; those of earlier adapters stay.
        attends: whether it is an attention that learned tokens must reach.
    """
    base = base_class(module)
    _, before, seen, redirected = getattr(type(module), "_trimtab_key", (base, frozenset(), frozenset(), False))
    host = module._modules.get(CHILD)
    if host is None:
        host = Host()
        host.training = module.training
        module._modules[CHILD] = host
    if attends:
        from trimtab.compat.attention import asks_registry, reachable
        from trimtab.compat.bodies import layer_cache

        redirected = host.redirected = asks_registry(module)
        host.cached = not reachable(module) and layer_cache(module) is not None
        host.reachable = host.cached or reachable(module)
    module.__class__ = adapted_class(base, before | tensors, seen | shown, redirected)
    host.inside(module)
    _rebind_saved_forward(module)
    return host


def retire(module: nn.Module, name: str, gone: Collection[Adapter]) -> None:
    """``module`` no longer serves the token adapters ``gone`` called ``name``."""
    host = module._modules[CHILD]
    left = [(duty, adapter) for duty, adapter in host.served.pop(name, ()) if adapter not in gone]
    if left:
        host.served[name] = left
    _release(module)


def dismount(module: nn.Module, name: str) -> None:
    """Take everything called ``name`` from beneath ``module``; the last one gives the module its own class back."""
    host = module._modules[CHILD]
    host._modules.pop(escape(name), None)
    host.served.pop(name, None)
    _release(module)


def _release(module: nn.Module) -> None:
    """Give the module its own class back if nothing is left beneath it."""
    host = module._modules[CHILD]
    if not host._modules and not host.served:
        del module._modules[CHILD]
        module.__class__ = type(module)._trimtab_base
        _rebind_saved_forward(module)


def _rebind_saved_forward(module: nn.Module) -> None:
    """accelerate's hooks keep the bound forward of the class they met; point it at the present class's."""
    if "_old_forward" in module.__dict__:
        module._old_forward = type(module).forward.__get__(module)
