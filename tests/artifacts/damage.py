"""Random damage to files and folders: bits, lengths, headers, values of JSON, tensors, whole files."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ["damage"]

ODD: tuple[Callable[[], Any], ...] = (
    lambda: None, lambda: True, lambda: 0, lambda: -1, lambda: 1.5, lambda: "", lambda: "x", lambda: [], lambda: {}, lambda: [None],
    lambda: {"x": 1}, lambda: 1 << 31, lambda: 1 << 64, lambda: 10**39, lambda: "../../etc/passwd", lambda: "\u0000",
    lambda: "9" * 50, lambda: [1] * 70, lambda: 1e300, lambda: "float32", lambda: -0.0, lambda: ["a", 1, None],
    lambda: [[[]]],
)  # fmt: skip
_END = 8 + 20 + 4  # bytes of a compressed file's last frame
RAW = (b"", b"{}", b"[]", b"null", b"5", b'"x"', b"\xff\xfe", b"[" * 2000, b'{"a":' * 2000, b"\xef\xbb\xbf{}", b"NaN", b"\x00" * 50)


def damage(root: Path, rng: random.Random, *, reseal: bool = True) -> tuple[str, bool]:
    """Damage what is at ``root``, a file or a folder; what was done, and whether seals were made to fit the damage.

    Args:
        reseal: make seals of our own manifests fit, most often.
    """
    files = sorted(p for p in root.rglob("*") if p.is_file()) if root.is_dir() else [root]
    file = rng.choice(files)
    ways = [flip, flip, cut, grow, zeros, raw, whole]
    if file.suffix == ".json":
        ways += [edit_json if reseal else edit_sealed] * 6 + [twice]
    if file.suffix == ".safetensors":
        ways += [edit_header] * 5 + [not_finite]
    if file.suffix in (".bin", ".pt"):
        ways += [repickle] * 4
    if file.suffix == ".tern" and reseal:
        ways += [edit_packed] * 4
    way = rng.choice(ways)
    resealed = way(file, rng) is True
    return f"{way.__name__} of {file.name}", resealed


# -- bytes


def flip(file: Path, rng: random.Random) -> None:
    data = bytearray(file.read_bytes())
    for _ in range(rng.choice((1, 1, 1, 4))):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def cut(file: Path, rng: random.Random) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: rng.choice((rng.randrange(len(data) + 1), len(data) - 1, 8, 0))])


def grow(file: Path, rng: random.Random) -> None:
    data, at = file.read_bytes(), 0
    at = rng.choice((len(data), rng.randrange(len(data) + 1)))
    file.write_bytes(data[:at] + rng.randbytes(rng.choice((1, 8, 100))) + data[at:])


def zeros(file: Path, rng: random.Random) -> None:
    data = bytearray(file.read_bytes())
    at = rng.randrange(len(data) + 1)
    size = min(rng.choice((4, 32, 300)), len(data) - at)
    data[at : at + size] = bytes([rng.choice((0, 255))]) * size
    file.write_bytes(data)


def raw(file: Path, rng: random.Random) -> None:
    file.write_bytes(rng.choice(RAW))


def whole(file: Path, rng: random.Random) -> None:
    """The file as a whole: gone, a directory, a pipe, another one's bytes, a link to nowhere."""
    data = file.read_bytes()
    others = [p for p in file.parent.iterdir() if p.is_file() and p != file]
    way = rng.choice(("gone", "directory", "pipe", "other", "link"))
    if way == "other" and others:
        other = rng.choice(others)
        file.write_bytes(other.read_bytes())
        other.write_bytes(data)
        return
    file.unlink()
    if way == "directory":
        file.mkdir()
    elif way == "pipe":
        os.mkfifo(file)
    elif way == "link":
        file.symlink_to(file.parent / "nowhere")


# -- JSON


def _nodes(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        found.append((value, key))
        _nodes(value[key], found)
    return found


def mutated(content: Any, rng: random.Random) -> Any:
    """A JSON value with one or a few changes."""
    content = copy.deepcopy(content)
    for _ in range(rng.choice((1, 1, 1, 3))):
        nodes = _nodes(content, [])
        if not nodes:
            return rng.choice(ODD)()
        holder, key = rng.choice(nodes)
        way = rng.randrange(6)
        if way == 0:
            del holder[key]
        elif way == 1 and isinstance(holder[key], int) and not isinstance(holder[key], bool):
            holder[key] += rng.choice((-1, 1, 7, 1 << 40))
        elif way == 2 and isinstance(holder[key], str):
            holder[key] += rng.choice(("x", ".", "/../x", "é"))
        elif way == 3 and isinstance(holder, dict):
            holder[rng.choice(("x", "", "a.b"))] = holder.pop(key)
        elif way == 4:
            holder[key] = rng.choice((holder[key], [holder[key]], {"x": holder[key]}))
        else:
            holder[key] = rng.choice(ODD)()
    return content


def _sealed(content: Any) -> Any:
    """The manifest with a seal that fits it."""
    if not isinstance(content, dict) or "seal" not in content:
        return content
    inside = {key: value for key, value in content.items() if key != "seal"}
    return inside | {"seal": hashlib.sha256(json.dumps(inside, sort_keys=True).encode()).hexdigest()}


def edit_json(file: Path, rng: random.Random) -> bool:
    content = mutated(json.loads(file.read_bytes()), rng)
    reseal = rng.random() < 0.8
    file.write_text(json.dumps(_sealed(content) if reseal else content))
    return reseal


def edit_sealed(file: Path, rng: random.Random) -> bool:
    file.write_text(json.dumps(mutated(json.loads(file.read_bytes()), rng)))
    return False


def twice(file: Path, rng: random.Random) -> bool:
    text = file.read_text()
    file.write_text(text.replace("{", '{"name": 1, "name": 2,', 1))
    return False


def _header(file: Path) -> tuple[dict, bytes]:
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def edit_header(file: Path, rng: random.Random) -> bool:
    header, rest = _header(file)
    if isinstance(header.get("__metadata__"), dict) and rng.random() < 0.3:
        notes = header["__metadata__"]
        for key, value in notes.items():
            if value.startswith("{"):
                notes[key] = rng.choice((json.dumps(mutated(json.loads(value), rng)), "[" * 2000, "no JSON", "[]"))
    else:
        header = mutated(header, rng)
    text = json.dumps(header).encode()
    size = len(text) if rng.random() < 0.9 else rng.choice((0, 1 << 62, len(text) - 1, 1 << 27))
    file.write_bytes(size.to_bytes(8, "little") + text + rest)
    return False


def not_finite(file: Path, rng: random.Random) -> bool:
    header, rest = _header(file)
    names = [name for name, entry in header.items() if name != "__metadata__" and entry["dtype"] == "F32"]
    data = bytearray(rest)
    begin, end = header[rng.choice(names)]["data_offsets"] if names else (0, 0)
    if end - begin >= 4:
        data[begin : begin + 4] = struct.pack("<f", rng.choice((float("nan"), float("inf"))))
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))
    return False


# -- torch's files, and our compressed ones


def repickle(file: Path, rng: random.Random) -> bool:
    stored = torch.load(file, weights_only=True)
    key = rng.choice(sorted(stored))
    value = stored[key]
    changes: tuple[Callable[[], Any], ...] = (
        lambda: value.half(), lambda: value.double(), lambda: value.int(), lambda: value.to_sparse(), lambda: value[None],
        lambda: value.flatten(), lambda: value.reshape(-1)[:0], lambda: torch.full_like(value, float("nan")), lambda: value.bool(),
        lambda: value.cfloat(), lambda: value.to("meta"), lambda: value.reshape(-1)[:1].expand(10**9), lambda: "text", lambda: None,
        lambda: [value], lambda: {"x": value}, lambda: 5, lambda: torch.nn.Parameter(value), lambda: value.to(torch.float8_e4m3fn),
        lambda: value.t().contiguous().t() if value.dim() == 2 else value,
    )  # fmt: skip
    way = rng.randrange(len(changes) + 4)
    if way < len(changes):
        stored[key] = changes[way]()
    elif way == len(changes):
        del stored[key]
    elif way == len(changes) + 1:
        stored[rng.choice((5, None, "x", ("a", 1)))] = stored.pop(key)
    elif way == len(changes) + 2:
        stored = rng.choice((list(stored.values()), value, None, [stored], "text"))
    else:
        stored[key + "x"] = value
    torch.save(stored, file, _use_new_zipfile_serialization=rng.random() < 0.7)
    return False


def edit_packed(file: Path, rng: random.Random) -> bool:
    """Another header, with checksums that fit."""
    data = file.read_bytes()
    magic, version, size = struct.unpack("<8sII", data[:16])
    content = mutated(json.loads(zlib.decompress(data[16 : 16 + size])), rng)
    text = zlib.compress(json.dumps(content).encode())
    if rng.random() < 0.05:
        text = zlib.compress(b" " * 200_000_000, 1)
    head = struct.pack("<8sII", magic, version, len(text)) + text
    body = head + struct.pack("<I", zlib.crc32(head)) + data[16 + size + 4 : -_END]
    count = struct.unpack("<I", data[-_END:][8:12])[0]
    end = struct.pack("<4sI", b"end ", 20) + struct.pack("<I", count) + hashlib.blake2b(body, digest_size=16).digest()
    file.write_bytes(body + end + struct.pack("<I", zlib.crc32(end)))
    return True
