"""The anatomy of a model: blocks, attention, feed-forward, norms, embeddings, head; inferred from structure, names and shapes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from trimtab.core.site import Rows

__all__ = ["Anatomy", "Block", "is_matrix", "of"]

# Fused qkv projections whose rows are interleaved head by head, which neither names nor shapes tell. Key: class name of the
# module that holds the projection; all use one layout: for each key-value head its query heads, then k, then v.
INTERLEAVED = frozenset({"GPTNeoXAttention", "BloomAttention", "FalconAttention", "FalconFlashAttention2", "PersimmonAttention"})

_QKV = {
    "attn.qkv": r"c_attn|qkv|qkv_proj|wqkv|query_key_value|in_proj|attn_qkv|to_qkv|Wqkv",
    "attn.kv": r"kv|kv_proj|to_kv|c_kv|wkv",
    "attn.q": r"q|query|q_proj|to_q|wq|q_lin|query_proj|q_linear|query_layer|w_q",
    "attn.k": r"k|key|k_proj|to_k|wk|k_lin|key_proj|k_linear|key_layer|w_k",
    "attn.v": r"v|value|v_proj|to_v|wv|v_lin|value_proj|v_linear|value_layer|w_v",
}
_QKV_NAMES = {role: re.compile(pattern, re.IGNORECASE) for role, pattern in _QKV.items()}
_ATTENTION = re.compile(r"attn|attention|(^|_)mha($|_)", re.IGNORECASE)
_GATE = re.compile(r"gate|gate_proj|wi_0|w1|linear_gate|fc_gate|w_gate|gate_linear", re.IGNORECASE)
_GATE_UP = re.compile(r"gate_up|gate_up_proj|up_gate_proj|w12|fc1_gate", re.IGNORECASE)
_DOWN = re.compile(r"down|down_proj|w2|wo|fc2|c_proj|fc_out|lin2|linear2|dense_4h_to_h|pwconv2|w3_down", re.IGNORECASE)
_UP = re.compile(r"up|up_proj|w3|wi|wi_1|fc1|c_fc|fc_in|lin1|linear1|dense_h_to_4h|pwconv1", re.IGNORECASE)
_MLP = re.compile(r"mlp|ffn|feed_forward|ff|intermediate|output|dense_relu_dense|experts?", re.IGNORECASE)
_NORM = re.compile(r"norm|(^|_)ln(_|\d|$)", re.IGNORECASE)
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
    """

    blocks: tuple[str, ...]
    roles: dict[str, str]
    parts: dict[str, dict[str, Rows]]
    banks: dict[str, dict[str, str]]
    modules: dict[str, nn.Module] = field(repr=False)
    owner: dict[str, int] = field(repr=False, default_factory=dict)
    facts: dict[int, dict[str, Any]] = field(repr=False, default_factory=dict)

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


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D, by structure: weight (in, out) and the attribute ``nf``."""
    return hasattr(module, "nf") and getattr(module, "weight", None) is not None and not isinstance(module, nn.Linear)


def is_matrix(module: nn.Module) -> bool:
    """Linear-like: Linear and subclasses, quantised linears, Conv1D."""
    if isinstance(module, nn.Linear) or is_conv1d(module):
        return True
    return hasattr(module, "in_features") and hasattr(module, "out_features") and "weight" in module._parameters


def sizes(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear-like module."""
    if is_conv1d(module):
        return module.weight.shape[1], module.weight.shape[0]
    return module.out_features, module.in_features


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """All modules but adapters, each once, by path."""
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()

    def walk(path: str, module: nn.Module) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        found[path] = module
        for name, child in module._modules.items():
            if child is not None and name != "trimtab":
                walk(f"{path}.{name}" if path else name, child)

    walk("", model)
    return found


def of(model: nn.Module) -> Anatomy:
    """The anatomy of ``model``; nothing of it is kept, so that a changed model is looked at anew."""
    modules = base_modules(model)
    blocks = tuple(_blocks(modules))
    owner = _owners(modules, blocks)
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
    return Anatomy(blocks, ordered, parts, _banks(modules), modules, owner, facts)


# -- blocks


def _candidates(modules: dict[str, nn.Module]) -> dict[str, list[str]]:
    """Lists of modules that may be blocks: path of the list -> paths of its elements."""
    found = {}
    for path, module in modules.items():
        children = [c for c in module._modules.values() if c is not None]
        sequence = isinstance(module, nn.ModuleList) or (
            isinstance(module, nn.Sequential) and len({_class(c) for c in children}) == 1
        )
        if not sequence or not children:
            continue
        if all(any(True for _ in c.children()) and _has_matrix(c) for c in children):
            found[path] = [f"{path}.{name}" if path else name for name, c in module._modules.items() if c is not None]
    # a list of different things inside an element of another list is that element's make-up (T5), not blocks
    mixed = [p for p in found if len({_class(modules[e]) for e in found[p]}) > 1]
    elements = [e for listed in found.values() for e in listed]
    for path in mixed:
        if any(path.startswith(f"{element}.") for element in elements):
            del found[path]
    return found


def _class(module: nn.Module) -> type:
    return getattr(type(module), "_trimtab_base", type(module))


def _has_matrix(module: nn.Module) -> bool:
    return any(is_matrix(m) or isinstance(m, (nn.MultiheadAttention, nn.modules.conv._ConvNd)) for m in module.modules())


def _blocks(modules: dict[str, nn.Module]) -> Iterator[str]:
    """The outermost lists whose elements have attention (or else a norm) of their own, outside lists nested in them."""
    candidates = _candidates(modules)
    for test in (_has_own_attention, _has_own_norm):
        chosen: list[str] = []
        for path, elements in candidates.items():
            inside = any(element.startswith(f"{done}.") for done in chosen for element in elements)
            if not inside and any(test(element, candidates, modules) for element in elements):
                chosen += elements
        if chosen:
            position = {path: i for i, path in enumerate(modules)}
            yield from sorted(chosen, key=position.__getitem__)
            return


def _own(element: str, candidates: dict[str, list[str]], modules: dict[str, nn.Module]) -> Iterator[str]:
    """Paths below ``element`` that no nested list covers."""
    nested = [p for p in candidates if p.startswith(f"{element}.")]
    for path in modules:
        if path.startswith(f"{element}.") and not any(path == n or path.startswith(f"{n}.") for n in nested):
            yield path


def _has_own_attention(element: str, candidates: dict[str, list[str]], modules: dict[str, nn.Module]) -> bool:
    return any(
        isinstance(modules[p], nn.MultiheadAttention) or _qkv_role(p, modules[p]) for p in _own(element, candidates, modules)
    )


def _has_own_norm(element: str, candidates: dict[str, list[str]], modules: dict[str, nn.Module]) -> bool:
    return any(_is_norm(p, modules[p]) for p in _own(element, candidates, modules))


def _owners(modules: dict[str, nn.Module], blocks: tuple[str, ...]) -> dict[str, int]:
    index = {block: i for i, block in enumerate(blocks)}
    owner = {}
    for path in modules:
        names = path.split(".")
        for depth in range(len(names), 0, -1):
            found = index.get(".".join(names[:depth]))
            if found is not None:
                owner[path] = found
                break
    return owner


# -- roles


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


def _is_norm(path: str, module: nn.Module) -> bool:
    if "Norm" in _class(module).__name__:
        return True
    own = [p for p in module._parameters.values() if p is not None]
    return bool(own) and not module._modules and all(p.dim() == 1 for p in own) and bool(_NORM.search(_leaf(path)))


def _plain_role(path: str, module: nn.Module, blocks: tuple[str, ...], heads: set[str]) -> str | None:
    """Roles that one module alone decides."""
    if path in heads:
        return "head"
    if path in blocks:
        return "block"
    if _is_norm(path, module):
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
        if _HEAD.fullmatch(_leaf(path)) and path.count(".") == 0 and _has_matrix(module):
            found |= {p for p in modules if p == path or (p.startswith(f"{path}.") and is_matrix(modules[p]))}
    return found


def _width(modules: dict[str, nn.Module], inside: list[str]) -> int | None:
    """Width of a block: its norms' size, else the most common input size."""
    for path in inside:
        weight = getattr(modules[path], "weight", None)
        if _is_norm(path, modules[path]) and weight is not None and weight.dim() == 1 and not _ATTENTION.search(_leaf(path)):
            if not any(
                _qkv_role(f"{path.rpartition('.')[0]}.{n}", c) for n, c in modules[path.rpartition(".")[0]]._modules.items()
            ):
                return weight.shape[0]
    inputs = [sizes(modules[p])[1] for p in inside if is_matrix(modules[p])]
    return max(set(inputs), key=inputs.count) if inputs else None


def _qkv_role(path: str, module: nn.Module) -> str | None:
    if not is_matrix(module):
        return None
    name = _leaf(path)
    return next((role for role, pattern in _QKV_NAMES.items() if pattern.fullmatch(name)), None)


def _attention_roles(block: str, inside: list[str], modules: dict[str, nn.Module], width: int | None) -> dict[str, str]:
    """attn.* roles: q, k, v by name; what else stands under the same attention module and gives the width is attn.o."""
    roles: dict[str, str] = {}
    containers: list[str] = []
    for path in inside:
        module = modules[path]
        role = _qkv_role(path, module)
        if isinstance(module, nn.MultiheadAttention):
            roles[path], roles[f"{path}.out_proj"] = "attn.qkv", "attn.o"
        elif role and _plausible(role, module, path, inside, modules):
            roles[path] = role
            containers.append(_container(path, block))
    for container in dict.fromkeys(containers):
        others = [p for p in inside if p.startswith(f"{container}.") and is_matrix(modules[p]) and p not in roles]
        given = width or next(sizes(modules[p])[1] for p in roles if p.startswith(f"{container}."))
        outputs = [p for p in others if sizes(modules[p])[0] == given and _under_attention(p, container, roles)]
        if outputs:
            roles[outputs[-1]] = "attn.o"
    return roles


def _plausible(role: str, module: nn.Module, path: str, inside: list[str], modules: dict[str, nn.Module]) -> bool:
    """A lone ``q`` or ``in_proj`` is attention only with its partners: k and v beside it, or three matrices' rows."""
    if role == "attn.qkv":
        out, fan_in = sizes(module)
        return bool(_ATTENTION.search(path)) or out == 3 * fan_in
    parent = path.rpartition(".")[0]
    siblings = {_qkv_role(p, modules[p]) for p in inside if p.rpartition(".")[0] == parent}
    return len(siblings & set(_QKV)) >= 2 or bool(_ATTENTION.search(parent))


def _container(path: str, block: str) -> str:
    """The outermost module below the block, on the way to ``path``, that is named as attention; else the direct parent."""
    names = path.split(".")
    start = len(block.split(".")) if block else 0
    for depth in range(start + 1, len(names)):
        if _ATTENTION.search(names[depth - 1]):
            return ".".join(names[:depth])
    return ".".join(names[:-1])


def _under_attention(path: str, container: str, roles: dict[str, str]) -> bool:
    """Whether ``path`` may be the output projection: not named as a feed-forward within the container."""
    inner = path.removeprefix(f"{container}.")
    return not any(re.fullmatch(r"mlp|ffn|feed_forward|intermediate", name) for name in inner.split("."))


def _feed_forward_roles(block: str, paths: list[str], modules: dict[str, nn.Module], width: int | None) -> dict[str, str]:
    """mlp.* roles by shape (wider than the block, back to it), gates and square matrices by name."""
    roles: dict[str, str] = {}
    for path in paths:
        module, name = modules[path], _leaf(path)
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
            value = getattr(owner, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None


def _head_facts(attention: dict[str, str], modules: dict[str, nn.Module], model: nn.Module) -> dict[str, int | None]:
    holders = [modules[p.rpartition(".")[0]] for p, r in attention.items() if r != "attn.o"]
    holders += [modules[p] for p in attention if isinstance(modules[p], nn.MultiheadAttention)]
    config = getattr(model, "config", None)
    names = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead")
    heads = _attribute(names, *holders[:1], *holders[-1:], config)
    kv = _attribute(("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads"), *holders[:1], config) or heads
    size = _attribute(("head_dim", "head_size", "attention_head_size"), *holders[:1])
    if size is None and heads:
        q = next((p for p, r in attention.items() if r == "attn.q"), None)
        o = next((p for p, r in attention.items() if r == "attn.o"), None)
        total = sizes(modules[q])[0] if q else sizes(modules[o])[1] if o and is_matrix(modules[o]) else None
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
    o = next((p for p, r in roles.items() if r == "attn.o" and p.startswith(_container(path, ""))), None)
    o = o or next((p for p, r in roles.items() if r == "attn.o" and p.rpartition(".")[0] == holder), None)
    q = sizes(modules[o])[1] if o and is_matrix(modules[o]) else out // 3
    kv, rest = divmod(out - q, 2)
    if rest or kv <= 0 or kv > q:
        return None
    if _class(modules[holder]).__name__ not in INTERLEAVED:
        return {"q": Rows(0, q), "k": Rows(q, kv), "v": Rows(q + kv, kv)}
    facts = _head_facts({path: "attn.qkv"}, modules, model)
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
        if isinstance(module, nn.modules.conv._ConvNd) or _is_norm(path, module):
            continue
        for name, value in module._parameters.items():
            if value is not None and value.dim() == 3 and value.shape[0] > 1 and min(value.shape[1:]) > 1:
                role = "mlp.gate_up" if _GATE_UP.fullmatch(name) else "mlp.down" if _DOWN.fullmatch(name) else None
                role = role or ("mlp.gate" if _GATE.fullmatch(name) else "mlp.up" if _UP.fullmatch(name) else None)
                if role:
                    found.setdefault(path, {})[name] = role
    return found
