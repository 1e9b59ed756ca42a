"""Types of the values that a user writes: the annotations of a config, or of a schedule's arguments, are kept in one place.

``True`` is no number, a text is no number, and a number that is not finite is none; an integer serves as a float, a list as a
tuple. Everything else stays with the config's own checks, which may then count on the types.
"""

from __future__ import annotations

import functools
import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, Union

from trimtab.core.errors import ShapeMismatch

__all__ = ["checked", "leaves", "typed"]

_WORDS = {int: "an integer", float: "a number", str: "a text", bool: "true or false", type(None): "None"}


def leaves(annotation: Any) -> set[Any]:
    """All types that an annotation is made of: ``dict[str, list[int]] | None`` gives str, int and None's."""
    inner = typing.get_args(annotation)
    if not inner or typing.get_origin(annotation) is Literal:
        return {annotation}
    return set().union(*(leaves(each) for each in inner if each is not Ellipsis))


def _union(annotation: Any) -> tuple[Any, ...]:
    return typing.get_args(annotation) if typing.get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _fits(value: Any, annotation: Any) -> bool:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if len(_union(annotation)) > 1:
        return any(_fits(value, each) for each in inner)
    if annotation is None or annotation is type(None):
        return value is None
    if origin is Literal:
        return any(type(value) is type(each) and value == each for each in inner)
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin is tuple:
        many = len(inner) == 2 and inner[1] is Ellipsis
        kinds = inner[:1] * len(value) if many and isinstance(value, tuple) else inner
        return isinstance(value, tuple) and len(value) == len(kinds) and all(map(_fits, value, kinds))
    known = origin or annotation
    return isinstance(value, known) if isinstance(known, type) else True


def _words(annotation: Any) -> str:
    """What an annotation allows, for a message."""
    if len(_union(annotation)) > 1:
        *most, last = (_words(each) for each in _union(annotation))
        return f"{', '.join(most)} or {last}"
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if origin is tuple:
        if inner[1:] == (Ellipsis,):
            return f"a list, each entry {_words(inner[0])}"
        return f"a list of {len(inner)}: {', '.join(map(_words, inner))}"
    return _WORDS.get(annotation, str(getattr(annotation, "__name__", annotation)))


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def typed(owner: str, values: Mapping[str, Any], hints: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with lists as tuples where a tuple is meant, each of the type that ``hints`` says.

    Raises:
        ShapeMismatch: values of other types, all of them: owner, name, what is allowed, and what was found.
    """
    found, wrong = {}, []
    for name, value in values.items():
        hint = hints.get(name, Any)
        if any(typing.get_origin(each) is tuple for each in _union(hint)):
            value = _tuples(value)
        found[name] = value
        if not _fits(value, hint):
            finite = " that is finite" if isinstance(value, float) and not math.isfinite(value) else ""
            wrong.append(f"{name} must be {_words(hint)}{finite}, found {value!r}")
    if wrong:
        raise ShapeMismatch(f"{owner}: {'; '.join(wrong)}")
    return found


def checked(cls: type) -> None:
    """Make a class check the types of its arguments before anything else; a second call does nothing."""
    init = cls.__init__
    if getattr(init, "checks_types", False):
        return

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        names = list(signature.parameters)
        given = {name: value for name, value in bound.arguments.items() if name != names[0]}
        own = typed(type(self).__name__, {n: v for n, v in given.items() if n in hints()}, hints())
        bound.arguments.update(own)
        init(*bound.args, **bound.kwargs)

    signature = inspect.signature(init)
    hints: Callable[[], dict[str, Any]] = functools.cache(lambda: typing.get_type_hints(init))
    __init__.checks_types = True  # type: ignore[attr-defined]
    cls.__init__ = __init__
