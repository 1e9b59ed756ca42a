"""What learned tokens must know of transformers' models: which stacks are causal, how one is run on embeddings, what a block's
arguments mean, and where a generation keeps its state. Nothing of transformers is imported here."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.compat.states import used
from trimtab.core.site import base_class
from trimtab.core.trial import causal, table_width

__all__ = [
    "alone", "cache_of", "causal_body", "first_tokens", "input_of", "kept", "layer_cache", "lengthened", "looks_ahead", "named",
    "placed", "rotates", "run_alone", "runner", "starts", "takes", "unrecorded",
]  # fmt: skip

_KEPT = "_trimtab_kept"


@cache
def _parameters(cls: type) -> tuple[str, ...]:
    """Names of a class's forward parameters, decorators seen through; ``**`` for the rest if it takes any."""
    found = inspect.signature(inspect.unwrap(cls.forward)).parameters.values()
    return tuple("**" if p.kind is p.VAR_KEYWORD else p.name for p in found)


def causal_body(modules: Mapping[str, nn.Module], block: str, attentions: Sequence[str]) -> str | None:
    """Path of the module that runs the stack of ``block`` on embeddings, if no token sees a later one; None otherwise.

    What the attentions say of themselves counts; where they say nothing, the body is tried; where it cannot be (it has no weights),
    a body that runs on a cache is taken for causal.

    Args:
        attentions: the self-attentions of the stack; none where recurrences alone mix its tokens.
    """
    inside = [modules[path] for path in attentions]
    said = [flag for attention in inside for flag in _said(attention)]
    if said and not any(said):
        return None
    path = block
    while path:
        path = path.rpartition(".")[0]
        if not takes(modules[path], "inputs_embeds"):
            continue
        if said and all(said):
            return path
        found = causal(modules[path])
        if found is None:
            found = any(takes(modules[path], name) for name in ("past_key_values", "use_cache"))
        return path if found else None
    return None


def _said(attention: nn.Module) -> list[bool]:
    """What an attention says of itself: whether it is causal."""
    return [flag for name in ("is_causal", "is_decoder") if (flag := getattr(attention, name, None)) is not None]


def looks_ahead(attention: nn.Module) -> bool:
    """Whether an attention says of itself that its tokens see later ones."""
    said = _said(attention)
    return bool(said) and not any(said)


def runner(modules: Mapping[str, nn.Module], block: str) -> nn.Module | None:
    """The module around ``block`` that makes embeddings of token ids and runs the stack on them; None: there is none."""
    path = block
    while path:
        path = path.rpartition(".")[0]
        if (takes(modules[path], "inputs_embeds") or takes(modules[path], "input_ids")) and table_width(modules[path]) is not None:
            return modules[path]
    return None


def takes(module: nn.Module, name: str) -> bool:
    """Whether a module's forward has a parameter ``name``."""
    return name in _parameters(base_class(module))


def named(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by the names of their parameters."""
    return {**dict(zip(_parameters(base_class(module))[1:], args, strict=False)), **kwargs}


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
    return not torch.compiler.is_compiling() and not used(cache)


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


def placed(body: nn.Module, args: tuple, kwargs: dict, t: int) -> tuple[tuple, dict]:
    """A body's arguments with positions that do not count padding, where none are given: so far a text stands from its prompt."""
    call = named(body, args, kwargs)
    mask = call.get("attention_mask")
    if call.get("position_ids") is not None or not isinstance(mask, Tensor) or mask.dim() != 2 or not takes(body, "position_ids"):
        return args, kwargs
    return (), {**call, "position_ids": (mask.long().cumsum(1) - 1).clamp(min=0)[:, -t:]}


def rotates(body: nn.Module) -> bool:
    """Whether the model's positions are rotations of queries and keys.

    A model may have several tables of frequencies, ``<kind of layer>_inv_freq``.
    """
    return any(name.endswith("inv_freq") for module in body.modules() for name in module._buffers)


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
