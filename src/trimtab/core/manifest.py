"""The types of everything in a manifest, checked before any of it is used."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from trimtab.core.errors import CheckpointMismatch, TrimtabError, raise_all

__all__ = ["check_manifest", "check_places"]

LARGEST = 2**48  # of a size; no tensor has as many entries
Test = Callable[[Any], bool]


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST


def _seed(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**64


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _many(test: Test) -> Test:
    return lambda value: isinstance(value, list) and all(map(test, value))


def _table(test: Test) -> Test:
    return lambda value: isinstance(value, dict) and all(map(test, value.values()))


def _or_none(test: Test) -> Test:
    return lambda value: value is None or test(value)


def _method(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("name"), str)


def _dtype(value: Any) -> bool:
    return isinstance(value, str) and isinstance(getattr(torch, value, None), torch.dtype)


def _cut(value: Any) -> bool:
    """``kind of unit -> path -> [how many, which are left as a bit mask in hexadecimal]``"""
    entry = lambda e: isinstance(e, list) and len(e) == 2 and _count(e[0]) and isinstance(e[1], str) and _HEX(e[1])  # noqa: E731
    return _table(_table(entry))(value)


_HEX = re.compile(r"(0x)?[0-9a-f]+").fullmatch

_TOP: dict[str, tuple[Test, str]] = {
    "name": (lambda v: isinstance(v, str) and bool(v), "a text"),
    "places": (lambda v: isinstance(v, list), "a list"),
    "tensors": (lambda v: isinstance(v, dict), "an object"),
    "aliases": (_table(_text), "an object of texts"),
    "base": (lambda v: isinstance(v, dict), "an object"),
    "file": (_text, "a text"),
    "sha256": (_text, "a text"),
    "cut": (_cut, "an object of cut layers"),
    "made": (lambda v: isinstance(v, dict), "an object"),
    "model": (lambda v: isinstance(v, dict), "an object"),
}
_PLACE: dict[str, tuple[Test, str]] = {
    "path": (_text, "a text"),
    "tensor": (_text, "a text"),
    "kind": (_text, "a text"),
    "shape": (lambda v: _many(_count)(v) and bool(v), "a list of sizes"),
    "method": (_method, "an object with the name of a method"),
    "part": (_or_none(_text), "a text"),
    "rows": (lambda v: _many(_count)(v) and len(v) == 4, "four whole numbers"),
    "source": (_or_none(_text), "a text"),
    "role": (_or_none(_text), "a text"),
    "block": (_or_none(_count), "a whole number"),
    "origin": (lambda v: isinstance(v, list) and len(v) == 2 and _seed(v[0]) and _count(v[1]), "a seed and a whole number"),
}
_NEEDED = ("path", "tensor", "kind", "shape", "method")
_TENSOR: dict[str, tuple[Test, str]] = {"shape": (_many(_count), "a list of sizes"), "dtype": (_dtype, "a dtype of torch")}
_BASE: dict[str, tuple[Test, str]] = {
    "class": (_text, "a text"),
    "samples": (_table(_many(_or_none(_number))), "an object of lists of numbers"),
    "storage": (_table(lambda v: isinstance(v, str) and bool(v.strip())), "an object of texts"),
    "digits": (_text, "a text"),
}
_MODEL: dict[str, tuple[Test, str]] = {
    "labels": (_many(_text), "a list of texts"),
    "pooling": (_text, "a text"),
    "pad_token_id": (_count, "a whole number"),
}


def check_manifest(manifest: Mapping[str, Any], source: str) -> None:
    """Refuse entries of another type or out of range, all of them together.

    Raises:
        CheckpointMismatch: with the entry's place, what it is, and what it should be.
    """
    problems = _fields(manifest, _TOP, (), source, "")
    raise_all(problems)
    problems += _fields(manifest["base"], _BASE, ("class", "samples"), source, "base.")
    problems += _fields(manifest.get("model", {}), _MODEL, (), source, "model.")
    for key, entry in manifest["tensors"].items():
        problems += _fields(entry, _TENSOR, ("shape", "dtype"), source, f"tensors.{key}.")
    raise_all(problems[:20])
    check_places(manifest["places"], source)


def check_places(places: Any, source: str) -> None:
    """The same for a list of places alone."""
    problems: list[TrimtabError] = []
    for number, entry in enumerate(places):
        problems += _fields(entry, _PLACE, _NEEDED, source, f"places.{number}.")
    raise_all(problems[:20])


def _fields(
    entry: Any, known: Mapping[str, tuple[Test, str]], needed: tuple[str, ...], source: str, where: str
) -> list[TrimtabError]:
    if not isinstance(entry, dict):
        return [CheckpointMismatch(f"{source} is damaged: {where.rstrip('.')} is {_short(entry)}, where an object is needed")]
    found: list[TrimtabError] = [
        CheckpointMismatch(f"{source} is damaged: {where}{key} is missing") for key in needed if key not in entry
    ]
    for key, (test, kind) in known.items():
        if key in entry and not test(entry[key]):
            found.append(CheckpointMismatch(f"{source} is damaged: {where}{key} is {_short(entry[key])}, where {kind} is needed"))
    return found


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
