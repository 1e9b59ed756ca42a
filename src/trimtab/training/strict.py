"""JSON and YAML as people mean them: what is written twice, in no known encoding or too deep to read is an error, never a guess."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from trimtab.core.errors import TrimtabError
from trimtab.training.errors import ConfigError, DataError

__all__ = ["assignments", "check_characters", "dump_yaml", "parse_json", "parse_yaml", "read_text"]

_FLOAT = re.compile(r"[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$")  # YAML 1.2 and every user mean a number by 1e-3


def read_text(path: Path, error: type[TrimtabError] = DataError, *, newline: str | None = None) -> str:
    """The text of a UTF-8 file, without a byte-order mark.

    Args:
        newline: as in ``open``; an empty text keeps the ends of lines as they are.

    Raises:
        TrimtabError: of the class ``error``: other bytes, or a file that cannot be read.
    """
    try:
        with path.open(encoding="utf-8-sig", newline=newline) as stream:
            return stream.read()
    except UnicodeDecodeError as found:
        raise error(f"{path} is not UTF-8 text: {found}; convert it to UTF-8") from found
    except OSError as found:
        raise error(f"{path} cannot be read: {found.strerror or found}") from found


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text.

    Raises:
        DataError: no JSON, an object that has a key twice, or lists within lists without end.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise DataError(f"{where} has the key {key!r} twice, {found[key]!r} and {value!r}; keep the one that is meant")
            found[key] = value
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, column {error.colno}" if "\n" in text.strip() else f"column {error.colno}"
        raise DataError(f"{where} is no JSON ({error.msg} at {at}): {text.strip()[:60]!r}") from error
    except RecursionError:
        raise DataError(f"{where} is nested too deeply to be read") from None
    except TrimtabError:
        raise
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"{where} is no JSON that can be read: {error}") from error


class _Loader(yaml.SafeLoader):
    """Refuses a key that a mapping has twice, and reads 1e-3 as the number that it is."""


class _Dumper(yaml.SafeDumper):
    """Writes what ``_Loader`` reads back."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Hashable, yaml.Node] = {}
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, Hashable) and key in seen:
            lines = f"lines {seen[key].start_mark.line + 1} and {key_node.start_mark.line + 1}"
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is there twice, in {lines}", key_node.start_mark)
        if isinstance(key, Hashable):
            seen[key] = key_node
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
for _cls in (_Loader, _Dumper):
    _cls.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text.

    Raises:
        ConfigError: no YAML, a mapping that has a key twice, characters that no text has, or nesting without end.
    """
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is no YAML that can be read: {error}") from error
    except RecursionError:
        raise ConfigError(f"{where} is nested too deeply to be read") from None
    except ValueError as error:  # a date or a number that is none
        raise ConfigError(f"{where} holds a value that cannot be read: {error}") from error
    check_characters(value, where, ConfigError)
    return value


def dump_yaml(value: Any) -> str:
    """YAML that ``parse_yaml`` reads back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def check_characters(value: Any, where: str, error: type[TrimtabError] = DataError) -> None:
    """Refuse halves of a character (lone surrogates) in any string of ``value``: no file and no tokenizer takes them.

    Raises:
        TrimtabError: of the class ``error``; or the nesting has no end.
    """
    try:
        for text in _strings(value):
            text.encode("utf-8")
    except UnicodeEncodeError as found:
        shown = ascii(found.object[max(0, found.start - 20) : found.end + 20])
        raise error(f"{where} holds half a character ({found.object[found.start]!a}), in {shown}; write the text anew") from None
    except RecursionError:
        raise error(f"{where} is nested too deeply, or holds itself") from None


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _strings(key)
            yield from _strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)


def assignments(texts: Iterable[str], example: str) -> dict[str, Any]:
    """``["method.rank=16"]`` as ``{"method.rank": 16}``; values are read as YAML.

    Args:
        example: how one is written, for the message.

    Raises:
        ConfigError: there is no ``=``, a key is given twice, or a value is no YAML.
    """
    found: dict[str, Any] = {}
    for text in texts:
        check_characters(text, "the command line", ConfigError)
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ConfigError(f"a setting is written key=value, as in {example}; found {text!r}")
        read = parse_yaml(value, f"the value of {text!r}")
        if key in found:
            raise ConfigError(f"{key} is given twice, as {found[key]!r} and {read!r}; keep the one that is meant")
        found[key] = read
    return found
