"""The roles of matrices, a block at a time (or all outside the blocks): attention, feed-forward, routers, and the block's width.

Names first, then shapes against the width of the residual stream, position last.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torch import nn

from trimtab.core.naming import (
    ATTENTION,
    ATTENTION_CLASS,
    FEED_FORWARD,
    MIXER,
    attention_role,
    auxiliary_role,
    feed_forward_role,
    leaf,
    output_rank,
    says_position,
    words,
)
from trimtab.core.structure import class_of, container, is_matrix, is_norm, named_by, sizes

__all__ = ["attention_roles", "feed_forward_roles", "loose_feed_forward", "width_of"]

_ROUTER = {"router", "routing"}
_READS = (
    "attn.q",
    "attn.k",
    "attn.v",
    "attn.kv",
    "attn.qkv",
    "attn.qk",
    "attn.q_a",
    "attn.kv_a",
    "mlp.up",
    "mlp.gate",
    "mlp.gate_up",
)
_WRITES = ("attn.o", "mlp.down")


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _inside(path: str, block: str) -> list[str]:
    """Parts of a path below its block, the module itself left out."""
    names = path.split(".")[:-1]
    return names[len(block.split(".")) :] if block else names


def _classes(path: str, block: str, modules: dict[str, nn.Module]) -> list[str]:
    """Class names of the modules around ``path`` that are below the block."""
    names = path.split(".")
    start = len(block.split(".")) if block else 0
    return [class_of(modules[".".join(names[:depth])]).__name__ for depth in range(start + 1, len(names))]


def _says_feed_forward(path: str, block: str, modules: dict[str, nn.Module]) -> bool:
    inside = _inside(path, block)
    if inside and any(says_position(name) or "norm" in name.lower() and FEED_FORWARD.search(inside[-1]) for name in inside):
        return False  # a network that makes a bias of distances, or a gate of a norm
    return any(map(FEED_FORWARD.search, inside)) or any(map(FEED_FORWARD.search, _classes(path, block, modules)[-1:]))


# -- attention


def attention_roles(
    block: str, inside: list[str], modules: dict[str, nn.Module], within: Mapping[str, nn.Module] | None = None
) -> dict[str, str]:
    """``attn.*`` (and ``indexer``) of all matrices that stand in the attentions of a block (``""``: outside the blocks).

    q, k and v are known by name; the output by its name, and by position where none says so. What else an attention holds is
    ``attn.pos`` (relative positions), ``attn.gate`` or ``attn.other``, so that "attention" means every matrix of it. An attention
    is one of the modules ``within`` (None: all).
    """
    roles: dict[str, str] = {}
    homes: dict[str, list[str]] = {}
    for path in inside:
        module = modules[path]
        if isinstance(module, nn.MultiheadAttention):
            if module._qkv_same_embed_dim:
                roles[path] = "attn.qkv"
            roles[f"{path}.out_proj"] = "attn.o"
        elif is_matrix(module) and not _says_feed_forward(path, block, modules):
            if any("indexer" in name.lower() for name in [*_inside(path, block), *_classes(path, block, modules)]):
                roles[path] = "indexer"
            elif (role := _projection(path, block, inside, modules)) is not None:
                roles[path] = role
                homes.setdefault(
                    container(named_by(path, block, modules), block, modules if within is None else within), []
                ).append(path)
    for home in homes:
        roles.update(_others(home, block, inside, modules, roles))
    return roles


def _projection(path: str, block: str, inside: list[str], modules: dict[str, nn.Module]) -> str | None:
    """q, k, v and the like by name, where the neighbours bear it out."""
    named = named_by(path, block, modules)
    attends = any(map(ATTENTION.search, _inside(named, block)))
    attends = attends or any(map(ATTENTION_CLASS.search, _classes(named, block, modules)))
    role = attention_role(leaf(named), attention=attends)
    if role is None or (role == "weak_qkv" and not attends and any(map(MIXER.search, _classes(path, block, modules)[-1:]))):
        return None
    parent = modules[_parent(named)]
    if role in ("weak_qkv", "attn.qkv"):
        out, fan_in = sizes(modules[path])
        bare = not any(isinstance(c, nn.modules.conv._ConvNd) for c in parent._modules.values())
        bare = bare and not any(p is not None for p in parent._parameters.values())
        if attends or (out == 3 * fan_in and (bare or role == "attn.qkv")):
            return _weak(named, modules[path], parent) if role == "weak_qkv" else "attn.qkv"
        return None
    beside = {attention_role(n) for n, c in parent._modules.items() if c is not None and _holds_matrix(c)} - {None}
    return role if attends or (len(beside) >= 2 and beside & {"attn.q", "attn.qkv", "attn.qk", "attn.q_a"}) else None


def _weak(path: str, module: nn.Module, parent: nn.Module) -> str | None:
    """``c_attn`` beside a ``q_attn`` (cross attention of GPT-2) gives keys and values alone."""
    beside = {attention_role(n) for n, c in parent._modules.items() if c is not None and is_matrix(c) and n != leaf(path)}
    if "attn.q" in beside:
        out, fan_in = sizes(module)
        return "attn.kv" if out == 2 * fan_in else None if {"attn.k", "attn.v"} <= beside else "attn.qkv"
    return "attn.qkv"


def _holds_matrix(module: nn.Module) -> bool:
    return any(is_matrix(m) for m in module.modules())


def _others(home: str, block: str, inside: list[str], modules: dict[str, nn.Module], roles: dict[str, str]) -> dict[str, str]:
    """The output of an attention, and what else it holds."""
    known = [p for p in roles if p.startswith(f"{home}.") or (not home and p.count(".") == 0)]
    bare = home == block  # q, k and v stand in the block itself, beside all else
    if not home:
        return {}  # bare q, k, v of the root: nothing says what is o
    found: dict[str, str] = {}
    others = [p for p in inside if p.startswith(f"{home}.") and is_matrix(modules[p]) and p not in roles]
    others = [p for p in others if not _says_feed_forward(p, home, modules) and not _is_router(p, home, modules, alone=False)]
    if bare:
        others = [p for p in others if _parent(p) == block and feed_forward_role(leaf(p), set()) is None]
    width = Counter(sizes(modules[p])[1] for p in known if roles[p] in _READS and is_matrix(modules[p])).most_common(1)
    ranked = [(output_rank(_named(p, home, modules)), sizes(modules[p])[0] == width[0][0] if width else True, p) for p in others]
    best = max(((rank, fits) for rank, fits, _ in ranked if rank), default=None)
    if best is not None:
        chosen = [p for rank, fits, p in ranked if (rank, fits) == best]
        found |= {p: "attn.o" for p in (chosen if best[0] == 2 else chosen[-1:])}
    elif not bare:
        fits = [p for _, fits, p in ranked if fits and _auxiliary(p, home, modules) == "attn.other"]
        found |= {p: "attn.o" for p in fits[-1:]}
    if bare:
        return found
    rest = {p: _auxiliary(p, home, modules) for p in others if p not in found}
    if not {roles[p] for p in known} & {"attn.q", "attn.qkv", "attn.qk"}:  # queries together with their gate
        rest |= {p: "attn.q" for p in rest if words(leaf(p)) & {"q", "query"} and rest[p] == "attn.gate"}
    return rest | found


def _named(path: str, home: str, modules: dict[str, nn.Module]) -> str:
    """A matrix's name below its attention."""
    named = named_by(path, home, modules)
    return path.removeprefix(f"{home}.") if named == home else named.removeprefix(f"{home}.")


def _auxiliary(path: str, home: str, modules: dict[str, nn.Module]) -> str:
    inner = _named(path, home, modules)
    return "attn.pos" if any(map(says_position, inner.split("."))) else auxiliary_role(leaf(inner))


# -- feed-forward


def feed_forward_roles(block: str, paths: list[str], modules: dict[str, nn.Module], width: int | None) -> dict[str, str]:
    """``mlp.*`` and ``router``: by name, else by shape (wider than the block, back to it)."""
    roles: dict[str, str] = {}
    for path in paths:
        module, name = modules[path], leaf(named_by(path, block, modules))
        siblings = set(modules[_parent(named_by(path, block, modules))]._modules)
        says = _says_feed_forward(path, block, modules)
        if _is_router(path, block, modules):
            roles[path] = "router"
        elif not says and (any(map(MIXER.search, _classes(path, block, modules))) or "norm" in ".".join(_inside(path, block))):
            continue
        elif role := _recurrent(name, siblings) if says else None:
            roles[path] = role
        elif role := feed_forward_role(name, siblings):
            roles[path] = role
        elif role := _spread(path, block, modules) or _by_shape(path, block, sizes(module), width, roles, says):
            roles[path] = role
    return {path: _alone(path, role, roles) for path, role in roles.items()}


def loose_feed_forward(paths: list[str], modules: dict[str, nn.Module]) -> dict[str, str]:
    """``mlp.*`` outside the blocks, where a feed-forward's own name and its matrix's both say so."""
    found = {}
    for path in paths:
        named = named_by(path, "", modules)
        role = feed_forward_role(leaf(named), set(modules[_parent(named)]._modules))
        if role and _says_feed_forward(path, "", modules):
            found[path] = role
    return {path: _alone(path, role, found) for path, role in found.items()}


def _alone(path: str, role: str, roles: dict[str, str]) -> str:
    """What is called a gate and has nothing to gate goes up."""
    beside = {r for p, r in roles.items() if _parent(p) == _parent(path)}
    return "mlp.up" if role == "mlp.gate" and "mlp.down" in beside and "mlp.up" not in beside else role


def _is_router(path: str, block: str, modules: dict[str, nn.Module], *, alone: bool = True) -> bool:
    """What chooses or weighs experts; a single number (``alone``) is such a weight."""
    if alone and sizes(modules[path])[0] == 1:
        return True
    names = path.split(".")
    start = len(block.split(".")) if block else 0
    for depth in range(start + 1, len(names) + 1):
        here, name = ".".join(names[:depth]), names[depth - 1].lower()
        if words(name) & _ROUTER or "Router" in class_of(modules[here]).__name__:
            return True
        beside = modules[".".join(names[: depth - 1])]._modules
        if name in ("gate", "wg", "gate_proj", "switch") and any("expert" in n.lower() for n in beside):
            return name != "gate_proj" or "up_proj" not in beside
    return False


def _recurrent(name: str, siblings: set[str]) -> str | None:
    """RWKV's feed-forward calls its matrices as its attention does."""
    if {"key", "value", "receptance"} <= siblings:
        return {"key": "mlp.up", "value": "mlp.down", "receptance": "mlp.gate"}.get(name)
    return None


def _spread(path: str, block: str, modules: dict[str, nn.Module]) -> str | None:
    """A feed-forward that is spread over its block as BERT's: ``intermediate.dense``, ``output.dense``."""
    named = named_by(path, block, modules)
    said = words(leaf(named))
    if said & {"intermediate", "inter"}:
        return "mlp.up"
    around = modules[_parent(named)]._modules
    return "mlp.down" if "output" in said and any(words(n) & {"intermediate", "inter"} for n in around) else None


def _by_shape(path: str, block: str, size: tuple[int, int], width: int | None, roles: dict[str, str], says: bool) -> str | None:
    out, fan_in = size
    if width and out == width and fan_in > width:
        return "mlp.down"
    if width and fan_in == width and out > width:
        return "mlp.up"
    if says or "output" in _inside(path, block)[-1:]:
        return "mlp.up" if "mlp.up" not in roles.values() else "mlp.down"
    return None


# -- width


def width_of(block: str, inside: list[str], modules: dict[str, nn.Module], roles: dict[str, str]) -> int | None:
    """Width of a block's residual stream: what its branches read and write; else its own norms' size; else the commonest input."""
    votes: Counter[int] = Counter()
    for path in inside:
        role = roles.get(path, "")
        if isinstance(modules[path], nn.MultiheadAttention):
            votes[modules[path].embed_dim] += 2
        elif is_matrix(modules[path]):
            out, fan_in = sizes(modules[path])
            votes[fan_in] += role in _READS
            votes[out] += 2 * (role in _WRITES)
    norms = [p for p in inside if is_norm(p, modules[p]) and getattr(modules[p], "weight", None) is not None]
    own = [modules[p].weight.shape[0] for p in norms if _parent(p) == block and modules[p].weight.dim() == 1]
    best = votes.most_common(1)
    if best and best[0][1]:
        tied = [w for w, n in votes.items() if n == best[0][1]]
        every = own + [modules[p].weight.shape[0] for p in norms if modules[p].weight.dim() == 1]
        return next((w for w in every if w in tied), tied[0])
    sizes_of_norms = own or [modules[p].weight.shape[0] for p in norms if modules[p].weight.dim() == 1]
    if sizes_of_norms:
        return Counter(sizes_of_norms).most_common(1)[0][0]
    inputs = [sizes(modules[p])[1] for p in inside if is_matrix(modules[p])]
    return max(set(inputs), key=inputs.count) if inputs else None
