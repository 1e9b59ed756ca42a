"""Learned tokens in the sequence of a causal model: ``[P; x]`` as its body runs it, with the outputs at P taken out again.

What a model makes of tokens in front may reach what follows by other ways than the keys and values of its attention: recurrent
states, convolutions, shifts by a token, keys that several queries pool. There P must be in the sequence itself. It stands behind
the padding at the left of its row, where a recurrence has it directly in front of the text, and it is in the cache: a call whose
cache has begun goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trimtab.core.errors import Unsupported

if TYPE_CHECKING:
    from trimtab.core.host import Host
    from trimtab.core.tokens import Acting

__all__ = ["in_sequence"]

Inner = Callable[[tuple, dict], Any]
_KNOWN = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache_position", "token_type_ids")


@dataclass(eq=False)
class _Layout:
    """Rows of ``count`` learned tokens and a text: ``lead`` (n,) tokens of padding stand in front of them; None: none."""

    count: int
    lead: Tensor | None

    def join(self, front: Tensor, text: Tensor) -> Tensor:
        """``front`` (n, p, ...) and ``text`` (n, t, ...) as the rows have them."""
        both = torch.cat([front, text], 1)
        if self.lead is None:
            return both
        at, lead = torch.arange(both.shape[1], device=both.device)[None], self.lead[:, None]
        index = torch.where(at < lead, at + self.count, torch.where(at < lead + self.count, at - lead, at))
        return _gather(both, index)

    def text(self, rows: Tensor) -> Tensor:
        """The text's part of ``rows`` (n, p + t, ...)."""
        if self.lead is None:
            return rows[:, self.count :].contiguous()
        at = torch.arange(rows.shape[1] - self.count, device=rows.device)[None]
        return _gather(rows, torch.where(at < self.lead[:, None], at, at + self.count))


def _gather(rows: Tensor, index: Tensor) -> Tensor:
    index = index.expand(rows.shape[0], -1)
    return rows.gather(1, index.reshape(*index.shape, *(1,) * (rows.dim() - 2)).expand(-1, -1, *rows.shape[2:]))


@dataclass(eq=False)
class _Begun:
    """What a cache that begins with learned tokens knows of them; ``mask`` is the text's, if rows differ in their tokens.

    ``acting`` is None in a cache that came from a file: whose tokens they are is no longer known.
    """

    acting: Acting | None
    seen: Tensor | None
    count: int
    mask: Tensor | None

    def of(self, acting: Acting) -> bool:
        """Whether they are the tokens of the adapters that act."""
        return self.acting is None or (self.acting.adapters == acting.adapters and self.acting.rows == acting.rows)

    def __deepcopy__(self, memo: dict) -> _Begun:
        return replace(self)  # a copied cache is the same adapters'

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "acting": None}


def in_sequence(host: Host, module: nn.Module, acting: Acting, inner: Inner, args: tuple, kwargs: dict) -> Any:
    """The body ``module`` on ``[P; x]``: its output for x; or on x alone, where P is in the call's cache already.

    Raises:
        Unsupported: the cache was filled without these tokens, or has no room for them; an argument for every token of the text
            of which nobody knows what it is for learned ones; rows of unequal tokens in a model without a mask.
    """
    from trimtab.compat import states
    from trimtab.compat.bodies import named, takes

    call = named(module, args, kwargs)
    x = call["inputs_embeds"] if call.get("inputs_embeds") is not None else call["input_ids"]
    _check(host, call, x)
    state = states.state_of(call)
    begun = None
    if state is not None and states.used(state):
        begun = _begun(host, state, acting)
        if begun is not None:
            tokens, seen = torch.empty(x.shape[0], begun.count, 0, device=x.device), begun.seen
        else:  # a list of tensors (RWKV): the model made it in a call like this one
            tokens, seen = acting.tokens(x.shape[0])
    else:
        tokens, seen = acting.tokens(x.shape[0])
        if state is not None and states.static(state):
            raise Unsupported(
                f"the learned tokens at {host.path or 'the model'} stand in the sequence, and a static cache has room for the text "
                "alone; use a dynamic one"
            )
    if seen is not None and not takes(module, "attention_mask"):
        raise Unsupported("rows of a batch have different numbers of learned tokens, and this model takes no attention_mask")
    starts = state is None or not states.used(state)
    mask = _text_mask(call, x, seen, None if begun is None else begun.mask)
    layout = _Layout(tokens.shape[1], None if mask is None else (mask.cumsum(1) == 0).sum(1))
    changed = dict(call)
    if mask is not None:
        front = mask.new_ones(mask.shape[0], layout.count) if seen is None else seen.to(mask.dtype)
        changed["attention_mask"] = layout.join(front, mask)
    own = layout.count if seen is None else seen.sum(1, keepdim=True)
    _move(changed, layout, own, x.shape[1], starts=starts)
    if starts:
        embedded = x if x.is_floating_point() else module.get_input_embeddings()(x)
        changed.pop("input_ids", None)
        changed["inputs_embeds"] = layout.join(tokens.to(embedded.dtype).expand(x.shape[0], -1, -1), embedded)
    note = _Begun(acting, seen, layout.count, mask if seen is not None else None)
    if state is not None:
        states.hold(state, layout.count, note)
    with states.opened(state):
        y = inner((), changed)
    made = states.state_of(y) if state is None and hasattr(y, "keys") else None
    if made is not None:
        states.hold(made, layout.count, note)
    return _cut(y, _Shape(layout, x.shape[0], x.shape[1], starts))


def _begun(host: Host, state: Any, acting: Acting) -> _Begun | None:
    """What is known of the tokens at the beginning of ``state``; None if it cannot hold that."""
    from trimtab.compat import states

    if isinstance(state, list | tuple):
        return None
    begun = states.held(state)
    if begun is None or not begun.of(acting):
        raise Unsupported(
            f"this cache was filled without the learned tokens that act at {host.path or 'the model'} now; they stand at the "
            "beginning of the sequence, so start with a new cache"
        )
    return begun


def _check(host: Host, call: Mapping[str, Any], x: Tensor) -> None:
    mask = call.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        raise Unsupported(
            f"the learned tokens at {host.path or 'the model'} stand in the sequence, and this call's attention_mask is already "
            "made for the text alone; give one of (rows, tokens), or None, and a dynamic cache"
        )
    others = {key: value for key, value in call.items() if key not in _KNOWN and isinstance(value, Tensor)}
    strange = [key for key, value in others.items() if value.dim() > 1 and value.shape[:2] == x.shape[:2]]
    if strange:
        raise Unsupported(
            f"the model reads {strange[0]} for every token of the text, and learned tokens in the sequence have none; leave it out"
        )


def _text_mask(call: Mapping[str, Any], x: Tensor, seen: Tensor | None, before: Tensor | None) -> Tensor | None:
    """The mask of the text, ``(n, tokens so far)``: the call's, or one of ones where rows differ in their learned tokens."""
    mask = call.get("attention_mask")
    if mask is not None:
        return mask.expand(x.shape[0], -1)
    if seen is None:
        return None
    new = torch.ones(x.shape[:2], dtype=torch.long, device=x.device)
    return new if before is None else torch.cat([before, new], 1)


def _move(call: dict[str, Any], layout: _Layout, own: int | Tensor, t: int, *, starts: bool) -> None:
    """Positions and types of the text, moved up by a row's ``own`` tokens; in the first call those of learned tokens in front."""
    positions, line = call.get("position_ids"), call.get("cache_position")
    if positions is not None:
        rows = [t.shape[0] for t in (layout.lead, own) if isinstance(t, Tensor)]
        n = max([positions.shape[-2], *rows])
        flat = positions.expand(*positions.shape[:-2], n, t).reshape(-1, n, t)
        moved = [_positions(each, layout, own, starts=starts) for each in flat]
        call["position_ids"] = torch.stack(moved).reshape(*positions.shape[:-2], n, -1)
    if line is not None:
        front = line[:1] + torch.arange(layout.count, device=line.device)
        call["cache_position"] = torch.cat([front, line + layout.count]) if starts else line + layout.count
    types = call.get("token_type_ids")
    if types is not None and starts:
        call["token_type_ids"] = layout.join(types.new_zeros(types.shape[0], layout.count), types)


def _positions(own_text: Tensor, layout: _Layout, own: int | Tensor, *, starts: bool) -> Tensor:
    moved = own_text + own
    if not starts:
        return moved
    t = own_text.shape[1]
    first = own_text[:, :1] if layout.lead is None else own_text.gather(1, layout.lead.clamp(max=t - 1)[:, None])
    steps = torch.arange(layout.count, device=own_text.device)[None] - layout.count + own
    return layout.join(first + steps.clamp(min=0), moved)


# -- the output


@dataclass(eq=False)
class _Shape:
    layout: _Layout
    n: int
    t: int
    starts: bool


def _cut(y: Any, shape: _Shape) -> Any:
    """A model's output (a tensor, a tuple, or a model output with named fields) without what it gives for learned tokens."""
    if isinstance(y, Tensor):
        return _cut_tensor(y, shape)
    if isinstance(y, tuple) and not hasattr(y, "_fields"):
        return tuple(_cut(each, shape) for each in y)
    if hasattr(y, "keys"):
        for key in list(y.keys()):
            if isinstance(y[key], Tensor | tuple) and key != "past_key_values":
                y[key] = _cut(y[key], shape)
    return y


def _cut_tensor(y: Tensor, shape: _Shape) -> Tensor:
    layout, full = shape.layout, shape.t + shape.layout.count * shape.starts
    if y.dim() == 4 and y.shape[-2] == full and y.shape[-1] >= full:  # attention weights
        if shape.starts:
            y = layout.text(y.transpose(1, 2)).transpose(1, 2)
        return layout.text(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    if shape.starts and y.dim() > 1 and y.shape[:2] == (shape.n, full):
        return layout.text(y)
    if shape.starts and y.dim() == 2 and y.shape[0] == shape.n * full:  # the routers' logits
        return layout.text(y.unflatten(0, (shape.n, full))).flatten(0, 1)
    if shape.starts and y.dim() == 3 and y.shape[0] == shape.n and y.shape[1] > full and y.shape[1] % full == 0:
        raise Unsupported(
            f"the model gives {y.shape[1] // full} outputs for every token, and which of them belong to learned tokens is not known"
        )
    return y
