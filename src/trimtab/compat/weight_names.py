"""Which tensors of a checkpoint fill which parameters of a transformers model, in both directions.

Most often a tensor has its parameter's name, with or without the base model's prefix. transformers 5 also renames, stacks
(experts into a bank) and fuses tensors while it loads; those conversions are asked from transformers itself, applied to the
tensors of one parameter at a time, and reversed when that parameter is written.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from trimtab.core.errors import NotMergeable
from trimtab.core.state import parameter_users

__all__ = ["Group", "WeightNames", "lacking"]


@dataclass
class Group:
    """Tensors of a checkpoint and the parameters that they fill together.

    Attributes:
        keys: the tensors' names in the checkpoint.
        params: the parameters' names in the model.
        converter: what turns the ones into the others; None if one tensor is one parameter.
        first: the name under which transformers collects the group.
        patterns: for each key, the converter's pattern that matched it.
    """

    keys: list[str]
    params: list[str]
    converter: Any = None
    first: str = ""
    patterns: tuple[str, ...] = ()


class WeightNames:
    """The groups of one checkpoint and one model.

    Args:
        model: the model, on any device; one of transformers' if conversions are to be known.
        keys: all names of the checkpoint.
    """

    def __init__(self, model: nn.Module, keys: Iterable[str]):
        self.model = model
        self.params = set(model.state_dict())
        self.groups: dict[str, Group] = {}  # by parameter
        self.groups_by_key: dict[str, Group] = {}
        found: dict[str, Group] = {}
        renamings, converters = _conversions(model)
        self.conversions = [*renamings, *converters]
        for key in sorted(keys, key=_natural):
            name, converter, pattern = _renamed(key, renamings, converters)
            name = self._prefixed(name)
            group = found.setdefault(name, Group([], [], converter, name))
            group.keys.append(key)
            group.patterns += (pattern,)
            self.groups_by_key[key] = group
        for name, group in found.items():
            group.params = [p for p in _targets(name, group.converter) if p in self.params]
            for param in group.params:
                self.groups[param] = group

    def _prefixed(self, name: str) -> str:
        """The name as the model has it: with the base model's prefix, or without it."""
        prefix = getattr(self.model, "base_model_prefix", "")
        if name in self.params or not prefix:
            return name
        with_it, without = f"{prefix}.{name}", name.removeprefix(f"{prefix}.")
        return with_it if with_it in self.params else without if without in self.params else name

    def read(self, group: Group, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The group's parameters, from ``read(key)``."""
        if group.converter is None:
            return {param: read(group.keys[0]) for param in group.params}
        converter = copy.deepcopy(group.converter)
        for key, pattern in zip(group.keys, group.patterns, strict=True):
            converter.add_tensor(group.first, key, pattern, read(key))
        made = converter.convert(group.first, model=self.model, config=self.model.config)
        return {self._prefixed(k): v[0] if isinstance(v, list) else v for k, v in made.items()}

    def write(self, group: Group, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The group's tensors by their names in the checkpoint, from all of its parameters.

        Raises:
            NotMergeable: transformers' conversion has no way back to these names.
        """
        if group.converter is None:
            return {group.keys[0]: values[group.params[0]]}
        from transformers.core_model_loading import revert_weight_conversion

        before = self.model.__dict__.get("_weight_conversions")
        self.model._weight_conversions = [t for t in self.conversions if t.was_used()]
        try:
            made = revert_weight_conversion(self.model, dict(values))
        finally:
            self.model._weight_conversions = before
        named = {}
        for name, value in made.items():
            key = next((k for k in group.keys if k == name or k.endswith(f".{name}") or name.endswith(f".{k}")), name)
            named[key] = value.contiguous()
        if set(named) != set(group.keys):
            raise NotMergeable(
                f"{', '.join(group.params)} is made of {len(group.keys)} tensors of the checkpoint, and transformers makes "
                f"{', '.join(sorted(named)[:3])} of it again; merge it in memory: tt.merge, then save_pretrained"
            )
        return named


def lacking(model: nn.Module, keys: Iterable[str]) -> set[str]:
    """The tensors of ``model`` that a checkpoint with ``keys`` has no values for, neither under their own names nor under one that
    they are tied to; those that transformers itself does without are left out."""
    known = WeightNames(model, keys).groups
    ties = {name: names for names in parameter_users(model).values() for name in names}
    ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    return {
        name
        for name in model.state_dict()
        if not any(each in known for each in ties.get(name, (name,))) and not any(re.search(pattern, name) for pattern in ignored)
    }


def _conversions(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """transformers' renamings and converters for ``model``; none for a module that is not its."""
    if not hasattr(model, "base_model_prefix"):
        return [], []
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    found = get_model_conversion_mapping(model)
    converters = [t for t in found if isinstance(t, WeightConverter)]
    return [t for t in found if not isinstance(t, WeightConverter)], converters


def _renamed(key: str, renamings: list[Any], converters: list[Any]) -> tuple[str, Any, str]:
    """A checkpoint's name as the model's, and the converter and its pattern if one takes it."""
    for renaming in renamings:
        key, _ = renaming.rename_source_key(key)
    for converter in converters:
        renamed, pattern = converter.rename_source_key(key)
        if pattern is not None:
            return renamed, converter, pattern
    return key, None, ""


def renamed_path(model: nn.Module) -> Callable[[str], str]:
    """``path -> path``: the module of ``model`` that an older layout called so, by transformers' renamings; no other is changed."""
    renamings, _ = _conversions(model)
    return lambda path: _renamed(f"{path}.weight", renamings, [])[0].removesuffix(".weight")


def stacked(model: nn.Module, key: str) -> tuple[str, int, bool] | None:
    """What an expert's own tensor of an older layout is a part of: the parameter, which of the matrices that are joined in it, and
    whether it is only stacked and joined by rows; None if transformers knows nothing of it."""
    renamings, converters = _conversions(model)
    name, converter, pattern = _renamed(key, renamings, converters)
    if converter is None:
        return None
    plain = {type(op).__name__ for op in converter.operations} <= {"MergeModulelist", "Concatenate"}
    joined = [op for op in converter.operations if type(op).__name__ == "Concatenate"]
    plain = plain and all(op.dim == 1 for op in joined) and len(converter.target_patterns) == 1
    return name, list(converter.source_patterns).index(pattern), plain


def _targets(name: str, converter: Any) -> list[str]:
    """All parameters that a converter makes under the name that it collects under."""
    if converter is None:
        return [name]
    first, *others = converter.target_patterns
    plain = first.replace("*.", "0.")
    return [name, *(name.replace(plain, other.replace("*.", "0."), 1) for other in others)]


def _natural(key: str) -> list[tuple]:
    """Sorts experts by number."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in key.split(".")]
