"""What learned tokens must know of transformers' models: which stacks are causal, how one is run on embeddings, what a block's
arguments mean, and where a generation keeps its state. Nothing of transformers is imported here."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.site import base_class

__all__ = [
    "alone", "cache_of", "causal_body", "first_tokens", "input_of", "kept", "layer_cache", "lengthened", "rotates", "run_alone",
    "starts", "unrecorded",
]  # fmt: skip

_KEPT = "_trimtab_kept"


@cache
def _parameters(cls: type) -> tuple[str, ...]:
    """Names of a class's forward parameters, decorators seen through; ``**`` for the rest if it takes any."""
    found = inspect.signature(inspect.unwrap(cls.forward)).parameters.values()
    return tuple("**" if p.kind is p.VAR_KEYWORD else p.name for p in found)


def causal_body(modules: Mapping[str, nn.Module], block: str, attention: str) -> str | None:
    """Path of the module that runs the stack of ``block`` on embeddings, if its attention is causal; None otherwise.

    A model that runs on a cache is causal whatever its attention says of itself.
    """
    if getattr(modules[attention], "is_causal", None) is False:
        return None
    path = block
    while path:
        path = path.rpartition(".")[0]
        names = _parameters(base_class(modules[path]))
        if "inputs_embeds" in names and ("past_key_values" in names or "use_cache" in names):
            return path if getattr(modules[attention], "is_causal", None) or layer_cache(modules[attention]) else None
    return None


def layer_cache(attention: nn.Module) -> str | None:
    """Name of the argument by which an attention gets its cache."""
    names = _parameters(base_class(attention))
    return next((name for name in ("past_key_values", "layer_past", "past_key_value") if name in names), None)


@contextmanager
def unrecorded() -> Iterator[None]:
    """Learned tokens run alone in here: what transformers' hooks collect of a call (attentions, hidden states) is not theirs."""
    capturing = sys.modules.get("transformers.utils.output_capturing")
    collector = getattr(capturing, "_active_collector", None)
    if collector is None:
        yield
    elif torch.compiler.is_compiling():  # a compiled call has its collector in a plain attribute
        held, collector.global_var = collector.global_var, None
        try:
            yield
        finally:
            collector.global_var = held
    else:
        token = collector.set(None)
        try:
            yield
        finally:
            collector.reset(token)


# -- the body of a causal stack


def input_of(args: tuple, kwargs: dict) -> Tensor:
    """A body's input, token ids ``(n, t)`` or embeddings ``(n, t, width)``."""
    found = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args)
    return next(value for value in found if isinstance(value, Tensor))


def cache_of(args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """The cache among a call's arguments (or in its output), or None."""
    return next((value for value in (*args, *kwargs.values()) if hasattr(value, "get_seq_length")), None)


def starts(cache: Any, x: Tensor) -> bool:
    """Whether a sequence begins here; a part of one that has several tokens counts as its beginning, too."""
    if cache is None or x.shape[1] > 1:
        return True
    return not torch.compiler.is_compiling() and bool(cache.get_seq_length() == 0)


def kept(cache: Any, path: str, owner: object, value: Any = None) -> Any:
    """What the module at ``path`` keeps with a cache for ``owner``, after storing ``value`` if one is given; else None.

    It lives as long as the cache, and is nobody else's: another owner (other adapters act) finds nothing.
    """
    store = getattr(cache, _KEPT, None)
    if store is None:
        store = {}
        setattr(cache, _KEPT, store)
    if value is not None:
        store[path] = owner, value
    held = store.get(path)
    return held[1] if held is not None and held[0] is owner else None


def run_alone(body: nn.Module, tokens: Tensor, seen: Tensor | None, *, rotated: bool) -> None:
    """Run a causal stack on learned tokens ``(1 or n, p, width)``, ``seen`` (n, p) as in ``Extra``.

    Where positions are rotations, of which the difference alone counts, the tokens stand at -p to -1, in front of the
    sequence. Where the model has a table of positions, they take its first p rows, and the sequence keeps its own.
    """
    names = _parameters(base_class(body))
    given: dict[str, Any] = {"inputs_embeds": tokens.to(_dtype(body, tokens)), "use_cache": False}
    if seen is not None:
        given["attention_mask"] = seen.long()
    if "position_ids" in names and rotated:
        count = tokens.shape[1]
        given["position_ids"] = torch.arange(-count, 0, device=tokens.device).expand(tokens.shape[0], -1)
    base_class(body).forward(body, **{k: v for k, v in given.items() if k in names or "**" in names})


def rotates(body: nn.Module) -> bool:
    """Whether the model's positions are rotations of queries and keys."""
    return any("inv_freq" in module._buffers for module in body.modules())


def _dtype(body: nn.Module, tokens: Tensor) -> torch.dtype:
    embedding = body.get_input_embeddings() if hasattr(body, "get_input_embeddings") else None
    return tokens.dtype if embedding is None else embedding._parameters["weight"].dtype


def first_tokens(modules: Mapping[str, nn.Module], embedding: str, ids: Tensor) -> Tensor:
    """What enters the first block for the tokens ``ids`` (p,): their embeddings ``(p, width)``, normed where the model does so.

    The stage is the outermost module around the embedding that holds no matrix: BERT's ``embeddings``, or the embedding itself.
    """
    path = embedding
    while path.rpartition(".")[0]:
        parent = path.rpartition(".")[0]
        inside = modules[parent].modules()
        if any(isinstance(m, nn.ModuleList) or hasattr(m, "in_features") for m in inside) or "input_ids" not in _parameters(
            base_class(modules[parent])
        ):
            break
        path = parent
    stage = modules[path]
    training = stage.training
    stage.eval()
    try:
        with torch.no_grad():
            return stage(ids) if path == embedding else stage(input_ids=ids[None])[0]
    finally:
        stage.train(training)


# -- the arguments of a block


def alone(args: tuple, kwargs: dict, tokens: Tensor) -> tuple[tuple, dict]:
    """A block's arguments for learned tokens alone: no mask, no cache, no other sequence, position 0."""
    n = (args[0] if args else next(iter(kwargs.values()))).shape[0]
    blank = {key: _blank(key, value, tokens, n) for key, value in kwargs.items()}
    if args:
        return (tokens, *(_blank("", value, tokens, n) for value in args[1:])), blank
    return args, {**blank, next(iter(kwargs)): tokens}


def _blank(name: str, value: Any, tokens: Tensor, n: int) -> Any:
    rows, count = tokens.shape[:2]
    if value is None or isinstance(value, bool):
        return False if name == "use_cache" else value
    if name == "position_embeddings":
        flat = [t.select(-2, 0).reshape(-1, t.shape[-1])[:1] for t in _unrotated(value)]  # (1, size)
        return tuple(t.expand(count, -1) if v.dim() == 2 else t.expand(rows, count, -1) for t, v in zip(flat, value, strict=True))
    if name == "position_ids":
        return torch.zeros(rows, count, dtype=value.dtype, device=value.device)
    if name == "alibi":  # a bias of the scores by position (n heads, 1, s)
        return value.new_zeros(value.shape[0] // n * rows, 1, count)
    return None if isinstance(value, Tensor) or hasattr(value, "get_seq_length") else value


def lengthened(args: tuple, kwargs: dict, count: int) -> tuple[tuple, dict]:
    """A block's arguments for a sequence with ``count`` learned tokens in front, which are not rotated."""
    value = kwargs.get("position_embeddings")
    if value is None:
        return args, kwargs
    front = (t[..., :1, :].expand(*t.shape[:-2], count, -1) for t in _unrotated(value))
    return args, {**kwargs, "position_embeddings": tuple(torch.cat([a, b], -2) for a, b in zip(front, value, strict=True))}


def _unrotated(rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Cosine and sine of no rotation, at the length (a model may scale both) that the given ones have."""
    cosine, sine = rotation
    return torch.hypot(cosine.float(), sine.float()).to(cosine.dtype), torch.zeros_like(sine)
