"""The anatomy of a model: blocks, attention, feed-forward, norms, embeddings, head; inferred from structure, names and shapes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from trimtab.core.bare import bare_matrices
from trimtab.core.blocks import Tower, beside, block_paths, towers
from trimtab.core.layouts import Layouts
from trimtab.core.naming import HEAD
from trimtab.core.roles import attention_roles, feed_forward_roles, loose_feed_forward, width_of
from trimtab.core.structure import base_modules, has_matrix, is_matrix, is_norm, leaf, owners, sizes
from trimtab.core.sublayers import Sublayer, sublayers

__all__ = ["HEADS", "KV_HEADS", "Anatomy", "Block", "is_matrix", "of"]

#: names of a module's attributes that count its query heads, and its key-value heads
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads")


@dataclass(frozen=True)
class Block:
    """One block: its path, width, and the paths of what it is made of by role."""

    index: int
    path: str
    width: int | None
    roles: dict[str, tuple[str, ...]]
    heads: int | None = None
    kv_heads: int | None = None
    head_size: int | None = None

    @property
    def fused(self) -> bool:
        """Whether q, k and v are one matrix."""
        return "attn.qkv" in self.roles


@dataclass(frozen=True)
class Anatomy:
    """What stands where in a model.

    Attributes:
        blocks: block paths in model order.
        roles: module path -> role.
        parts: path of a fused projection -> part (q, k, v) -> rows of its (out, in) matrix, proven by trial when asked for.
        banks: module path -> parameter -> role, for matrices that a module reads by itself.
        modules: module path -> module, adapters left out; a shared module once, under its first path.
        sublayers: the attentions and feed-forwards of the blocks as whole branches, in model order.
        towers: the blocks by the part of the model that runs them.
        main: path of the module that a multimodal model's defaults stay within, its text model; None: the whole model.
        aside: paths within it that they leave out: the modules of other towers.
    """

    blocks: tuple[str, ...]
    roles: dict[str, str]
    parts: Layouts
    banks: dict[str, dict[str, str]]
    modules: dict[str, nn.Module] = field(repr=False)
    owner: dict[str, int] = field(repr=False, default_factory=dict)
    facts: dict[int, dict[str, Any]] = field(repr=False, default_factory=dict)
    sublayers: tuple[Sublayer, ...] = field(repr=False, default=())
    towers: tuple[Tower, ...] = ()
    main: str | None = None
    aside: tuple[str, ...] = ()

    def by_default(self, path: str) -> bool:
        """Whether default targets reach ``path``: all of a model, but of a multimodal one its text model and head alone."""
        if self.main is None or self.roles.get(path) == "head":
            return True
        within = not self.main or f"{path}.".startswith(f"{self.main}.")
        return within and not any(f"{path}.".startswith(f"{away}.") for away in self.aside)

    def block_of(self, path: str) -> int | None:
        """Index of the block that ``path`` stands in, or None."""
        return self.owner.get(path)

    def block(self, index: int) -> Block:
        """The block ``index``."""
        found: dict[str, list[str]] = {}
        for path, role in self.roles.items():
            if self.owner.get(path) == index:
                found.setdefault(role, []).append(path)
        return Block(index, self.blocks[index], roles={k: tuple(v) for k, v in found.items()}, **self.facts[index])

    def count(self) -> dict[str, int]:
        """Role -> number of modules and bare matrices, in order of first appearance."""
        counts: dict[str, int] = {}
        bare = [role for tensors in self.banks.values() for role in tensors.values()]
        for role in [*self.roles.values(), *bare]:
            counts[role] = counts.get(role, 0) + 1
        return counts


def of(model: nn.Module) -> Anatomy:
    """The anatomy of ``model``; nothing of it is kept, so that a changed model is looked at anew."""
    from trimtab.compat.ends import output_embeddings, text_model

    modules = base_modules(model)
    blocks = tuple(block_paths(modules))
    owner = owners(modules, blocks)
    heads = _heads(modules, blocks, owner, output_embeddings(modules))
    roles = {p: role for p, m in modules.items() if (role := _plain_role(p, m, blocks, heads))}
    facts: dict[int, dict[str, Any]] = {}
    members: dict[int | None, list[str]] = {}
    for path in modules:
        members.setdefault(owner.get(path), []).append(path)
    for index, block in enumerate(blocks):
        inside = members[index]
        attention = attention_roles(block, inside, modules)
        rest = [p for p in inside if p not in attention and is_matrix(modules[p]) and p not in heads]
        found = attention | feed_forward_roles(block, rest, modules, None)
        width = width_of(block, inside, modules, found)
        found = attention | feed_forward_roles(block, rest, modules, width)
        roles.update({p: r for p, r in found.items() if p not in heads})
        facts[index] = {"width": width, **_head_facts(attention, modules, model)}
    around = {".".join(b.split(".")[:depth]) for b in blocks for depth in range(b.count(".") + 1)}
    outside = {p: modules[p] for p in members.get(None, ()) if p not in around}
    loose = attention_roles("", list(outside), modules, outside)
    loose |= loose_feed_forward([p for p in outside if p not in loose and is_matrix(modules[p])], modules)
    roles.update({p: r for p, r in loose.items() if p not in heads})
    ordered = {p: roles[p] for p in modules if p in roles}
    banks = bare_matrices(modules, blocks, owner, {i: f["width"] for i, f in facts.items()})
    branches = sublayers(blocks, modules, owner, ordered, banks)
    parts = Layouts(model, modules, ordered)
    found_towers = towers(blocks)
    main = text_model(model, modules) if len(found_towers) > 1 else None
    aside = () if main is None else beside(main, blocks, found_towers)
    return Anatomy(blocks, ordered, parts, banks, modules, owner, facts, branches, found_towers, main if aside else None, aside)


# -- roles


def _plain_role(path: str, module: nn.Module, blocks: tuple[str, ...], heads: set[str]) -> str | None:
    """Roles that one module alone decides."""
    if path in heads:
        return "head"
    if path in blocks:
        return "block"
    if is_norm(path, module):
        return "norm"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "conv"
    return "linear" if is_matrix(module) else None


def _heads(modules: dict[str, nn.Module], blocks: tuple[str, ...], owner: dict[str, int], outputs: set[str]) -> set[str]:
    """Paths of the head: output embeddings, and a so named child of the root outside the blocks, with all that is below it."""
    found = {p for p in outputs if is_matrix(modules[p]) and p not in owner}
    for path, module in modules.items():
        if not path or path in owner or any(b.startswith(f"{path}.") for b in blocks):
            continue
        if HEAD.fullmatch(leaf(path)) and path.count(".") == 0 and has_matrix(module):
            found |= {p for p in modules if p == path or (p.startswith(f"{path}.") and is_matrix(modules[p]))}
    return found


# -- facts of attention


def _attribute(names: tuple[str, ...], *owners: Any) -> int | None:
    for owner in owners:
        aliases = getattr(type(owner), "attribute_map", {})
        for name in names:
            # a config may refuse to be asked for a number that differs by layer: what it stores is read, not its properties
            if isinstance(owner, nn.Module):
                value = getattr(owner, name, None)
            else:
                value = None if owner is None else vars(owner).get(aliases.get(name, name))
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None


def _head_facts(attention: dict[str, str], modules: dict[str, nn.Module], model: nn.Module) -> dict[str, int | None]:
    holders = [modules[p.rpartition(".")[0]] for p, r in attention.items() if r != "attn.o"]
    holders += [modules[p] for p in attention if isinstance(modules[p], nn.MultiheadAttention)]
    config = getattr(model, "config", None)
    q, k, o = (next((sizes(modules[p]) for p, r in attention.items() if r == role and is_matrix(modules[p])), None)
               for role in ("attn.q", "attn.k", "attn.o"))  # fmt: skip
    size = _attribute(("head_dim", "head_size", "attention_head_size"), *holders[:1])
    heads, kv = _attribute(HEADS, *holders[:1], *holders[-1:]), _attribute(KV_HEADS, *holders[:1])
    # the modules' own sizes before the config's numbers: those of a model whose heads were pruned are the whole model's
    if not heads:
        heads = o[1] // size if size and o and o[1] % size == 0 else _attribute(HEADS, config)
    if not kv:
        kv = k[0] // size if size and k and k[0] % size == 0 else _attribute(KV_HEADS, config) or heads
    if size is None and heads:
        total = q[0] if q else o[1] if o else None
        size = total // heads if total else None
    return {"heads": heads, "kv_heads": kv, "head_size": size}
