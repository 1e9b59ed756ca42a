"""Matrices that a module holds and reads by itself, in no layer of their own: expert banks, packed or bare projections."""

from __future__ import annotations

from torch import Tensor, nn

from trimtab.core.naming import (
    ATTENTION,
    ATTENTION_CLASS,
    FEED_FORWARD,
    attention_role,
    auxiliary_role,
    feed_forward_role,
    output_rank,
    words,
)
from trimtab.core.structure import class_of, is_matrix, is_norm

__all__ = ["bare_matrices"]

#: what no input is contracted with: tables of positions, learned tokens, biases
_TABLE = frozenset(
    "pos position positional rel relative bias biases table token tokens embedding embeddings embed scale gamma alpha beta mask"
    " temperature latent latents register cls sink sinks".split()
)


def bare_matrices(
    modules: dict[str, nn.Module], blocks: tuple[str, ...], owner: dict[str, int], widths: dict[int, int | None]
) -> dict[str, dict[str, str]]:
    """Path of a module -> its parameter -> role, for all such matrices of attentions and feed-forwards.

    A name that says nothing counts where one side is the width of the block: it is then ``attn.other`` or ``mlp.other``.
    """
    found: dict[str, dict[str, str]] = {}
    for path, module in modules.items():
        if isinstance(module, nn.modules.conv._ConvNd | nn.Embedding) or is_norm(path, module) or is_matrix(module):
            continue
        index = owner.get(path)
        block = blocks[index] if index is not None else ""
        for name, value in module._parameters.items():
            if isinstance(module, nn.MultiheadAttention) and name == "in_proj_weight":
                continue  # a place as a whole, by its module
            if value is not None and _is_matrix(value):
                role = _role(path[len(block) :].strip("."), module, name, value, widths.get(index) if index is not None else None)
                if role:
                    found.setdefault(path, {})[name] = role
    return found


def _is_matrix(value: Tensor) -> bool:
    return value.dim() in (2, 3) and min(value.shape[-2:]) > 1


def _in_company(module: nn.Module, name: str) -> bool:
    """Whether another of q, k and v stands beside a parameter, which is else a learned query, no projection."""
    beside = [n.removesuffix("_weight") for n in [*module._parameters, *module._modules] if n != name]
    return name == "weight" or any(attention_role(n, attention=True) for n in beside)


def _role(inner: str, module: nn.Module, name: str, value: Tensor, width: int | None) -> str | None:
    """``attn.*`` or ``mlp.*`` of the parameter ``name`` of a module at ``inner`` below its block."""
    said = name.removesuffix("_weight").removesuffix(".weight")
    if said == "weight":  # a layer of a class of its own: its module's name is the matrix's
        inner, _, said = inner.rpartition(".")
        siblings = {said}
    else:
        siblings = {n.removesuffix("_weight") for n in module._parameters}
    around = inner.split(".")
    cls = class_of(module).__name__ if name != "weight" else ""
    spoken = words(said) | words(name)
    if spoken & _TABLE or "router" in spoken or "Router" in class_of(module).__name__:
        return None
    wide = width in value.shape
    first = next((i for i, part in enumerate(around) if FEED_FORWARD.search(part)), len(around))
    attends = any(map(ATTENTION.search, around[:first])) or (first == len(around) and ATTENTION_CLASS.search(cls))
    if attends:
        if any("indexer" in part.lower() for part in around):
            return None
        role = attention_role(said, attention=True)
        if role == "weak_qkv" or (role is not None and _in_company(module, name)):
            return "attn.qkv" if role == "weak_qkv" else role
        if role is None and output_rank(said) == 2:
            return "attn.o"
        return auxiliary_role(said) if role is None and wide and (name != "weight" or value.dim() == 3) else None
    role = feed_forward_role(said, siblings)
    if value.dim() == 3:
        return role  # an expert bank, wherever it stands
    if first < len(around) or FEED_FORWARD.search(cls):
        return role or ("mlp.other" if wide and name != "weight" else None)
    return None
