"""The registry of methods: one decorator fills it; the command line, the docs, the tests and the benchmark read it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from trimtab.core.catalogue import Catalogue, arguments
from trimtab.core.errors import NoMatch, Unsupported
from trimtab.core.fieldtypes import checked

if TYPE_CHECKING:
    from trimtab.core.contracts import Adapter, MethodConfig

__all__ = ["MethodEntry", "config_from_dict", "config_to_dict", "entries", "entry", "get", "method", "names"]

_METHODS: Catalogue[MethodEntry] = Catalogue("method", "trimtab.methods", holds="adapter")
T = TypeVar("T", bound="type[Adapter]")


@dataclass(frozen=True)
class MethodEntry:
    """One registered method.

    Attributes:
        name: the name of the config class, which is the method's public name.
        config: the frozen dataclass that a user writes.
        adapter: the module class that holds the method's parameters at one place.
        paper: source, ``arXiv:...`` (or a URL), with the equation where it helps.
        tests: keyword variants of the config that the contract suite runs besides the defaults.
    """

    name: str
    config: type[MethodConfig]
    adapter: type[Adapter]
    paper: str
    tests: tuple[dict[str, Any], ...] = ()

    @property
    def summary(self) -> str:
        """First line of the config's docstring."""
        return (self.config.__doc__ or "").strip().splitlines()[0]


def method(config: type, *, paper: str, tests: tuple[dict[str, Any], ...] = ()) -> Callable[[T], T]:
    """Class decorator that registers an adapter class as the implementation of ``config``.

    Args:
        config: a frozen dataclass derived from ``MethodConfig``; its class name becomes the method's name.
        paper: where the method is defined (arXiv id, equation).
        tests: config keywords that the contract suite uses for small layers, one parametrisation each.

    Raises:
        Unsupported: the name is taken by another class, or the config is no frozen dataclass.
    """

    def register(adapter: T) -> T:
        name = config.__name__
        if not dataclasses.is_dataclass(config) or not config.__dataclass_params__.frozen:
            raise Unsupported(f"the config {name} of {adapter.__name__} must be a frozen dataclass")
        checked(config)
        _METHODS.add(MethodEntry(name, config, adapter, paper, tests))
        config.adapter_class = adapter
        return adapter

    return register


entries, names, entry = _METHODS.entries, _METHODS.names, _METHODS.entry


def get(name: str) -> type[MethodConfig]:
    """The config class of the method ``name``; raises ``NoMatch`` if there is none."""
    return entry(name).config


def config_to_dict(config: MethodConfig) -> dict[str, Any]:
    """``{"name": ..., <non-default fields>}``, as a manifest stores it."""
    fields = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != field.default
    }
    return {"name": type(config).__name__, **fields}


def config_from_dict(stored: dict[str, Any]) -> MethodConfig:
    """The config that ``config_to_dict`` stored.

    Raises:
        NoMatch: unknown method or unknown hyperparameter. ShapeMismatch: a value of another type, or out of its range.
    """
    values = dict(stored)
    if "name" not in values:
        raise NoMatch(f"a method needs its name, as in {{name: LoRA, rank: 8}}; found the keys {sorted(values)}")
    config = get(values.pop("name"))
    known = [field.name for field in dataclasses.fields(config)]
    return config(**arguments(values, known, config.__name__, "hyperparameter"))
