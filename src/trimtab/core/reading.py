"""Reading files that somebody else may have written: regular files, JSON within bounds, names inside a folder, finite numbers.

Every reader goes through here, so that a file can be damaged or hostile in one place alone. A file that cannot be read is a
``CheckpointMismatch`` that names it; nothing here waits for a pipe, follows a name out of its folder, or takes memory that
the file's own size does not explain.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import stat
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch import Tensor

from trimtab.core.errors import CheckpointMismatch, TrimtabError, raise_all

__all__ = [
    "LONGEST", "check_fields", "check_finite", "check_pattern", "inflate", "inside", "listed", "parse_json", "read_bytes",
    "read_json", "regular_size", "scale_problems",
]  # fmt: skip

LONGEST = 100_000_000  # bytes of a JSON text; safetensors' own bound of a header
VALUES = 4_000_000  # of a JSON text: numbers, names, lists
DEEPEST = 64
_MOST_REPEATS = 8
_LARGEST = torch.finfo(torch.float32).max
DIGITS = 40  # transformers writes a tokenizer's "no limit" as an integer of 31 digits

_KINDS = {
    stat.S_ISDIR: "a directory", stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket", stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}  # fmt: skip
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_BRACKET = re.compile(r"[\[\]{}]")


def regular_size(file: Path) -> int:
    """The size in bytes of a regular file; opening anything else could wait for ever.

    Raises:
        CheckpointMismatch: there is nothing, or a directory, a pipe, a device.
    """
    try:
        found = os.stat(file)
    except (OSError, ValueError) as error:
        raise CheckpointMismatch(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(found.st_mode):
        kind = next((kind for test, kind in _KINDS.items() if test(found.st_mode)), "no file")
        raise CheckpointMismatch(f"{file} cannot be read: it is {kind}, and a file is needed")
    return found.st_size


def read_bytes(file: Path, *, most: int) -> bytes:
    """All bytes of a regular file of at most ``most``.

    Raises:
        CheckpointMismatch: it is longer, or cannot be read.
    """
    size = regular_size(file)
    if size > most:
        raise CheckpointMismatch(f"{file} has {size:,} bytes, and its kind is read up to {most:,}: it is damaged, or another file")
    try:
        return file.read_bytes()
    except OSError as error:
        raise CheckpointMismatch(f"{file} cannot be read: {error.strerror}") from None


def read_json(file: str | os.PathLike, *, finite: bool = True) -> Any:
    """What a JSON file says; UTF-8 with or without a byte-order mark, or UTF-16 and UTF-32 with one.

    Args:
        finite: refuse ``NaN`` and ``Infinity``, which some models' configurations hold on purpose.

    Raises:
        CheckpointMismatch: see ``parse_json`` and ``regular_size``.
    """
    return parse_json(read_bytes(Path(file), most=LONGEST), str(file), finite=finite)


def parse_json(raw: bytes, source: str, *, finite: bool = True, start: int = 0) -> Any:
    """The value of a JSON text.

    Args:
        source: what it is, for messages: a file's name, or a part of one.
        finite: refuse ``NaN`` and ``Infinity``.
        start: the byte of the file where the text begins.

    Raises:
        CheckpointMismatch: no JSON, or one that no writer of adapters and models makes: nested deeper than 64 levels,
        a number of more than 40 digits, a key twice in one object, half a surrogate pair, four million values.
    """
    if len(raw) > LONGEST:
        raise CheckpointMismatch(f"{source} is a JSON text of {len(raw):,} bytes; up to {LONGEST:,} are read")
    try:
        text = raw.decode(json.detect_encoding(raw))
    except UnicodeDecodeError as error:
        raise CheckpointMismatch(f"{source} is damaged: it is no text at byte {start + error.start}") from None
    _check_structure(text, source)
    try:
        value = json.loads(
            text, parse_int=_integer, parse_float=_finite if finite else float, object_pairs_hook=_object,
            parse_constant=_constant if finite else float,
        )  # fmt: skip
    except json.JSONDecodeError as error:
        at = start + len(text[: error.pos].encode(errors="replace"))
        raise CheckpointMismatch(f"{source} is damaged: it is no JSON at byte {at}: {error.msg}") from None
    except ValueError as error:
        raise CheckpointMismatch(f"{source} is damaged: {error}") from None
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise CheckpointMismatch(f"{source} is damaged: it holds half a surrogate pair, which is no character") from None
    return value


def _check_structure(text: str, source: str) -> None:
    """Refuse what would exhaust the parser, before it runs."""
    plain = _STRING.sub("", text) if '"' in text else text
    values = plain.count(",") + plain.count("[") + plain.count("{")
    if values > VALUES:
        raise CheckpointMismatch(f"{source} is a JSON text of {values:,} values; up to {VALUES:,} are read")
    depth = itertools.accumulate(1 if bracket in "[{" else -1 for bracket in _BRACKET.findall(plain))
    if max(depth, default=0) > DEEPEST:
        raise CheckpointMismatch(f"{source} is a JSON text nested deeper than {DEEPEST} levels, as nothing that is read here is")


def _integer(text: str) -> int:
    if len(text) > DIGITS:
        raise ValueError(f"it holds a number of {len(text):,} digits ({text[:6]}...)")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"it holds the number {text[:20]}, which is beyond all floating-point numbers")
    return value


def _constant(text: str) -> float:
    raise ValueError(f"it holds {text} where a number is needed")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        key = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"it says {key!r} twice, and which of the two is meant cannot be known")
    return found


def inflate(raw: bytes, source: str, *, most: int = LONGEST) -> bytes:
    """zlib's inverse, up to ``most`` bytes.

    Raises:
        CheckpointMismatch: no zlib stream, not the whole of one, more behind it, or one that becomes longer.
    """
    stream = zlib.decompressobj()
    try:
        data = stream.decompress(raw, most + 1)
    except zlib.error as error:
        raise CheckpointMismatch(f"{source} cannot be decompressed: {error}") from None
    if len(data) > most:
        raise CheckpointMismatch(f"{source}, {len(raw):,} bytes, becomes more than {most:,} when it is decompressed")
    if not stream.eof or stream.unused_data:
        raise CheckpointMismatch(f"{source} cannot be decompressed: it is not the whole of one stream")
    return data


def inside(folder: Path, name: Any, source: Path) -> Path:
    """The file that ``source`` (a manifest or an index) calls ``name``: below ``folder``, by its name.

    Links are followed, since model caches are made of them; a name that leads out of the folder is not.

    Raises:
        CheckpointMismatch: it is no name, or one that leads elsewhere.
    """
    whole = isinstance(name, str) and name and "\0" not in name and not PureWindowsPath(name).drive
    if not whole or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name.replace("\\", "/")).parts:
        raise CheckpointMismatch(f"{source} names the file {name!r}, which is none in {folder}; nothing outside of it is read")
    return folder / name


def check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuse NaN and infinite values.

    Raises:
        CheckpointMismatch: with the name of every tensor that holds one.
    """
    problems: list[TrimtabError] = []
    for key, value in tensors.items():
        if not value.is_meta and (value.is_floating_point() or value.is_complex()) and not bool(torch.isfinite(value).all()):
            problems.append(CheckpointMismatch(f"{key} in {source} holds NaN or infinite values; restore it from a copy"))
    raise_all(problems)


def check_pattern(pattern: str, source: str) -> None:
    """Whether a regular expression that a file holds can be compiled, and matched in a time that its length explains.

    Raises:
        CheckpointMismatch: it is none, or repeats without end what itself repeats without end, which can take for ever.
    """
    try:
        tree = re._parser.parse(pattern)  # type: ignore[attr-defined]
    except (re.error, RecursionError, OverflowError) as error:
        raise CheckpointMismatch(f"{source} holds the pattern {_short(pattern)}, which is no regular expression: {error}") from None
    if _unbounded(tree) > _MOST_REPEATS:
        raise CheckpointMismatch(f"{source} holds the pattern {_short(pattern)}, which could take for ever to match")


def _unbounded(node: Any) -> int:
    """Unbounded repeats that stand one after another in a parsed expression; very many where one is within another."""
    repeat, endless = re._constants, re._constants.MAXREPEAT  # type: ignore[attr-defined]
    if isinstance(node, tuple) and len(node) == 2 and node[0] in (repeat.MAX_REPEAT, repeat.MIN_REPEAT):
        _, most, inner = node[1]
        found = _unbounded(inner)
        return (1 if not found else 1000) if most is endless else found
    if isinstance(node, tuple) and len(node) == 2 and node[0] is repeat.BRANCH:
        return max(map(_unbounded, node[1][1]))
    if isinstance(node, re._parser.SubPattern) or isinstance(node, list | tuple):  # type: ignore[attr-defined]
        return sum(map(_unbounded, node))
    return 0


def scale_problems(adapters: Iterable[Any], source: str) -> list[TrimtabError]:
    """A problem for each adapter whose config has a scale that no float32 holds: everything it computes would be infinite."""
    scales = [(adapter.site.name, getattr(adapter.config, "scale", None)) for adapter in adapters]
    return [
        CheckpointMismatch(f"{name} in {source} has a scale of {scale}, which is beyond all float32 numbers")
        for name, scale in scales if isinstance(scale, int | float) and not abs(scale) < _LARGEST
    ]  # fmt: skip


def check_fields(config: Mapping[str, Any], kinds: Mapping[str, type | tuple[type, ...]], source: str) -> None:
    """Check the types of known fields; a field that is not there is fine, and so is null.

    ``True`` and ``False`` are no numbers here.

    Args:
        kinds: field -> its type or types.

    Raises:
        CheckpointMismatch: all fields of another type, together.
    """
    problems: list[TrimtabError] = []
    for key, kind in kinds.items():
        value = config.get(key)
        kinds_of = kind if isinstance(kind, tuple) else (kind,)
        if value is None or (isinstance(value, kinds_of) and (bool in kinds_of or not isinstance(value, bool))):
            continue
        wanted = " or ".join(_WORDS.get(k, k.__name__) for k in kinds_of if not (k is int and float in kinds_of))
        problems.append(CheckpointMismatch(f"{source} says {key}={_short(value)}, where {wanted} is needed"))
    raise_all(problems)


_WORDS = {
    int: "an integer", float: "a number", str: "a text", bool: "true or false", list: "a list", dict: "an object",
}  # fmt: skip


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def listed(names: Iterable[str], *, most: int = 5) -> str:
    """The first few names, for a message."""
    found = sorted(names)
    return (", ".join(found[:most]) + (", ..." if len(found) > most else "")) or "nothing"
