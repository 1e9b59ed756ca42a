"""The anatomy of a model: blocks, attention, feed-forward, norms, embeddings, head; inferred from structure, names and shapes."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from trimtab.core.site import Rows
from trimtab.core.structure import (
    ATTENTION,
    base_modules,
    block_paths,
    class_of,
    container,
    has_matrix,
    is_matrix,
    is_norm,
    leaf,
    owners,
    qkv_role,
    sizes,
)
from trimtab.core.sublayers import Sublayer, sublayers

__all__ = ["HEADS", "KV_HEADS", "Anatomy", "Block", "is_matrix", "of"]

#: names of a module's attributes that count its query heads, and its key-value heads
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads")

# Fused qkv projections whose rows are interleaved head by head, which neither names nor shapes tell. Key: class name of the
# module that holds the projection; all use one layout: for each key-value head its query heads, then k, then v.
INTERLEAVED = frozenset({"GPTNeoXAttention", "BloomAttention", "FalconAttention", "FalconFlashAttention2", "PersimmonAttention"})

_GATE = re.compile(r"gate|gate_proj|wi_0|w1|linear_gate|fc_gate|w_gate|gate_linear", re.IGNORECASE)
_GATE_UP = re.compile(r"gate_up|gate_up_proj|up_gate_proj|w12|fc1_gate", re.IGNORECASE)
_DOWN = re.compile(r"down|down_proj|w2|wo|fc2|c_proj|fc_out|lin2|linear2|dense_4h_to_h|pwconv2|w3_down", re.IGNORECASE)
_UP = re.compile(r"up|up_proj|w3|wi|wi_1|fc1|c_fc|fc_in|lin1|linear1|dense_h_to_4h|pwconv1", re.IGNORECASE)
_MLP = re.compile(r"mlp|ffn|feed_forward|ff|intermediate|output|dense_relu_dense|experts?", re.IGNORECASE)
_HEAD = re.compile(
    r"(.*_)?head|heads|classifier|score|fc|qa_outputs|cls|logits|embed_out|output_layer|class_labels_classifier|out_head|proj_out",
    re.IGNORECASE,
)
_MIXER = re.compile(r"in_proj|out_proj|x_proj|dt_proj", re.IGNORECASE)
_ROUTER = re.compile(r"router|gate|wg", re.IGNORECASE)


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
        parts: path of a fused projection -> part (q, k, v) -> rows of its (out, in) matrix.
        banks: module path -> parameter -> role, for parameters that a module reads by itself.
        modules: module path -> module, adapters left out; a shared module once, under its first path.
        sublayers: the attentions and feed-forwards of the blocks as whole branches, in model order.
    """

    blocks: tuple[str, ...]
    roles: dict[str, str]
    parts: dict[str, dict[str, Rows]]
    banks: dict[str, dict[str, str]]
    modules: dict[str, nn.Module] = field(repr=False)
    owner: dict[str, int] = field(repr=False, default_factory=dict)
    facts: dict[int, dict[str, Any]] = field(repr=False, default_factory=dict)
    sublayers: tuple[Sublayer, ...] = field(repr=False, default=())

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
        """Role -> number of modules, in order of first appearance."""
        counts: dict[str, int] = {}
        for role in self.roles.values():
            counts[role] = counts.get(role, 0) + 1
        return counts


def of(model: nn.Module) -> Anatomy:
    """The anatomy of ``model``; nothing of it is kept, so that a changed model is looked at anew."""
    modules = base_modules(model)
    blocks = tuple(block_paths(modules))
    owner = owners(modules, blocks)
    roles: dict[str, str] = {}
    heads = _heads(modules, blocks, owner)
    for path, module in modules.items():
        role = _plain_role(path, module, blocks, heads)
        if role:
            roles[path] = role
    facts = {}
    for index, block in enumerate(blocks):
        inside = [p for p in modules if owner.get(p) == index]
        width = _width(modules, inside)
        attention = _attention_roles(block, inside, modules, width)
        roles.update({p: r for p, r in attention.items() if p not in heads})
        rest = [p for p in inside if p not in attention and is_matrix(modules[p])]
        roles.update(_feed_forward_roles(block, rest, modules, width))
        facts[index] = {"width": width, **_head_facts(attention, modules, model)}
    outside = [p for p in modules if p not in owner]
    loose = _attention_roles("", outside, modules, None)
    roles.update({p: r for p, r in loose.items() if p not in heads})
    parts = {p: found for p, r in roles.items() if r == "attn.qkv" and (found := _parts(p, roles, modules, model))}
    ordered = {p: roles[p] for p in modules if p in roles}
    banks = _banks(modules)
    return Anatomy(blocks, ordered, parts, banks, modules, owner, facts, sublayers(blocks, modules, owner, ordered, banks))


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


def _heads(modules: dict[str, nn.Module], blocks: tuple[str, ...], owner: dict[str, int]) -> set[str]:
    """Paths of the head: a so named child of the root outside the blocks, with all that is below it."""
    found: set[str] = set()
    for path, module in modules.items():
        if not path or path in owner or any(b.startswith(f"{path}.") for b in blocks):
            continue
        if _HEAD.fullmatch(leaf(path)) and path.count(".") == 0 and has_matrix(module):
            found |= {p for p in modules if p == path or (p.startswith(f"{path}.") and is_matrix(modules[p]))}
    return found


def _width(modules: dict[str, nn.Module], inside: list[str]) -> int | None:
    """Width of a block: its norms' size, else the most common input size."""
    for path in inside:
        weight = getattr(modules[path], "weight", None)
        if is_norm(path, modules[path]) and weight is not None and weight.dim() == 1 and not ATTENTION.search(leaf(path)):
            if not any(qkv_role(f"{path.rpartition('.')[0]}.{n}", c) for n, c in modules[path.rpartition(".")[0]]._modules.items()):
                return weight.shape[0]
    inputs = [sizes(modules[p])[1] for p in inside if is_matrix(modules[p])]
    return max(set(inputs), key=inputs.count) if inputs else None


def _attention_roles(block: str, inside: list[str], modules: dict[str, nn.Module], width: int | None) -> dict[str, str]:
    """attn.* roles: q, k, v by name; what else stands under the same attention module and gives the width is attn.o."""
    roles: dict[str, str] = {}
    containers: list[str] = []
    for path in inside:
        module = modules[path]
        role = qkv_role(path, module)
        if isinstance(module, nn.MultiheadAttention):
            roles[path], roles[f"{path}.out_proj"] = "attn.qkv", "attn.o"
        elif role and _plausible(role, module, path, inside, modules):
            roles[path] = role
            containers.append(container(path, block))
    for home in filter(None, dict.fromkeys(containers)):  # bare q, k, v of the root: nothing says what is o
        others = [p for p in inside if p.startswith(f"{home}.") and is_matrix(modules[p]) and p not in roles]
        given = width or next(sizes(modules[p])[1] for p in roles if p.startswith(f"{home}."))
        outputs = [p for p in others if sizes(modules[p])[0] == given and _under_attention(p, home, roles)]
        if outputs:
            roles[outputs[-1]] = "attn.o"
    return roles


def _plausible(role: str, module: nn.Module, path: str, inside: list[str], modules: dict[str, nn.Module]) -> bool:
    """A lone ``q`` or ``in_proj`` is attention only with its partners: k and v beside it, or three matrices' rows."""
    if role == "attn.qkv":
        out, fan_in = sizes(module)
        return bool(ATTENTION.search(path)) or out == 3 * fan_in
    parent = path.rpartition(".")[0]
    siblings = {qkv_role(p, modules[p]) for p in inside if p.rpartition(".")[0] == parent}
    return len(siblings - {None}) >= 2 or bool(ATTENTION.search(parent))


def _under_attention(path: str, container: str, roles: dict[str, str]) -> bool:
    """Whether ``path`` may be the output projection: not named as a feed-forward within the container."""
    inner = path.removeprefix(f"{container}.")
    return not any(re.fullmatch(r"mlp|ffn|feed_forward|intermediate", name) for name in inner.split("."))


def _feed_forward_roles(block: str, paths: list[str], modules: dict[str, nn.Module], width: int | None) -> dict[str, str]:
    """mlp.* roles by shape (wider than the block, back to it), gates and square matrices by name."""
    roles: dict[str, str] = {}
    for path in paths:
        module, name = modules[path], leaf(path)
        out, fan_in = sizes(module)
        parent = modules[path.rpartition(".")[0]]
        siblings = {n for n in parent._modules}
        if out == 1 or (_ROUTER.fullmatch(name) and ("experts" in siblings or name.lower() == "router")):
            roles[path] = "router"
        elif _MIXER.fullmatch(name):
            continue  # a state-space mixer's projections widen and narrow as a feed-forward's do
        elif _GATE_UP.fullmatch(name):
            roles[path] = "mlp.gate_up"
        elif _DOWN.fullmatch(name) or (width and out == width and fan_in > width):
            roles[path] = "mlp.down"
        elif _GATE.fullmatch(name) and (name.lower() != "w1" or "w3" in siblings):
            roles[path] = "mlp.gate"
        elif _UP.fullmatch(name) or (width and fan_in == width and out > width):
            roles[path] = "mlp.up"
        elif _MLP.search(path[len(block) :]):
            roles[path] = "mlp.up" if "mlp.up" not in roles.values() else "mlp.down"
    return roles


# -- facts of attention


def _attribute(names: tuple[str, ...], *owners: Any) -> int | None:
    for owner in owners:
        for name in names:
            try:
                value = getattr(owner, name, None)
            except RuntimeError:  # the config of a model whose layers differ has no one number for all, and says so
                continue
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


def _parts(path: str, roles: dict[str, str], modules: dict[str, nn.Module], model: nn.Module) -> dict[str, Rows] | None:
    """Rows of q, k and v in a fused projection."""
    module = modules[path]
    if isinstance(module, nn.MultiheadAttention):
        if module.in_proj_weight is None:
            return None
        width = module.embed_dim
        return {part: Rows(i * width, width) for i, part in enumerate("qkv")}
    out, fan_in = sizes(module)
    holder = path.rpartition(".")[0]
    o = next((p for p, r in roles.items() if r == "attn.o" and p.startswith(container(path, ""))), None)
    o = o or next((p for p, r in roles.items() if r == "attn.o" and p.rpartition(".")[0] == holder), None)
    q = sizes(modules[o])[1] if o and is_matrix(modules[o]) else out // 3
    kv, rest = divmod(out - q, 2)
    if rest or kv <= 0 or kv > q:
        return None
    if class_of(modules[holder]).__name__ not in INTERLEAVED:
        return {"q": Rows(0, q), "k": Rows(q, kv), "v": Rows(q + kv, kv)}
    facts = _head_facts({path: "attn.qkv"} | ({o: "attn.o"} if o else {}), modules, model)
    size = q // facts["heads"]
    groups = kv // size
    queries = facts["heads"] // groups * size
    stride = queries + 2 * size
    return {
        "q": Rows(0, queries, groups, stride),
        "k": Rows(queries, size, groups, stride),
        "v": Rows(queries + size, size, groups, stride),
    }


def _banks(modules: dict[str, nn.Module]) -> dict[str, dict[str, str]]:
    """3-d parameters outside convolutions: (experts, out, in) banks, by role."""
    found: dict[str, dict[str, str]] = {}
    for path, module in modules.items():
        if isinstance(module, nn.modules.conv._ConvNd) or is_norm(path, module):
            continue
        for name, value in module._parameters.items():
            if value is not None and value.dim() == 3 and value.shape[0] > 1 and min(value.shape[1:]) > 1:
                role = "mlp.gate_up" if _GATE_UP.fullmatch(name) else "mlp.down" if _DOWN.fullmatch(name) else None
                role = role or ("mlp.gate" if _GATE.fullmatch(name) else "mlp.up" if _UP.fullmatch(name) else None)
                if role:
                    found.setdefault(path, {})[name] = role
    return found
