"""Attentions of transformers that write their scores out (GPT-J, BLOOM, CodeGen): learned keys and values join where the cache
hands out the sequence's, and in the mask. The cache itself holds the sequence alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trimtab.compat.bodies import layer_cache, looks_ahead, named
from trimtab.core.errors import Unsupported
from trimtab.core.site import base_class
from trimtab.core.tokens import Beside, Call, Inserted, attend, expected, passages, widened

if TYPE_CHECKING:
    from trimtab.core.host import Host

__all__ = ["attention"]


class _Joining:
    """A cache whose answers begin with learned keys and values; ``cache`` may be None."""

    def __init__(self, cache: Any, join: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]):
        self.cache, self.join = cache, join

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.cache is not None:
            key, value = self.cache.update(key, value, *args, **kwargs)
        return self.join(key, value)

    def get_seq_length(self, *args: Any) -> Any:
        return 0 if self.cache is None else self.cache.get_seq_length(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["cache"], name)


def attention(host: Host, module: nn.Module, inner: Callable[[tuple, dict], Any], args: tuple, kwargs: dict) -> Any:
    """The forward of an attention that gets its cache as an argument and its additive mask as ``attention_mask``.

    Raises:
        Unsupported: a gated prefix, or tokens in line: what this attention compares cannot be reached from outside; or a mask
            that is not additive.
    """
    x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    name, extras = layer_cache(module), host.extras(x.shape[0])
    args, kwargs = (), named(module, args, kwargs)
    if any(extra.gate is not None for extra in extras) or any(isinstance(p, Inserted) for p in passages()):
        raise Unsupported(f"gated prefixes and tokens in line need scores that torch computes; {host.path} writes them out itself")
    cache, mask = kwargs.get(name), kwargs.get("attention_mask")
    cache = getattr(cache, "self_attention_cache", cache)  # the half of an encoder-decoder's that this attention takes of it
    ahead = looks_ahead(module)
    if ahead and cache is not None and cache.get_seq_length():
        raise Unsupported(f"the tokens of {host.path} see later ones, so that none of them can be kept; use_cache=False")
    if mask is not None and not mask.is_floating_point():
        raise Unsupported(f"the mask of {host.path} is boolean and its scores are its own: does True hide or show? Nothing tells")
    count, seen = expected(host.path, extras, x.shape[0])
    if mask is None and ahead:
        mask = x.new_zeros(1, 1, x.shape[1], x.shape[1])
    elif mask is None:
        mask = _causal(x, 0 if cache is None else cache.get_seq_length())

    def join(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        call = Call(key, key, value)
        attend(host.path, extras, call, lambda call: (call.query, None), axis=-2)
        return call.key, call.value

    kwargs = {**kwargs, name: _Joining(cache, join), "attention_mask": widened(mask, count, seen)}
    if kwargs.get("alibi") is not None:
        kwargs["alibi"] = torch.cat([_bias(module, host.path, kwargs["alibi"], count, x.shape[0]), kwargs["alibi"]], -1)
    y = inner(args, kwargs)
    weights = y[1] if isinstance(y, tuple) and len(y) > 1 else None
    return (y[0], weights[..., count:], *y[2:]) if isinstance(weights, Tensor) and weights.dim() == 4 else y


def _causal(x: Tensor, past: int) -> Tensor:
    """The additive mask ``(1, 1, t, s)`` of a sequence without padding."""
    t, s = x.shape[1], x.shape[1] + past
    hidden = torch.ones(t, s, dtype=torch.bool, device=x.device).triu(past + 1)
    return torch.zeros(1, 1, t, s, dtype=x.dtype, device=x.device).masked_fill(hidden, torch.finfo(x.dtype).min)


def _bias(module: nn.Module, path: str, alibi: Tensor, count: int, n: int) -> Tensor:
    """The bias ``(n heads, 1, count)`` of learned tokens: by position before the sequence where they have one, else zero."""
    bias = alibi.new_zeros(*alibi.shape[:-1], count)
    build = getattr(sys.modules[base_class(module).__module__], "build_alibi_tensor", None)
    start = 0
    for passage in passages():
        if not isinstance(passage, Beside) or path not in passage.found:
            continue
        p = passage.found[path][0].shape[-2]
        if passage.before and build is not None:
            line = build(torch.ones(1, p + 1, dtype=torch.long, device=alibi.device), alibi.shape[0] // n, alibi.dtype)
            bias[..., start : start + p] = (line[..., :p] - line[..., p:]).repeat(n, 1, 1)
        start += p
    return bias
