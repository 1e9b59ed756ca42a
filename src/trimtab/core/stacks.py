"""Stacks of blocks, and the attention modules in them: where learned tokens can come in.

A stack is a run of blocks that one module owns (an encoder, a decoder, a vision tower). What must be known of a model beyond its
structure (whether a stack is causal, and which module runs it from embeddings on) comes from ``trimtab.compat``.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor, nn

from trimtab.core.errors import TrimtabError, Unsupported, raise_all
from trimtab.core.site import base_class
from trimtab.core.structure import is_matrix, qkv_role, sizes

if TYPE_CHECKING:
    from trimtab.core.anatomy import Anatomy
    from trimtab.core.contracts import TokenAdapter
    from trimtab.core.selection import Place
    from trimtab.core.site import Site

__all__ = ["Stack", "attentions", "companions", "key_value_widths", "separable", "stack_of", "stacks", "token_places", "vocabulary"]


#: tables beside that of the tokens
_OTHER = re.compile(r"posit|(^|\.)wpe$|type|segment", re.IGNORECASE)
#: names of a block's argument for another stack's output
_SECOND = re.compile(r"encoder|memory|cross|context", re.IGNORECASE)


@dataclass(frozen=True)
class Stack:
    """Blocks that follow one another.

    Attributes:
        blocks: their indices in the anatomy.
        body: path of the module that runs them from embeddings on, if no token sees a later one; None otherwise.
        crossed: whether its blocks look at another stack's output, too.
    """

    blocks: tuple[int, ...]
    body: str | None
    crossed: bool


def attentions(anatomy: Anatomy, index: int) -> list[str]:
    """Paths of the attention modules of a block, the self-attention first: the modules that hold the key projections."""
    from trimtab.compat.attention import reachable

    found: dict[str, None] = {}
    for path, role in anatomy.roles.items():
        if anatomy.block_of(path) == index and role in ("attn.k", "attn.kv", "attn.qkv"):
            own = isinstance(anatomy.modules[path], nn.MultiheadAttention)
            found.setdefault(path if own else path.rpartition(".")[0])
    if any(reachable(anatomy.modules[path]) for path in found):
        return list(found)
    # compressed keys and values (MLA) go through other projections; what compares them is found by its own code
    inside = anatomy.blocks[index] + "."
    return [path for path, module in anatomy.modules.items() if path.startswith(inside) and reachable(module)] or list(found)


def separable(attention: nn.Module) -> bool:
    """Whether an attention's queries can be reached, so that learned keys may have a softmax of their own."""
    from trimtab.compat.attention import reachable

    return reachable(attention)


def stacks(anatomy: Anatomy) -> list[Stack]:
    """The stacks of a model, in model order."""
    from trimtab.compat.bodies import causal_body

    runs: dict[str, list[int]] = {}
    for index, path in enumerate(anatomy.blocks):
        runs.setdefault(path.rpartition(".")[0], []).append(index)
    found = []
    for run in runs.values():
        inside = [attentions(anatomy, index) for index in run]
        first = anatomy.modules[anatomy.blocks[run[0]]]
        crossed = len(runs) > 1 and any(len(paths) > 1 for paths in inside) and _reads_another(first)
        own = list(dict.fromkeys(paths[0] for paths in inside if paths))
        body = None if crossed else causal_body(anatomy.modules, anatomy.blocks[run[0]], own)
        found.append(Stack(tuple(run), body, crossed))
    return found


def _reads_another(block: nn.Module) -> bool:
    """Whether a block takes a second sequence beside its own."""
    wanted = [p for p in inspect.signature(inspect.unwrap(base_class(block).forward)).parameters.values() if p.name != "self"]
    if any(_SECOND.search(p.name) for p in wanted):
        return True
    return sum(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in wanted) > 1


def stack_of(anatomy: Anatomy, site: Site) -> Stack:
    """The stack whose body or block ``site`` is."""
    if site.role == "stack":
        return next(stack for stack in stacks(anatomy) if site.path == stack.body)
    return next(stack for stack in stacks(anatomy) if site.block in stack.blocks)


def key_value_widths(attention: nn.Module) -> tuple[int, int]:
    """Widths of a token's key and value (all heads) in an attention module: ``(key, value)``."""
    if isinstance(attention, nn.MultiheadAttention):
        return attention.embed_dim, attention.embed_dim
    if (compressed := _compressed(attention)) is not None:
        return compressed
    roles = {qkv_role(name, child): child for name, child in attention._modules.items() if child is not None and is_matrix(child)}
    if "attn.k" in roles and "attn.v" in roles:
        return sizes(roles["attn.k"])[0], sizes(roles["attn.v"])[0]
    if "attn.kv" in roles:
        return (sizes(roles["attn.kv"])[0] // 2,) * 2
    if "attn.qkv" not in roles:
        raise Unsupported(
            f"no projections of keys and of values were found in {type(attention).__name__}, so that their widths are not known; "
            "use PromptTuning, or leave its block out"
        )
    fused = roles["attn.qkv"]
    out, fan_in = sizes(fused)
    # the output projection reads as many numbers as the queries have
    others = [child for child in attention._modules.values() if child is not None and child is not fused and is_matrix(child)]
    queries = next((given for given_out, given in map(sizes, others) if given_out == fan_in and given < out), out // 3)
    return ((out - queries) // 2,) * 2


def vocabulary(anatomy: Anatomy, site: Site) -> tuple[Callable[[Tensor], Tensor], int] | None:
    """What enters at ``site`` for the model's own tokens, ``ids (p,) -> (p, width)``, and their number; None without any."""
    from trimtab.compat.bodies import first_tokens

    tables = {path: anatomy.modules[path] for path, role in anatomy.roles.items() if role == "embedding"}
    wide = {path: m.num_embeddings for path, m in tables.items() if m.embedding_dim == site.in_features}
    fitting = {path: entries for path, entries in wide.items() if not _OTHER.search(path)}
    if not fitting:
        return None
    path = max(fitting, key=fitting.__getitem__)
    if site.role == "stack":  # the body itself makes of embeddings what enters the first block
        return lambda ids: anatomy.modules[path](ids), fitting[path]
    return lambda ids: first_tokens(anatomy.modules, path, ids), fitting[path]


def _compressed(attention: nn.Module) -> tuple[int, int] | None:
    """The widths where keys and values are made of a compressed one (MLA): a head's key has a part of its own and a rotated one."""
    heads, value = (getattr(attention, name, None) for name in ("num_heads", "v_head_dim"))
    heads = heads if isinstance(heads, int) else getattr(attention, "num_attention_heads", None)
    parts = [getattr(attention, name, None) for name in ("qk_nope_head_dim", "qk_rope_head_dim")]
    if not all(isinstance(size, int) for size in (heads, value, *parts)):
        return None
    return heads * sum(parts), heads * value


# -- places of token adapters


def token_places(name: str, entry: str, places: Sequence[Place], anatomy: Anatomy) -> list[Place]:
    """Where a token method acts for the blocks (or attentions) that were selected.

    Args:
        name: the method's, for messages.
        entry: ``"attention"``: the self-attention of each block; ``"block"``: each block; ``"model"``: the first block of each
            stack, or the body of a causal one.

    Raises:
        Unsupported: a place is neither a block nor (for ``"attention"``) an attention module.
    """
    known = {path: index for index in range(len(anatomy.blocks)) for path in attentions(anatomy, index)}
    problems: list[TrimtabError] = []
    found: dict[str, Place] = {}
    if entry == "model":
        return _entrances(name, places, anatomy)
    if entry == "attention":
        places = _with_attention(places, anatomy)
    for place in places:
        if place.path in anatomy.blocks:
            here = _block_place(name, entry, place, anatomy, problems)
        elif entry == "attention" and place.path in known:
            here = replace(place, role="attention", part=None, rows=None)
        elif entry == "attention" and isinstance(place.module, nn.MultiheadAttention):
            here = replace(place, role="attention", tensor=None, part=None, rows=None)
        else:
            wanted = "blocks and attention modules" if entry == "attention" else "blocks"
            problems.append(Unsupported(f"{name} acts on {wanted}; {place.path} is neither; targets='block' means them all"))
            continue
        if here is not None:
            found.setdefault(here.path, here)
    raise_all(problems[:3])
    return list(found.values())


def _with_attention(places: Sequence[Place], anatomy: Anatomy) -> Sequence[Place]:
    """The places but for recurrent blocks beside those with attention: they have no keys to add to."""
    from trimtab.compat.attention import reachable

    inside = {p.path: attentions(anatomy, anatomy.blocks.index(p.path)) for p in places if p.path in anatomy.blocks}
    real = {path for path, found in inside.items() if any(reachable(anatomy.modules[each]) for each in found)}
    kept = real or {path for path, found in inside.items() if found}
    return [p for p in places if p.path not in inside or p.path in kept] or places


def _block_place(name: str, entry: str, place: Place, anatomy: Anatomy, problems: list[TrimtabError]) -> Place | None:
    """The block itself, or its self-attention."""
    if entry == "block":
        return place
    inside = attentions(anatomy, anatomy.blocks.index(place.path))
    if not inside:
        problems.append(Unsupported(f"{name} adds keys and values to a block's attention, and none was found in {place.path}"))
        return None
    return replace(place, path=inside[0], module=anatomy.modules[inside[0]], role="attention")


def _entrances(name: str, places: Sequence[Place], anatomy: Anatomy) -> list[Place]:
    """One place a stack: where tokens enter that go through all of its blocks."""
    paths = {place.path for place in places}
    strangers = [path for path in paths if path not in anatomy.blocks]
    if strangers:
        raise Unsupported(f"{name} acts on blocks; {strangers[0]} is none; targets='block' means them all")
    hit = [(stack, [i for i in stack.blocks if anatomy.blocks[i] in paths]) for stack in stacks(anatomy)]
    hit = [(stack, chosen) for stack, chosen in hit if chosen]
    if any(not stack.crossed for stack, _ in hit):  # an encoder's prompt: the decoder reads its output
        hit = [(stack, chosen) for stack, chosen in hit if not stack.crossed]
    problems: list[TrimtabError] = []
    found = []
    for stack, chosen in hit:
        first = chosen[0]
        path = anatomy.blocks[first]
        place = next(p for p in places if p.path == path)
        if stack.crossed:
            problems.append(
                Unsupported(
                    f"{name} puts tokens into an encoder or a decoder-only model; {path} belongs to a decoder that reads an "
                    "encoder: target the encoder's blocks, or use PrefixTuning there"
                )
            )
        elif stack.body is not None and first != stack.blocks[0]:
            problems.append(
                Unsupported(
                    f"in a causal model {name} enters at the first block, {anatomy.blocks[stack.blocks[0]]}, not at {path}; "
                    "leave layers out, or use VPT(deep=True) for tokens of later blocks"
                )
            )
        elif stack.body is not None:
            found.append(replace(place, path=stack.body, module=anatomy.modules[stack.body], role="stack"))
        else:
            found.append(place)
    raise_all(problems)
    return found


# -- companions: modules that must do something for an adapter that stands elsewhere


def companions(adapter: TokenAdapter, anatomy: Anatomy) -> list[tuple[str, str]]:
    """``(path, duty)`` of the modules that serve ``adapter``; duties are explained in ``trimtab.core.flows``."""
    entry, site = adapter.entry(adapter.config), adapter.site
    if entry == "attention":
        return []
    if entry == "block":
        return [(path, "listen") for path in attentions(anatomy, anatomy.blocks.index(site.path))[:1]]
    stack = stack_of(anatomy, site)
    causal = site.role == "stack"
    following = stack.blocks if causal else stack.blocks[stack.blocks.index(site.block) :]
    found = [(path, "listen") for index in following for path in attentions(anatomy, index)[:1]]
    if causal:
        return found + [(anatomy.blocks[index], "pass") for index in following]
    found += [(anatomy.blocks[index], "carry") for index in following[1:]]
    return [*found, (anatomy.blocks[following[-1]], "leave")]
