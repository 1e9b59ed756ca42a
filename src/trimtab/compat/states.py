"""Where a generation keeps its state: transformers' caches of keys and values, of recurrent states, of both, and older kinds.

Learned tokens that stand in the sequence itself leave their traces in it. Such a state is marked: from outside it is as long as the
text alone, so that what counts its tokens (``generate``) goes on as without learned tokens, and nothing else writes into it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch import nn

from trimtab.core.errors import Unsupported

__all__ = ["begun_at", "hold", "held", "opened", "state_of", "static", "used"]

#: names of the argument (and of the output's field) that holds a state
_NAMES = ("past_key_values", "cache_params", "layer_past", "past_key_value", "state")
_WRITES = ("update", "update_conv_state", "update_recurrent_state")


def state_of(call: Mapping[str, Any]) -> Any:
    """The state among a call's arguments (or its output's fields), or None."""
    found = next((value for value in call.values() if hasattr(value, "get_seq_length")), None)
    return found if found is not None else next((call[name] for name in _NAMES if call.get(name) is not None), None)


def used(state: Any) -> bool:
    """Whether a sequence has begun in ``state``: it holds a key or a recurrent state.

    Raises:
        Unsupported: a state of a kind that does not tell.
    """
    layers = getattr(state, "layers", None)
    if layers is not None:
        return any(map(_used, layers))
    if hasattr(state, "self_attention_cache"):  # of an encoder-decoder
        return used(state.self_attention_cache)
    if hasattr(state, "get_seq_length"):
        return bool(state.get_seq_length() > 0)
    if hasattr(state, "seqlen_offset"):  # xLSTM
        return bool((state.seqlen_offset > 0).any())
    if isinstance(state, list | tuple):  # RWKV: the model makes it in the first call
        return True
    raise Unsupported(f"a {type(state).__name__} does not tell whether a sequence has begun in it; call the model without a cache")


def begun_at(state: Any, block: nn.Module) -> bool:
    """Whether ``block`` has a sequence in ``state``, which the blocks before it may have begun in this very call."""
    layers = getattr(state, "layers", None)
    index = next((m.layer_idx for m in block.modules() if isinstance(getattr(m, "layer_idx", None), int)), None)
    if layers is None or index is None:
        return used(state)
    return index < len(layers) and _used(layers[index])


def _used(layer: Any) -> bool:
    before = getattr(layer, "has_previous_state", False)
    if any(before.values()) if isinstance(before, dict) else bool(before):
        return True
    length = getattr(layer, "get_seq_length", None)
    return length is not None and bool(length() > 0)


def static(state: Any) -> bool:
    """Whether a cache has a fixed number of places for keys, so that learned tokens find no room in it."""
    return any("Static" in type(layer).__name__ for layer in getattr(state, "layers", None) or ())


def hold(state: Any, count: int, value: Any) -> None:
    """Mark ``state``: it begins with ``count`` learned tokens, of which ``value`` is to be known; ``held`` gives that back."""
    if isinstance(state, list | tuple):
        return
    state._trimtab_held, state._trimtab_front = value, count
    if hasattr(state, "get_seq_length") and not hasattr(type(state), "_trimtab_plain"):
        state._trimtab_open = False
        state.__class__ = _holding(type(state))


def held(state: Any) -> Any:
    """What ``hold`` was given; None if ``state`` was not marked."""
    return getattr(state, "_trimtab_held", None)


@contextmanager
def opened(state: Any) -> Iterator[None]:
    """Inside, a marked state is as long as it is, and may be written."""
    if not hasattr(type(state), "_trimtab_plain"):
        yield
        return
    before, state._trimtab_open = state._trimtab_open, True
    try:
        yield
    finally:
        state._trimtab_open = before


@cache
def _holding(plain: type) -> type:
    """The class of a marked cache of class ``plain``."""

    def get_seq_length(self: Any, *args: Any, **kwargs: Any) -> Any:
        length = plain.get_seq_length(self, *args, **kwargs)
        return length if self._trimtab_open or not used(self) else length - self._trimtab_front

    def writing(name: str) -> Any:
        def write(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not self._trimtab_open:
                raise Unsupported(
                    "this cache begins with learned tokens, and the adapter that put them there does not act in this call; "
                    "activate it again, or start with a new cache"
                )
            return getattr(plain, name)(self, *args, **kwargs)

        return write

    def reset(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.__class__ = plain
        return self.reset(*args, **kwargs)

    body = {name: writing(name) for name in _WRITES if hasattr(plain, name)}
    body |= {"get_seq_length": get_seq_length, "reset": reset} if hasattr(plain, "reset") else {"get_seq_length": get_seq_length}
    body |= {"_trimtab_plain": plain, "__reduce_ex__": _reduce_ex, "__module__": plain.__module__}
    return type(plain.__name__, (plain,), body)


def _reduce_ex(self: Any, protocol: int) -> tuple:
    return _revive, (type(self)._trimtab_plain,), self.__dict__.copy()


def _revive(plain: type) -> Any:
    cls = _holding(plain)
    return cls.__new__(cls)
