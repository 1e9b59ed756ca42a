"""Units of a model that can be taken out whole: attention heads and feed-forward channels, and what belongs to each.

A head owns rows of q, k and v, with their biases, and columns of o; a channel owns rows of up (and gate) and a column of down. With
grouped queries the unit is a key-value head with all its query heads, so that every group stays whole; with a single key-value head
the units are the query heads, which all share it. Everything is found through the anatomy; what cannot be cut is refused with the
reason. What no structure tells (position tables made outside the blocks, an unusual order of fused rows) shows in a trial:
``trimtab.schedules.surgery.trial``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from trimtab.core import anatomy as anatomy_module
from trimtab.core.anatomy import HEADS, KV_HEADS, Anatomy
from trimtab.core.errors import TrimtabError, Unsupported, raise_all
from trimtab.core.kinds import LinearSite, linear_forward_kind
from trimtab.core.site import is_quantised
from trimtab.core.state import parameter_users
from trimtab.core.structure import container, is_norm, qkv_role, sizes

__all__ = ["KINDS", "Member", "Units", "find_units"]

KINDS = ("heads", "channels")
_GROUPS = ("num_key_value_groups", "num_queries_per_kv", "n_rep")
_INNER = ("all_head_size", "split_size", "inner_dim", "attn_dim", "attention_dim")  # heads x head size, whatever the width is


@dataclass(frozen=True)
class Member:
    """What a module has of each unit.

    Attributes:
        path: of the module.
        side: ``"out"``: rows of its matrix (out, in), and entries of its bias; ``"in"``: columns.
        layout: which, (units, entries of each).
    """

    path: str
    side: str
    layout: Tensor = field(repr=False)

    def index(self, kept: Tensor) -> Tensor:
        """The rows or columns of the units ``kept``, ascending."""
        return self.layout[kept].flatten().sort().values


@dataclass(frozen=True)
class Units:
    """The units of one attention or one feed-forward.

    Attributes:
        kind: ``"heads"`` or ``"channels"``.
        block: index of the block.
        reader: path of the layer that reads the units: attn.o or mlp.down.
        count: how many there are.
        size: inputs of the reader that make up one.
        members: the modules to cut, the reader last.
        numbers: ``(module, attribute, how many of it a unit has)``: what the modules count.
    """

    kind: str
    block: int
    reader: str
    count: int
    size: int
    members: tuple[Member, ...]
    numbers: tuple[tuple[nn.Module, str, int], ...] = field(repr=False)


def find_units(model: nn.Module, kind: str) -> list[Units]:
    """All units of a kind, in the model's order.

    Raises:
        Unsupported: none are there, or some cannot be cut; all reasons together.
    """
    anatomy = anatomy_module.of(model)
    users = parameter_users(model)
    problems: list[TrimtabError] = []
    found = []
    for index in range(len(anatomy.blocks)):
        for roles in (_attentions if kind == "heads" else _feed_forwards)(anatomy, index):
            try:
                found.append(_heads(anatomy, index, roles) if kind == "heads" else _channels(anatomy, index, roles))
            except TrimtabError as error:
                problems.append(error)
                continue
            reasons = [_reason(anatomy.modules[member.path], member.path, users) for member in found[-1].members]
            problems += [Unsupported(reason) for reason in reasons if reason]
    raise_all(problems)
    if not found:
        raise Unsupported(f"this {type(model).__name__} has no {kind} to prune: no block with {_wanted(kind)} was found")
    return found


def _wanted(kind: str) -> str:
    return "q, k, v and o" if kind == "heads" else "up and down"


# -- attention


def _attentions(anatomy: Anatomy, index: int) -> Iterator[dict[str, str]]:
    """role -> path of every attention of a block; of a role that occurs twice in one, ``role`` and ``role twice``."""
    block = anatomy.block(index)
    containers: dict[str, dict[str, str]] = {}
    for role, paths in block.roles.items():
        for path in paths if role.startswith("attn.") else ():
            packed = isinstance(anatomy.modules[path], nn.MultiheadAttention)
            found = containers.setdefault(path if packed else container(path, block.path, anatomy.modules), {})
            found[f"{role} twice" if role in found else role] = path
    yield from containers.values()


def _heads(anatomy: Anatomy, index: int, roles: dict[str, str]) -> Units:
    block = anatomy.block(index)
    heads, kv, size = block.heads, block.kv_heads, block.head_size
    o = roles.get("attn.o")
    if isinstance(anatomy.modules.get(roles.get("attn.qkv", "")), nn.MultiheadAttention):
        raise Unsupported(f"{roles['attn.qkv']} is an nn.MultiheadAttention, whose heads must fill its width; it cannot be cut")
    parts = anatomy.parts.get(roles.get("attn.qkv", ""), {})
    whole = {"attn.q", "attn.k", "attn.v"} <= set(roles) or len(parts) == 3
    if o is None or not whole or not (heads and kv and size) or any(role.endswith(" twice") for role in roles):
        raise Unsupported(
            f"the attention of {block.path} cannot be cut by heads: it has {', '.join(sorted(roles))}, with {heads} heads of size "
            f"{size}; q, k, v (or a fused projection of known layout), o and the number of heads are needed"
        )
    single = kv == 1 and heads > 1
    units, queries = (heads, size) if single else (kv, heads // kv * size)
    whole_q = torch.arange(units * queries).view(units, queries)
    whole_kv = torch.arange(0 if single else units * size).view(units, -1)
    if len(parts) == 3:
        rows = [part.index(torch.device("cpu")) for part in parts.values()]  # of q, k, v
        layout = torch.cat([row[units_] for row, units_ in zip(rows, (whole_q, whole_kv, whole_kv), strict=True)], 1)
        members = [Member(roles["attn.qkv"], "out", layout)]
        wanted = {roles["attn.qkv"]: (units * queries + 2 * kv * size, None)}
    else:
        members = [Member(roles["attn.q"], "out", whole_q)]
        members += [] if single else [Member(roles[role], "out", whole_kv) for role in ("attn.k", "attn.v")]
        wanted = {roles["attn.q"]: (heads * size, None)} | {roles[r]: (kv * size, None) for r in ("attn.k", "attn.v")}
    members.append(Member(o, "in", whole_q))
    _check_sizes(anatomy, wanted | {o: (None, heads * size)}, f"{heads} heads ({kv} of keys and values) of size {size}")
    home = container(o, block.path, anatomy.modules)
    holders = {p: anatomy.modules[p] for p in (*(m.path.rpartition(".")[0] for m in members), home)}
    _check_strangers(anatomy, block.path, home, members, {heads, heads * size} - {size, block.width, 1})
    numbers = list(_head_numbers(holders, block.width, heads, kv, size, units))
    return Units("heads", index, o, units, queries, tuple(members), tuple(numbers))


def _head_numbers(
    holders: dict[str, nn.Module], width: int | None, heads: int, kv: int, size: int, units: int
) -> Iterator[tuple[nn.Module, str, int]]:
    """What the attention's modules count: by name where the number alone does not tell."""
    each = heads // units  # query heads of a unit
    for module in dict.fromkeys(holders.values()):
        for name, value in vars(module).items():
            if type(value) is not int:
                continue
            if name in HEADS and value == heads:
                yield module, name, each
            elif name in KV_HEADS and value == kv and units == kv:
                yield module, name, 1
            elif name in _GROUPS and value == heads // kv and units != kv:
                yield module, name, 1
            elif value == heads * size and (name in _INNER or value != width):
                yield module, name, each * size
            elif value == kv * size and "kv" in name and units == kv:
                yield module, name, size


def _check_strangers(anatomy: Anatomy, block: str, home: str, members: list[Member], widths: set[int]) -> None:
    """Refuse other parameters that count heads or channels: a norm over all heads, a position table with a column a head."""
    mine = {m.path for m in members}
    for path, module in anatomy.modules.items():
        if path in mine or not (path == home or path.startswith(f"{home}.")):
            continue
        parent = anatomy.modules.get(path.rpartition(".")[0])
        beside_qkv = parent is not None and any(qkv_role(n, c) for n, c in parent._modules.items() if c is not None)
        for name, value in module._parameters.items():
            across = is_norm(path, module) and beside_qkv and value is not None and value.numel() in _inner(anatomy, members)
            if value is not None and not _role(anatomy, path) and (across or widths & set(value.shape)):
                raise Unsupported(
                    f"{block} cannot be cut: {path}.{name} of shape {tuple(value.shape)} runs over all heads or channels, and "
                    "nothing says how to cut it"
                )


def _role(anatomy: Anatomy, path: str) -> bool:
    """Whether ``path`` is of another attention or feed-forward, which is cut by itself; gates and positions are of this one."""
    role = anatomy.roles.get(path, "")
    return role.startswith(("attn.", "mlp.")) and role not in ("attn.gate", "attn.pos", "attn.other")


def _inner(anatomy: Anatomy, members: list[Member]) -> set[int]:
    """Widths of what the members give, if larger than one head's."""
    return {sizes(anatomy.modules[m.path])[0] for m in members if m.side == "out" and m.layout.shape[0] > 1}


# -- feed-forward


def _feed_forwards(anatomy: Anatomy, index: int) -> Iterator[dict[str, str]]:
    """role -> path of every feed-forward of a block: one a module that holds its own up and down, or one in the block."""
    block = anatomy.block(index)
    found = [(role, path) for role, paths in block.roles.items() if role.startswith("mlp.") for path in paths]
    if not found:
        if any(anatomy.owner.get(path) == index for path in anatomy.banks):
            yield {}
        return
    parents: dict[str, list[tuple[str, str]]] = {}
    for role, path in found:
        parents.setdefault(path.rpartition(".")[0], []).append((role, path))
    if all({"mlp.down"} < {role for role, _ in pairs} for pairs in parents.values()):
        groups = list(parents.values())
    else:
        groups = [found]
    for pairs in groups:
        yield dict(pairs) if len(dict(pairs)) == len(pairs) else {}


def _channels(anatomy: Anatomy, index: int, roles: dict[str, str]) -> Units:
    block = anatomy.block(index)
    down, up = roles.get("mlp.down"), roles.get("mlp.up") or roles.get("mlp.gate_up")
    if down is None or up is None:
        found = ", ".join(sorted(roles)) or "a bank of experts, or several layers of one role"
        raise Unsupported(
            f"the feed-forward of {block.path} cannot be cut: {found} was found, and one up (and gate) and one down are needed"
        )
    width, count = sizes(anatomy.modules[down])
    each = torch.arange(count).view(count, 1)
    if "mlp.gate_up" in roles:
        members = [Member(roles["mlp.gate_up"], "out", torch.cat([each, each + count], 1))]
    else:
        members = [Member(roles[role], "out", each) for role in ("mlp.gate", "mlp.up") if role in roles]
    members.append(Member(down, "in", each))
    wanted = {m.path: (m.layout.numel(), None) for m in members[:-1]}
    _check_sizes(anatomy, wanted, f"{count} channels")
    for parent in {m.path.rpartition(".")[0] for m in members}:
        _check_strangers(anatomy, block.path, parent, members, {count} - {width, block.width, 1})
    holders = dict.fromkeys(anatomy.modules[m.path.rpartition(".")[0]] for m in members)
    numbers = [(h, n, 1) for h in holders for n, v in vars(h).items() if type(v) is int and v == count != block.width]
    return Units("channels", index, down, count, 1, tuple(members), tuple(numbers))


# -- checks


def _check_sizes(anatomy: Anatomy, wanted: dict[str, tuple[int | None, int | None]], what: str) -> None:
    for path, (out, fan_in) in wanted.items():
        found = sizes(anatomy.modules[path])
        if (out or found[0], fan_in or found[1]) != found:
            raise Unsupported(f"{path} is {found[0]} x {found[1]}, which does not fit {what}; it cannot be cut")


def _reason(module: nn.Module, path: str, users: dict[int, list[str]]) -> str | None:
    """Why a module cannot be cut; None for the plain, untied matrix of a linear layer."""
    weight = module._parameters.get("weight")
    if weight is None or linear_forward_kind(module, "weight") is not LinearSite:
        return f"{path} is no linear layer that can be cut ({type(module).__name__})"
    if is_quantised(weight):
        return f"{path} is quantised ({type(weight).__name__}), and its blocks cannot be cut: cut first, quantise then"
    if type(weight) is not nn.Parameter:
        return f"{path} holds a {type(weight).__name__}; cut the model before it is sharded"
    if len(users[id(weight)]) > 1:
        return f"the weight of {path} is tied to {users[id(weight)][-1]}; untie the model first"
    return None
