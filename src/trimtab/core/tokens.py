"""Learned tokens inside attention: keys and values that every query sees beside the sequence's own.

The sequence, its positions, its masks and its cache stay as they are: the extra keys and values join at the moment of the
attention, in front of the others, and are in no cache. So generation with a cache, of whatever kind, equals generation
without.

*Passages* tell an attention module what to do while a block or a stack runs. They are a value, not a state of the module: two
threads can run one model, and a checkpointed block that runs again in backward gets the passages of its own first run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from trimtab.core.errors import Unsupported

if TYPE_CHECKING:
    from trimtab.core.contracts import TokenAdapter

__all__ = ["Acting", "Beside", "Extra", "Inserted", "Recorder", "Without", "attend", "entered", "expected", "passages", "widened"]


@dataclass(eq=False)
class Extra:
    """Keys and values of learned tokens at one attention.

    Attributes:
        key, value: ``(n or 1, heads, p, size)``, or ``(n or 1, p, width)`` before they are split into heads.
        seen: which of them a row has, ``(n, p)``; None: all.
        gate: a factor for the rows, ``(n or 1,)``, of an attention of their own that is added; None: they share the softmax.
    """

    key: Tensor
    value: Tensor
    seen: Tensor | None = None
    gate: Tensor | None = None


@dataclass(eq=False)
class Recorder:
    """Learned tokens run alone: every attention notes its keys and values here, by the path of the module."""

    found: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass(eq=False)
class Beside:
    """What a recorder noted: the attentions add it.

    Attributes:
        found: path of the attention -> keys and values ``(n or 1, heads, p, size)``.
        seen: as in ``Extra``.
        before: whether the tokens stand at -p to -1, before the sequence; else at no position.
    """

    found: dict[str, tuple[Tensor, Tensor]]
    seen: Tensor | None = None
    before: bool = False


@dataclass(eq=False)
class Inserted:
    """The first ``count`` tokens of the sequence are learned ones, of which the masks know nothing. ``seen`` as in ``Extra``."""

    count: int
    seen: Tensor | None = None


@dataclass(eq=False)
class Without:
    """The keys and values of the adapters that stand at the attention ``path`` do not act."""

    path: str


Passage = Recorder | Beside | Inserted | Without


class _Scope:
    """The passages of this thread and context. torch.compile cannot trace a ContextVar; a compiled graph uses a plain list."""

    def __init__(self) -> None:
        self.variable: ContextVar[tuple[Passage, ...]] = ContextVar("trimtab_passages", default=())
        self.traced: list[tuple[Passage, ...]] = [()]

    def get(self) -> tuple[Passage, ...]:
        return self.traced[0] if torch.compiler.is_compiling() else self.variable.get()

    def set(self, value: tuple[Passage, ...]) -> None:
        if torch.compiler.is_compiling():
            self.traced[0] = value
        else:
            self.variable.set(value)


_SCOPE = _Scope()


def passages() -> tuple[Passage, ...]:
    """What holds where the program is now."""
    return _SCOPE.get()


@contextmanager
def entered(value: tuple[Passage, ...]) -> Iterator[None]:
    """``value`` holds inside the block."""
    before = _SCOPE.get()
    _SCOPE.set(value)
    try:
        yield
    finally:
        _SCOPE.set(before)


# -- what acts, the same for all rows or row by row


class Acting:
    """Token adapters that act with one duty at a module: for all rows, or (``tt.routed``) a chain for each row."""

    def __init__(self, adapters: Sequence[TokenAdapter] = (), rows: Sequence[tuple[TokenAdapter, ...]] | None = None):
        self.rows = None if rows is None else tuple(rows)
        self.adapters = tuple(adapters if rows is None else dict.fromkeys(a for row in rows for a in row))

    def tokens(self, n: int) -> tuple[Tensor, Tensor | None]:
        """The tokens that enter, ``(1 or n, p, width)``, and which of them a row has, ``(n, p)`` or None for all.

        Rows with fewer tokens have zeros in front.
        """
        return self._gather(n, lambda adapter: adapter.tokens(), self.adapters, self.rows)

    def extras(self, n: int) -> list[Extra]:
        """Keys and values, not split into heads: ``(1 or n, p, width)``."""
        found = []
        plain, plain_rows = self._where(lambda a: a.gate() is None)
        if plain:
            key, seen = self._gather(n, lambda a: a.keys_values()[0], plain, plain_rows)
            value, _ = self._gather(n, lambda a: a.keys_values()[1], plain, plain_rows)
            found.append(Extra(key, value, seen))
        gated, gated_rows = self._where(lambda a: a.gate() is not None)
        if gated_rows is None:
            found += [Extra(*(t[None] for t in a.keys_values()), None, a.gate().view(1)) for a in gated]
        elif gated:
            found.append(self._gated_rows(n, gated, gated_rows))
        return found

    def _where(self, test: Callable[[TokenAdapter], bool]) -> tuple[list[TokenAdapter], list[tuple[TokenAdapter, ...]] | None]:
        if self.rows is None:
            return [a for a in self.adapters if test(a)], None
        rows = [tuple(a for a in row if test(a)) for row in self.rows]
        return list(dict.fromkeys(a for row in rows for a in row)), rows

    def _gated_rows(self, n: int, gated: list[TokenAdapter], rows: list[tuple[TokenAdapter, ...]]) -> Extra:
        if max(map(len, rows)) > 1:
            raise Unsupported("tt.routed takes at most one gated prefix a row; give the row one of them")
        key, seen = self._gather(n, lambda a: a.keys_values()[0], gated, rows)
        value, _ = self._gather(n, lambda a: a.keys_values()[1], gated, rows)
        zero = gated[0].gate().new_zeros(1)
        gate = torch.cat([row[0].gate().view(1) if row else zero for row in rows]).repeat_interleave(n // len(rows))
        if seen is not None:  # a row without tokens has a gate of zero, but its softmax needs something to look at
            seen = seen | ~seen.any(1, keepdim=True)
        return Extra(key, value, seen, gate)

    def _gather(
        self, n: int, make: Callable[[TokenAdapter], Tensor], adapters: Sequence[TokenAdapter], rows: Sequence[tuple] | None
    ) -> tuple[Tensor, Tensor | None]:
        if rows is None:
            return torch.cat([make(adapter) for adapter in adapters])[None], None
        if n % len(rows):
            raise Unsupported(f"tt.routed was given {len(rows)} rows, but the batch has {n}; give one name a row of the batch")
        made = {adapter: make(adapter) for adapter in adapters}
        template = made[adapters[0]]
        chains = list(dict.fromkeys(rows))
        joined = [torch.cat([made[a] for a in chain]) if chain else template[:0] for chain in chains]
        most = max(t.shape[0] for t in joined)
        stacked = torch.stack([F.pad(t, (0, 0, most - t.shape[0], 0)) for t in joined])  # (chains, p, width)
        index = torch.tensor([chains.index(row) for row in rows], device=template.device).repeat_interleave(n // len(rows))
        if all(t.shape[0] == most for t in joined):
            return stacked[index], None
        lengths = torch.tensor([t.shape[0] for t in joined], device=template.device)
        seen = torch.arange(most, device=template.device) >= (most - lengths)[:, None]  # (chains, p)
        return stacked[index], seen[index]


# -- attention with extras


@dataclass(eq=False)
class Call:
    """An attention's arguments, heads second and tokens third.

    Attributes:
        query, key, value: ``(n, heads, t, size)``, ``(n, key heads, s, size)`` twice.
        mask: boolean (True: seen) or additive, 4-d, or ``(n, s)``; None: none.
        causal: where there is no mask, whether query i sees keys 0 to i only.
        additive: whether a mask must be additive.
        scale: factor of the scores; None: ``size ** -0.5``.
        bare: whether it is ``softmax(scale q k^T + mask) v`` and nothing more (no weights are asked for, nothing drops out).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    causal: bool = False
    additive: bool = False
    scale: float | None = None
    bare: bool = False
    #: rows that were put in front of the queries for the causal pattern's sake, and columns in front of the keys
    rows: int = 0
    columns: int = 0


def attend(
    path: str, own: Sequence[Extra], call: Call, run: Callable[[Call], tuple[Tensor, Tensor | None]], *, axis: int
) -> tuple[Tensor, Tensor | None]:
    """The attention ``run`` with the keys and values of learned tokens beside the sequence's own.

    Args:
        path: of the attention module.
        own: extras of adapters at the module itself, not split into heads.
        run: the model's own attention: output with its tokens at ``axis``, and weights ``(n, heads, t, s)`` or None.

    Returns:
        Output and weights, for the model's own queries; weights of its own keys alone.
    """
    plain, gated, inserted = [], [], 0
    for passage in passages():
        if isinstance(passage, Recorder):
            passage.found[path] = (call.key, call.value)
        elif isinstance(passage, Inserted):
            inserted = passage.count
            _widen_inserted(call, passage)
        elif isinstance(passage, Beside) and path in passage.found:
            plain.append(Extra(*passage.found[path], passage.seen))
    for extra in own:
        (plain if extra.gate is None else gated).append(_split(extra, call))
    query = call.query
    if plain and call.bare and query.shape[-2] == 1:
        out, weights = _next_token(call, plain).transpose(axis, -2), None
    else:
        if plain:
            _join(call, plain)
        out, weights = run(call)
    if call.rows:
        out = out.narrow(axis, call.rows, query.shape[-2])
    for extra in gated:
        out = out + _gated(query, extra, call.scale).transpose(axis, -2).to(out.dtype)
    if weights is not None and (call.columns or inserted):
        weights = weights[..., call.rows + inserted :, call.columns + inserted :]
    return out, weights


def _split(extra: Extra, call: Call) -> Extra:
    """Keys and values in as many heads as the call's: ``(n or 1, p, width) -> (n or 1, heads, p, size)``."""
    both = []
    for given, like in ((extra.key, call.key), (extra.value, call.value)):
        heads, size = like.shape[-3], like.shape[-1]
        own = given.shape[-1] // size
        if given.shape[-1] % size or own == 0 or heads % own:
            raise Unsupported(
                f"learned keys of width {given.shape[-1]} do not fit an attention of {heads} heads of {size} channels: this "
                "attention mixes heads into the batch before it compares them; target another place"
            )
        tensor = given.unflatten(-1, (own, size)).transpose(-2, -3)
        # an attention that repeats its key heads itself was given the repeated ones
        both.append((tensor if own == heads else tensor.repeat_interleave(heads // own, -3)).to(like.dtype))
    return Extra(*both, extra.seen, extra.gate)


def _join(call: Call, extras: list[Extra]) -> None:
    """Put the extras in front of the keys and values, and widen the mask (or the causal pattern) to match."""
    n, count = call.key.shape[0], sum(extra.key.shape[-2] for extra in extras)
    if call.causal and call.mask is None and call.key.shape[-2] > call.query.shape[-2]:
        # an empty static cache holds room behind the tokens, which the causal pattern does not reach
        call.key, call.value = (t[..., : call.query.shape[-2], :] for t in (call.key, call.value))
    seen = _seen(extras, n) if any(extra.seen is not None for extra in extras) else None
    if call.mask is not None or seen is not None:
        call.mask = widened(_mask(call), count, seen)
        call.causal = False
    elif call.causal:
        # as many queries in front, so that the pattern still fits: each of the others sees all extras
        call.query = F.pad(call.query, (0, 0, count, 0))
        call.rows = count
    for name in ("key", "value"):
        like = getattr(call, name)
        front = [getattr(extra, name).to(like.dtype).expand(n, -1, -1, -1) for extra in extras]
        setattr(call, name, torch.cat([*front, like], -2))
    call.columns = count


def _next_token(call: Call, extras: list[Extra]) -> Tensor:
    """The attention of one query, ``(n, heads, 1, size)``: scores join, and the keys and values of a long cache are not copied."""
    n, heads, size = call.query.shape[0], call.key.shape[-3], call.query.shape[-1]
    scale = size**-0.5 if call.scale is None else call.scale
    query = scale * call.query.reshape(n, heads, -1, size).transpose(-1, -2)  # (n, key heads, size, group)
    scores, values = [], [*(extra.value.to(call.value.dtype) for extra in extras), call.value]
    for extra in extras:
        found = extra.key.to(query.dtype) @ query  # (n, key heads, p, group)
        scores.append(found if extra.seen is None else found.masked_fill(~extra.seen[:, None, :, None], float("-inf")))
    found = call.key @ query
    if call.mask is not None:
        shape = (call.mask.shape[0], heads if call.mask.shape[1] > 1 else 1, -1, call.mask.shape[-1])
        mask = call.mask.reshape(shape).transpose(-1, -2)
        found = found.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else found + mask
    weights = torch.cat([*scores, found], -2).softmax(-2, dtype=torch.float32).to(call.value.dtype).transpose(-1, -2)
    parts = weights.split([value.shape[-2] for value in values], -1)
    out = sum(part @ value for part, value in zip(parts, values, strict=True))  # (n, key heads, group, size)
    return out.reshape(n, call.query.shape[-3], 1, -1)


def _seen(extras: list[Extra], n: int) -> Tensor:
    """Which extras a row has, ``(n, p)``."""
    device = extras[0].key.device
    full = [torch.ones(n, e.key.shape[-2], dtype=torch.bool, device=device) if e.seen is None else e.seen for e in extras]
    return torch.cat(full, 1)


def expected(path: str, own: Sequence[Extra], n: int) -> tuple[int, Tensor | None]:
    """How many extras will join at the attention ``path``, and which of them a row has, ``(n, p)`` or None for all."""
    found = [Extra(*p.found[path], p.seen) for p in passages() if isinstance(p, Beside) and path in p.found]
    found += [extra for extra in own if extra.gate is None]
    count = sum(extra.key.shape[-2] for extra in found)
    return count, _seen(found, n) if any(extra.seen is not None for extra in found) else None


def _mask(call: Call) -> Tensor:
    """The call's mask; where it has none, one that says what its pattern is."""
    if call.mask is not None:
        return call.mask
    t, s = call.query.shape[-2], call.key.shape[-2]
    mask = torch.ones(1, 1, t if call.causal else 1, s, dtype=torch.bool, device=call.key.device)
    mask = mask.tril() if call.causal else mask
    return _additive(mask, call.query.dtype) if call.additive else mask


def widened(mask: Tensor, count: int, seen: Tensor | None) -> Tensor:
    """A mask, ``(1 or n, heads, t, s)`` or ``(n, s)``, with ``count`` columns in front, seen by all queries (of their rows)."""
    if seen is None:
        # the same mask serves all layers: it is widened once
        known = getattr(mask, "_trimtab_wide", None)
        if known is None or known[0] != count:
            mask._trimtab_wide = known = count, F.pad(mask, (count, 0), value=0.0 if mask.is_floating_point() else 1.0)
        return known[1]
    if mask.dim() == 2:
        return torch.cat([seen.to(mask.dtype), mask], -1)
    columns = seen[:, None, None, :] if mask.dtype == torch.bool else _additive(seen[:, None, None, :], mask.dtype)
    n = columns.shape[0]
    return torch.cat([columns.expand(n, *mask.shape[1:3], -1), mask.expand(n, -1, -1, -1)], -1)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """True becomes 0 and False the least number."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def _widen_inserted(call: Call, passage: Inserted) -> None:
    """Give a mask of the sequence alone the rows and columns of the tokens in front of it.

    Their columns are seen by all. Their rows take what the sequence's first token sees: all tokens that are no padding in a
    model whose tokens see each other, and none but the first in a causal one, so that nothing of the future leaks.
    """
    count, mask = passage.count, call.mask
    if mask is not None and mask.shape[-1] == call.key.shape[-2]:
        return  # made inside the block, with the tokens in it
    if mask is not None:
        if mask.dim() > 2 and mask.shape[-2] > 1:
            mask = torch.cat([mask[..., :1, :].expand(*mask.shape[:-2], count, -1), mask], -2)
    elif passage.seen is None:
        return
    narrow = Call(call.query, call.key[..., count:, :], call.value, mask, call.causal, call.additive)
    call.mask = widened(_mask(narrow), count, passage.seen)


def _gated(query: Tensor, extra: Extra, scale: float | None) -> Tensor:
    """``gate * softmax(q K^T) V`` over the extras alone, ``(n, heads, t, size)``."""
    groups = query.shape[-3] // extra.key.shape[-3]
    key, value = (t.repeat_interleave(groups, -3).expand(query.shape[0], -1, -1, -1) for t in (extra.key, extra.value))
    mask = None if extra.seen is None else extra.seen[:, None, None, :]
    out = F.scaled_dot_product_attention(query, key.to(query.dtype), value.to(query.dtype), mask, scale=scale)
    return extra.gate.to(out.dtype).view(-1, 1, 1, 1) * out
