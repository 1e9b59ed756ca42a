"""The file of a compressed update: a header, frames, an end; every byte is covered by a checksum.

::

    "TRIMTERN"  u32 version  u32 length  header  u32 crc         the header is zlib-compressed JSON
    tag  u32 length  payload  u32 crc                            a frame: "raw " (one tensor as it is), "fits" (all fitted
                                                                 factors, float16), "tern" (symbols)
    "end "  u32 20  u32 frames, 16 bytes blake2b  u32 crc        the digest covers everything before the end

Numbers are little-endian, crc is CRC-32 of all bytes since the frame's tag (the file's first byte for the header). A frame of
symbols holds pieces: whole tensors, or runs of rows of a large one, some four million entries; which ones follows from the
header. So a reader or a writer holds one frame at a time. What is wrong with a file is told with the byte where it starts and
the tensors that it concerns, before any value is used.

A writer that is killed leaves ``.<name>.part`` beside the target; the same job continues there, and nothing else ever reads it.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from trimtab.artifacts import coding
from trimtab.artifacts.packed_entries import is_entry
from trimtab.core import cut, fingerprint
from trimtab.core.checkpoint import FORMATS, install, rebuild
from trimtab.core.contracts import Adapter
from trimtab.core.errors import CheckpointMismatch, Unsupported
from trimtab.core.folders import waiting, writing
from trimtab.core.reading import LONGEST, inflate, parse_json, regular_size
from trimtab.core.state import unwrap

__all__ = ["Entry", "Frame", "Packed", "frames_of", "write"]

MAGIC, VERSION, SUFFIX = b"TRIMTERN", 1, ".tern"
HEAD, FRAME, CRC = struct.Struct("<8sII"), struct.Struct("<4sI"), struct.Struct("<I")
END = struct.Struct("<I16s")
ENTRIES = 1 << 22  # of a frame
#: entries that a file may stand for: this many, and so many more a byte (at a density of 0.01 % a byte holds some five thousand)
FREE, DENSEST = 1 << 26, 1 << 13
#: bytes that a header may become: this many, and so many times its own (one of many alike places becomes thirty times as long)
ROOM, MOST_RATIO = 1 << 24, 50


@dataclass(frozen=True)
class Entry:
    """How one tensor is stored.

    Attributes:
        key, dtype, shape: of the tensor.
        store: ``ternary``; ``start``, nothing is stored because it equals its start; ``raw``; or ``float16``, ``bfloat16``,
            ``int8``: as it is, at fewer bits.
        start: what the update is added to: ``zero``, ``made``, ``base``, ``held``, ``other`` (see ``starts.py`` and ``compress``).
        scale: of a ternary update.
        fitted: whether each of its rows or columns, whichever are fewer, has a factor beside it.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    store: str
    start: str = "zero"
    scale: float = 0.0
    fitted: bool = False

    @property
    def numel(self) -> int:
        """Number of entries."""
        return int(torch.Size(self.shape).numel())

    @property
    def rows(self) -> tuple[int, int]:
        """The tensor as (rows, columns), the way that its symbols are coded; columns are its last axis."""
        if len(self.shape) < 2 or not 0 < self.shape[-1] <= ENTRIES:
            return self.numel, 1
        return self.numel // self.shape[-1], self.shape[-1]


@dataclass(frozen=True)
class Frame:
    """One frame: ``pieces`` are ``(number of the entry, first row, last row + 1)``."""

    tag: bytes
    pieces: tuple[tuple[int, int, int], ...]

    def shapes(self, entries: Sequence[Entry]) -> list[tuple[int, int]]:
        """(rows, columns) of every piece."""
        return [(stop - start, entries[i].rows[1]) for i, start, stop in self.pieces]


def frames_of(entries: Sequence[Entry]) -> list[Frame]:
    """The frames of a file: what is stored as it is, one tensor each, then factors, then symbols in the order of the entries."""
    fitted = tuple((i, 0, min(entry.rows)) for i, entry in enumerate(entries) if entry.fitted)
    factors = [Frame(b"fits", fitted)] if fitted else []
    raw = [Frame(b"raw ", ((i, 0, 0),)) for i, entry in enumerate(entries) if entry.store not in ("ternary", "start")]
    frames: list[Frame] = []
    pieces: list[tuple[int, int, int]] = []
    room = ENTRIES
    for i, entry in enumerate(entries):
        if entry.store != "ternary":
            continue
        rows, columns = entry.rows
        start = 0
        while start < rows and columns:
            if pieces and (rows - start) * columns > room:
                frames.append(Frame(b"tern", tuple(pieces)))
                pieces, room = [], ENTRIES
            stop = min(rows, start + max(1, room // columns))
            pieces.append((i, start, stop))
            room -= (stop - start) * columns
            start = stop
    if pieces:
        frames.append(Frame(b"tern", tuple(pieces)))
    return [*raw, *factors, *frames]


# -- writing


def write(path: Path, header: dict[str, Any], frames: Sequence[Callable[[], tuple[bytes, bytes]]]) -> int:
    """Write a file in one step; returns its size in bytes.

    Args:
        header: JSON values.
        frames: each gives its tag and payload; those that an earlier, killed process has written already are not called.
    """
    text = zlib.compress(json.dumps(header, separators=(",", ":"), sort_keys=True).encode(), 9)
    head = HEAD.pack(MAGIC, VERSION, len(text)) + text
    head += CRC.pack(zlib.crc32(head))
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        stage = path.with_name(f".{path.name}.part")
        with waiting(path, "compresses into"):
            try:
                _fill(stage, head, frames)
                os.replace(stage, path)
            except Exception:
                stage.unlink(missing_ok=True)  # an error is no interruption: the job would fail again
                raise
    return path.stat().st_size


def _fill(stage: Path, head: bytes, frames: Sequence[Callable[[], tuple[bytes, bytes]]]) -> None:
    """Write the frames that an earlier process has not, and the end."""
    done, size = _written(stage, head, len(frames))
    with open(stage, "r+b" if size else "wb") as stream:
        stream.truncate(size)
        stream.seek(size)
        if not size:
            stream.write(head)
        for make in frames[done:]:
            stream.write(_sealed(*make()))
        stream.flush()
        digest = _digest(stage)
        stream.write(_sealed(b"end ", END.pack(len(frames), digest)))
        stream.flush()
        os.fsync(stream.fileno())


def _sealed(tag: bytes, payload: bytes) -> bytes:
    frame = FRAME.pack(tag, len(payload)) + payload
    return frame + CRC.pack(zlib.crc32(frame))


def _digest(path: Path, size: int | None = None) -> bytes:
    """blake2b of the first ``size`` bytes."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as stream:
        left = path.stat().st_size if size is None else size
        while left and (part := stream.read(min(left, 1 << 20))):
            digest.update(part)
            left -= len(part)
    return digest.digest()


def _written(stage: Path, head: bytes, count: int) -> tuple[int, int]:
    """How many whole frames an earlier process of the same job left, and up to which byte."""
    if not stage.is_file():
        return 0, 0
    with open(stage, "rb") as stream:
        if stream.read(len(head)) != head:
            return 0, 0
        done, size = 0, len(head)
        while done < count:
            start = stream.read(FRAME.size)
            length = FRAME.unpack(start)[1] if len(start) == FRAME.size else 0
            rest = stream.read(length + CRC.size)
            if len(rest) < length + CRC.size or zlib.crc32(start + rest[:length]) != CRC.unpack(rest[length:])[0]:
                break
            done, size = done + 1, size + len(start) + len(rest)
    return done, size


# -- reading


class Packed:
    """A compressed update on disk.

    Attributes:
        path: the file.
        header: as it was written.
        entries: how every tensor is stored.

    Raises:
        CheckpointMismatch: the file is foreign, damaged or truncated, or of a later version.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        if not self.path.exists():
            raise CheckpointMismatch(f"there is no compressed update at {self.path}")
        self.size = regular_size(self.path)
        with open(self.path, "rb") as stream:
            self.header, self.body = self._header(stream)
        if not isinstance(self.header, dict):
            raise self._bad(HEAD.size, "its header is no JSON object")
        for key, kind in (("tensors", list), ("coding", str), ("kind", str)):
            if not isinstance(self.header.get(key), kind):
                raise self._bad(HEAD.size, f"its header lacks or garbles {key!r}")
        odd = [row for row in self.header["tensors"] if not is_entry(row)]
        if odd:
            raise self._bad(HEAD.size, f"its header says of a tensor what none has: {repr(odd[0])[:200]}")
        self.entries = [
            Entry(key, dtype, tuple(shape), store, *rest[:1], *map(float, rest[1:2]), *rest[2:])
            for key, dtype, shape, store, *rest in self.header["tensors"]
        ]
        self.coding: str = self.header["coding"]
        self.kind: str = self.header["kind"]
        claimed = sum(entry.numel for entry in self.entries)
        if claimed > FREE + DENSEST * self.size:
            raise self._bad(HEAD.size, f"its header claims {claimed:,} numbers for a file of {self.size:,} bytes")
        self.frames = frames_of(self.entries)

    def _bad(self, offset: int, what: str) -> CheckpointMismatch:
        return CheckpointMismatch(f"{self.path} is damaged at byte {offset}: {what}; fetch or write it again")

    def _header(self, stream: BinaryIO) -> tuple[dict[str, Any], int]:
        start = stream.read(HEAD.size)
        if start[: len(MAGIC)] != MAGIC[: len(start)] or not start:
            found = f"it starts with {start[:8]!r} at byte 0, not with {MAGIC!r}"
            raise CheckpointMismatch(f"{self.path} is no compressed update: {found}")
        if len(start) < HEAD.size:
            raise self._bad(len(start), f"it ends within its first {HEAD.size} bytes")
        _, version, length = HEAD.unpack(start)
        if version > VERSION:
            raise CheckpointMismatch(f"{self.path} has version {version} at byte 8; this trimtab reads up to {VERSION}: upgrade it")
        rest = stream.read(length + CRC.size)
        if len(rest) < length + CRC.size:
            raise self._bad(self.size, f"it ends within its header, which has {length} bytes from byte {HEAD.size} on")
        if zlib.crc32(start + rest[:length]) != CRC.unpack(rest[length:])[0]:
            raise self._bad(HEAD.size, f"the header's {length} bytes do not fit their checksum")
        what, most = f"the header of {self.path}", min(LONGEST, ROOM + MOST_RATIO * length)
        return parse_json(inflate(rest[:length], what, most=most), what, finite=False), HEAD.size + length + CRC.size

    def _names(self, frame: Frame) -> str:
        keys = [self.entries[i].key for i, _, _ in frame.pieces]
        return keys[0] if len(keys) == 1 else f"{keys[0]} to {keys[-1]}"

    def payloads(self) -> Iterator[tuple[Frame, bytes, int]]:
        """Every frame with its checked payload and the byte where it starts, then the check that nothing is missing."""
        with open(self.path, "rb") as stream:
            stream.seek(self.body)
            for frame in self.frames:
                offset = stream.tell()
                yield frame, self._frame(stream, frame.tag, f"the frame of {self._names(frame)}"), offset
            offset = stream.tell()
            count, digest = END.unpack(self._frame(stream, b"end ", "the end", END.size))
            if count != len(self.frames) or digest != _digest(self.path, offset):
                raise self._bad(offset, "the frames before its end are not those that were written")
            if stream.read(1):
                raise self._bad(stream.tell() - 1, f"there are {self.size - stream.tell() + 1} bytes behind its end")

    def _frame(self, stream: BinaryIO, tag: bytes, what: str, size: int | None = None) -> bytes:
        offset = stream.tell()
        start = stream.read(FRAME.size)
        if len(start) < FRAME.size:
            raise self._bad(self.size, f"it ends where {what} should start")
        found, length = FRAME.unpack(start)
        if found != tag or (size is not None and length != size):
            raise self._bad(offset, f"{what} does not start there (found {found!r})")
        if offset + FRAME.size + length + CRC.size > self.size:
            raise self._bad(self.size, f"it ends within {what}, which starts at byte {offset}")
        payload, seal = stream.read(length), stream.read(CRC.size)
        if zlib.crc32(start + payload) != CRC.unpack(seal)[0]:
            raise self._bad(offset, f"{what} does not fit its checksum")
        return payload

    def verify(self) -> None:
        """Read the file once and check every checksum; nothing is decoded."""
        for _ in self.payloads():
            pass

    def raw(self, entry: Entry, payload: bytes, offset: int) -> Tensor:
        """The tensor of a frame that stores it as it is."""
        from trimtab.artifacts.plain import unpack_plain

        try:
            return unpack_plain(payload, entry.store, entry.dtype, entry.shape)
        except (ValueError, RuntimeError) as error:
            raise self._bad(offset, f"{entry.key} cannot be read ({error})") from None

    def factors(self, frame: Frame, payload: bytes, offset: int) -> dict[int, Tensor]:
        """Number of the entry -> its factors, for the frame that holds them."""
        sizes = [stop for _, _, stop in frame.pieces]
        if len(payload) != 2 * sum(sizes):
            raise self._bad(offset, f"{len(payload)} bytes for {sum(sizes)} factors")
        parts = torch.frombuffer(bytearray(payload), dtype=torch.float16).split(sizes)
        return {number: part for (number, _, _), part in zip(frame.pieces, parts, strict=True)}

    def symbols(self, frame: Frame, payload: bytes, offset: int) -> Iterator[tuple[int, int, int, Any]]:
        """``(number of the entry, first row, last row + 1, (n,) symbols)`` for every piece of a frame."""
        shapes = frame.shapes(self.entries)
        try:
            decoded = coding.decode(payload, shapes, self.coding)
        except CheckpointMismatch as error:
            raise self._bad(offset, f"the frame of {self._names(frame)} cannot be decoded: {error}") from None
        at = 0
        for (number, start, stop), (rows, columns) in zip(frame.pieces, shapes, strict=True):
            yield number, start, stop, decoded[at : at + rows * columns]
            at += rows * columns


class _Format:
    """The format ``"packed"`` of ``tt.load``."""

    @staticmethod
    def test(path: Path) -> bool:
        """Whether ``path`` is a file that starts, or is called, like a compressed update."""
        if not path.is_file():
            return False
        with open(path, "rb") as stream:
            return path.suffix == SUFFIX or stream.read(len(MAGIC)) == MAGIC

    @staticmethod
    def load(root: nn.Module, path: Path, *, name: str | None, check_base: bool = True, **how: Any) -> str:
        """Attach the compressed adapter in the file ``path`` to its base; ``how``: ``trainable`` and ``active`` of ``install``."""
        own, adapters, tensors = _Format.read(root, path, check_base=check_base)
        return install(root, adapters, tensors, name=name or own, source=str(path), **how)

    @staticmethod
    def read(
        root: nn.Module, path: Path, *, trainable: bool = False, check_base: bool = True
    ) -> tuple[str, list[Adapter], dict[str, Tensor]]:
        """Name, adapters with shapes only on the modules of ``root``, and their tensors; every checksum is checked first."""
        from trimtab.artifacts.expand import adapter_manifest, adapter_tensors

        packed = Packed(path)
        manifest = adapter_manifest(packed)
        packed.verify()
        cut.check(root, manifest, str(path))
        adapters = rebuild(unwrap(root), manifest)
        if check_base:
            fingerprint.compare(root, manifest["base"], str(path))
        return manifest["name"], adapters, adapter_tensors(packed, root)

    @staticmethod
    def inspect(path: Path) -> dict[str, Any]:
        """The manifest of the adapter, after checking every checksum."""
        from trimtab.artifacts.expand import adapter_manifest

        packed = Packed(path)
        packed.verify()
        return adapter_manifest(packed)

    @staticmethod
    def places(path: Path) -> list[dict[str, Any]]:
        """Entries as a manifest's."""
        from trimtab.artifacts.expand import adapter_manifest

        return adapter_manifest(Packed(path))["places"]

    @staticmethod
    def save(model: nn.Module, path: Path, name: str) -> Path:
        """Not offered: compressing loses values, which saving must not do by itself."""
        raise Unsupported(f"saving {name!r} compressed would lose digits silently; tt.save it, then tt.compress it to {path}")


FORMATS["packed"] = _Format()
