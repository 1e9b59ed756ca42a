"""Entropy coding of ternary pieces with the counts that they have, and which entries share counts.

A ranking over a whole adapter leaves very unequal densities: more of a LoRA's A is kept than of its B, and some rows of A (the
rank's components) more than others. Entries are therefore coded by *class*: either every piece (a tensor, or rows of a large one)
is a class, or every row or column of a piece joins one of 1 to 32 classes of similar density. What costs fewest bits is taken,
the counts and the classes' numbers included; those are part of the coded stream. With counts ``(minus, plus)`` of the ``N`` entries
of a class known, its entries cost ``N H(minus / N, plus / N)`` bits and nothing else, so no float is ever stored.

Five entries make one symbol of 3^5 = 243, whose probability is the product of theirs: a fifth of the coder's steps. The coder is
constriction's ANS (package ``constriction``), 24-bit probabilities.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimtab.core.errors import CheckpointMismatch, Unsupported

__all__ = ["MOST", "decode", "encode", "from_trits", "to_trits"]

MOST = 1 << 23  # entries in one call: a class's size must stay below the coder's 2^24
CLASSES = (1, 2, 4, 8, 16, 32)
LEAST = 32  # entries of a row or column below which it is no segment of its own
WHOLE, ROWS, COLUMNS = range(3)
GROUP = 5
_PLACES = 3 ** np.arange(GROUP - 1, -1, -1)
Symbols = NDArray[np.int8]
Shape = tuple[int, int]


def to_trits(symbols: Symbols, fill: int = 0) -> NDArray[np.uint8]:
    """(n,) entries to (ceil(n / 5),) numbers below 243, the last one filled up with ``fill``."""
    padded = np.full(-(-len(symbols) // GROUP) * GROUP, fill + 1, np.uint8)
    padded[: len(symbols)] = symbols + 1
    value = np.zeros(len(padded) // GROUP, np.uint8)
    for digit in range(GROUP):
        value *= 3
        value += padded[digit::GROUP]
    return value


@functools.cache
def _table() -> Symbols:
    """(243, 5): the entries of every number."""
    return (np.arange(3**GROUP)[:, None] // _PLACES % 3 - 1).astype(np.int8)


def from_trits(values: NDArray[Any], n: int) -> Symbols:
    """The ``n`` entries that ``to_trits`` was given."""
    return _table()[values].reshape(-1)[:n]


def _coder() -> Any:
    try:
        import constriction
    except ImportError:
        raise Unsupported(
            "entropy coding needs the package constriction, which is not installed: pip install 'trimtab[coding]', or "
            "choose the coding rice, which needs nothing and takes about 1 % more"
        ) from None
    return constriction.stream


# -- which entries share counts


@dataclass
class _Plan:
    """Axes a piece, and a class a segment; ``classes`` is None where every piece is its own class."""

    axes: list[int]
    classes: NDArray[np.int64] | None
    count: int


def _segments(shapes: Sequence[Shape], axes: Sequence[int]) -> list[int]:
    """How many segments each piece has."""
    return [(1, rows, columns)[axis] for (rows, columns), axis in zip(shapes, axes, strict=True)]


def _lengths(shapes: Sequence[Shape], axes: Sequence[int]) -> NDArray[np.int64]:
    """Sizes of all segments, piece by piece."""
    sizes = [(rows * columns, columns, rows)[axis] for (rows, columns), axis in zip(shapes, axes, strict=True)]
    return np.repeat(np.array(sizes, np.int64), _segments(shapes, axes))


def _split(symbols: Symbols, shapes: Sequence[Shape]) -> Iterator[Symbols]:
    """The pieces as (rows, columns)."""
    start = 0
    for rows, columns in shapes:
        yield symbols[start : start + rows * columns].reshape(rows, columns)
        start += rows * columns


def _ordered(symbols: Symbols, shapes: Sequence[Shape], axes: Sequence[int]) -> Symbols:
    """The entries, segment by segment."""
    parts = [m.T.reshape(-1) if axis == COLUMNS else m.reshape(-1) for m, axis in zip(_split(symbols, shapes), axes, strict=True)]
    return np.concatenate(parts) if parts else symbols


def _stored(ordered: Symbols, shapes: Sequence[Shape], axes: Sequence[int]) -> Symbols:
    """The inverse of ``_ordered``."""
    turned = [shape[::-1] if axis == COLUMNS else shape for shape, axis in zip(shapes, axes, strict=True)]
    parts = [m.T.reshape(-1) if axis == COLUMNS else m.reshape(-1) for m, axis in zip(_split(ordered, turned), axes, strict=True)]
    return np.concatenate(parts) if parts else ordered


def _bits(part: NDArray[Any], whole: NDArray[Any]) -> NDArray[np.float64]:
    """``whole H(part / whole)`` in bits, elementwise."""
    part, whole = np.asarray(part, np.float64), np.asarray(whole, np.float64)
    share = np.clip(part / np.maximum(whole, 1), 1e-300, 1)
    rest = np.clip(1 - share, 1e-300, 1)
    return -part * np.log2(share) - (whole - part) * np.log2(rest)


def _cost(kept: NDArray[Any], plus: NDArray[Any], sizes: NDArray[Any]) -> float:
    """Bits of classes with these counts, the counts included."""
    total = _bits(kept, sizes) + _bits(plus, kept) + np.log2(np.asarray(sizes) + 1.0) + np.log2(np.asarray(kept) + 1.0)
    return float(total.sum())


def _axis(piece: Symbols) -> int:
    """How to cut a piece: what would be cheapest if every segment had counts of its own."""
    rows, columns = piece.shape
    costs = {WHOLE: _cost(np.count_nonzero(piece), (piece > 0).sum(), np.int64(piece.size))}
    for axis, number, size in ((ROWS, rows, columns), (COLUMNS, columns, rows)):
        if number > 1 and size >= LEAST:
            kept = np.count_nonzero(piece, axis=2 - axis)
            costs[axis] = float((_bits(kept, np.full(number, size)) + np.log2(size + 1.0)).sum()) + float(kept.sum())
    return min(costs, key=costs.__getitem__)


def _classes(kept: NDArray[Any], sizes: NDArray[Any], count: int) -> NDArray[np.int64]:
    """``count`` classes of segments by density, so that their common code is short: k-means in code length, in one dimension."""
    order = np.argsort(kept / np.maximum(sizes, 1), kind="stable")
    mass = np.cumsum(sizes[order])
    found = np.empty(len(sizes), np.int64)
    found[order] = np.minimum((mass - sizes[order] / 2) * count // max(1, int(mass[-1])), count - 1)
    for _ in range(6):
        z = np.bincount(found, kept, count)
        p = (z + 0.5) / (np.bincount(found, sizes, count) + 1)
        best = (-kept[:, None] * np.log2(p) - (sizes - kept)[:, None] * np.log2(1 - p)).argmin(1)
        if np.array_equal(best, found):
            break
        found = best
    return found


def _plan(symbols: Symbols, shapes: Sequence[Shape]) -> _Plan:
    pieces = list(_split(symbols, shapes))
    alone = [WHOLE] * len(pieces)
    sizes = _lengths(shapes, alone)
    kept, plus = (np.array([f(p) for p in pieces], np.int64) for f in (np.count_nonzero, lambda p: np.count_nonzero(p > 0)))
    least, plan = _cost(kept, plus, sizes), _Plan(alone, None, len(pieces))
    axes = [_axis(piece) for piece in pieces]
    sizes = _lengths(shapes, axes)
    ordered = _ordered(symbols, shapes, axes)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])[: len(sizes)]
    if not len(ordered) or not sizes.all():
        return plan
    kept, plus = (np.add.reduceat(m, starts, dtype=np.int64) for m in (ordered != 0, ordered > 0))
    whole = kept.sum(), plus.sum(), sizes.sum()
    if _cost(*whole) < least:
        least, plan = _cost(*whole), _Plan(alone, np.zeros(len(pieces), np.int64), 1)
    for count in CLASSES[1:]:
        if count >= len(sizes):
            break
        classes = _classes(kept, sizes, count)
        totals = [np.bincount(classes, values, count) for values in (kept, plus, sizes)]
        cost = _cost(*totals) + len(sizes) * np.log2(count) + len(pieces) * np.log2(3)
        if cost < least:
            least, plan = cost, _Plan(axes, classes, count)
    return plan


# -- the coded stream


def _model(plus: int, kept: int, size: int) -> Any:
    """The distribution of five entries of a class, from its counts."""
    one = np.array([kept - plus, size - kept, plus]) / size
    joint = np.ones(1)
    for _ in range(GROUP):
        joint = np.multiply.outer(joint, one).reshape(-1)
    return _coder().model.Categorical(joint, perfect=False)


def _uniform(size: int) -> Any:
    return _coder().model.Uniform(int(size))


def _gather(ordered: Symbols, sizes: NDArray[Any], classes: NDArray[Any], count: int) -> list[Symbols]:
    """For every class, its segments one after another."""
    stops = np.cumsum(sizes)
    parts: list[list[Symbols]] = [[] for _ in range(count)]
    for cls, stop, size in zip(classes.tolist(), stops.tolist(), sizes.tolist(), strict=True):
        parts[cls].append(ordered[stop - size : stop])
    return [np.concatenate(part) if part else ordered[:0] for part in parts]


def _scatter(streams: list[Symbols], sizes: NDArray[Any], classes: NDArray[Any]) -> Symbols:
    """The inverse of ``_gather``."""
    ordered, at, start = np.empty(int(sizes.sum()), np.int8), [0] * len(streams), 0
    for cls, size in zip(classes.tolist(), sizes.tolist(), strict=True):
        ordered[start : start + size] = streams[cls][at[cls] : at[cls] + size]
        start, at[cls] = start + size, at[cls] + size
    return ordered


def encode(symbols: Symbols, shapes: Sequence[Shape]) -> bytes:
    """The bytes of pieces of ``shapes`` (rows, columns), one after another in ``symbols`` (n,), n at most ``MOST``."""
    coder = _coder().stack.AnsCoder()
    if not len(symbols):
        return b""
    plan = _plan(symbols, shapes)
    sizes = _lengths(shapes, plan.axes)
    classes = np.arange(len(shapes)) if plan.classes is None else plan.classes
    streams = _gather(_ordered(symbols, shapes, plan.axes), sizes, classes, plan.count)
    written: list[tuple[Any, Any]] = []  # in the order of reading: the coder is a stack
    written.append((0 if plan.classes is None else plan.count, _uniform(max(CLASSES) + 1)))
    if plan.classes is not None and plan.count > 1:
        written.append((plan.axes, _uniform(3)))
        written.append((classes, _uniform(plan.count)))
    for stream in streams:
        if len(stream):
            kept, plus = np.count_nonzero(stream), np.count_nonzero(stream > 0)
            written.append((kept, _uniform(len(stream) + 1)))
            if kept:
                written.append((plus, _uniform(kept + 1)))
                common = int(np.argmax([kept - plus, len(stream) - kept, plus])) - 1
                written.append((to_trits(stream, common), _model(plus, kept, len(stream))))
    for values, model in reversed(written):
        coder.encode_reverse(np.atleast_1d(values).astype(np.int32), model)
    return coder.get_compressed().astype("<u4").tobytes()


def decode(payload: bytes, shapes: Sequence[Shape]) -> Symbols:
    """What ``encode`` was given.

    Raises:
        CheckpointMismatch: the bytes are no such stream.
    """
    if not sum(rows * columns for rows, columns in shapes):
        return np.zeros(0, np.int8)
    if len(payload) % 4:
        raise CheckpointMismatch(f"{len(payload)} bytes are no entropy-coded stream")
    try:
        coder = _coder().stack.AnsCoder(np.frombuffer(payload, "<u4").astype(np.uint32))
    except ValueError as error:
        raise CheckpointMismatch(f"no entropy-coded stream: {error}") from None
    count = coder.decode(_uniform(max(CLASSES) + 1))
    axes, classes = [WHOLE] * len(shapes), np.zeros(len(shapes), np.int64)
    if count > 1:
        axes = coder.decode(_uniform(3), len(shapes)).tolist()
        classes = coder.decode(_uniform(count), int(sum(_segments(shapes, axes)))).astype(np.int64)
    elif not count:
        classes, count = np.arange(len(shapes)), len(shapes)
    sizes = _lengths(shapes, axes)
    totals = np.bincount(classes, sizes, count).astype(np.int64)
    streams = [_decode_class(coder, int(total)) for total in totals]
    if not coder.is_empty():
        raise CheckpointMismatch(f"{coder.num_valid_bits()} bits of the entropy-coded stream are left over")
    return _stored(_scatter(streams, sizes, classes), shapes, axes)


def _decode_class(coder: Any, size: int) -> Symbols:
    kept = coder.decode(_uniform(size + 1)) if size else 0
    if not kept:
        return np.zeros(size, np.int8)
    plus = coder.decode(_uniform(kept + 1))
    stream = from_trits(coder.decode(_model(plus, kept, size), -(-size // GROUP)), size)
    found = np.count_nonzero(stream), np.count_nonzero(stream > 0)
    if found != (kept, plus):
        raise CheckpointMismatch(f"{found[0]} entries, {found[1]} of them +1, were decoded where {kept} and {plus} are announced")
    return stream
