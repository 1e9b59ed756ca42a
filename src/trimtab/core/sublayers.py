"""The branches of a block: its attentions and feed-forwards, as modules that read the residual stream and write to it.

A branch may be one module (``self_attn``, ``mlp``) or be spread over its block (``fc1`` and ``fc2``, say, or an attention whose
output projection shares a module with the norm after it). Activation adapters need to know where a branch reads and where its
output is, before anything is added to it; that is what a ``Sublayer`` says.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from trimtab.core.structure import class_of, container, is_norm

__all__ = ["SUBLAYERS", "Sublayer", "has_forward", "sublayers"]

#: roles of branches
SUBLAYERS = ("attn", "cross", "mlp")

_CROSS = re.compile(r"cross|enc_?dec|encoder_?att|src_?att|multihead_attn", re.IGNORECASE)
_UP = ("mlp.gate", "mlp.up", "mlp.gate_up")


@dataclass(frozen=True)
class Sublayer:
    """One branch of a block.

    Attributes:
        role: ``attn`` (self-attention), ``cross`` (attention to another sequence) or ``mlp`` (feed-forward).
        block: index of the block.
        path: the module whose first input and output are the branch's; None if the branch is spread over its block.
        reader: a module whose first input is the branch's input.
        output: the matrix (or nn.MultiheadAttention) whose output is the branch's; None if no single one is.
        norm: the norm whose output the branch reads in a block with norms in front; None if that cannot be inferred.
    """

    role: str
    block: int
    path: str | None
    reader: str
    output: str | None
    norm: str | None = None

    @property
    def where(self) -> str:
        """The module whose output is the branch's output."""
        return self.path or self.output  # type: ignore[return-value]


def has_forward(module: nn.Module) -> bool:
    """Whether a module can be called, and is no bare container of others."""
    return class_of(module).forward is not nn.Module.forward


def sublayers(
    blocks: tuple[str, ...],
    modules: dict[str, nn.Module],
    owner: dict[str, int],
    roles: dict[str, str],
    banks: dict[str, dict[str, str]],
) -> tuple[Sublayer, ...]:
    """The branches of all blocks, in model order."""
    found: list[Sublayer] = []
    for index, block in enumerate(blocks):
        inside = [path for path in modules if owner.get(path) == index]
        here = [_attention(group, block, index, modules, roles) for group in _attention_groups(block, inside, modules, roles)]
        here += _feed_forwards(block, index, inside, modules, roles, banks)
        order = {path: i for i, path in enumerate(inside)}
        here = sorted((s for s in here if s is not None), key=lambda s: order[s.reader])
        found += [_with_norm(s, i, len(here), block, modules) for i, s in enumerate(_told_apart(here, block))]
    return tuple(found)


def _told_apart(here: list[Sublayer], block: str) -> list[Sublayer]:
    """Attention after the first one of a block, and so named attention, reads another sequence."""
    seen, result = 0, []
    for s in here:
        if s.role == "attn":
            name = s.where[len(block) :]
            cross = bool(_CROSS.search(name)) if seen == 0 else True
            seen += 1
            s = Sublayer("cross" if cross else "attn", s.block, s.path, s.reader, s.output)
        result.append(s)
    return result


# -- attention


def _attention_groups(block: str, inside: list[str], modules: dict[str, nn.Module], roles: dict[str, str]) -> list[list[str]]:
    """Paths with attention roles, those of one attention together."""
    found = [path for path in inside if roles.get(path, "").startswith("attn.")]
    groups: dict[str, list[str]] = {}
    for path in found:
        if roles[path] != "attn.o":
            home = path if isinstance(modules[path], nn.MultiheadAttention) else container(path, block, modules)
            groups.setdefault(home, []).append(path)
    for path in found:
        if roles[path] == "attn.o":  # may stand in a module of its own below its attention
            around = [home for home in groups if path.startswith(f"{home}.")]
            groups.get(max(around, key=len, default=""), []).append(path)
    return list(groups.values())


def _attention(group: list[str], block: str, index: int, modules: dict[str, nn.Module], roles: dict[str, str]) -> Sublayer | None:
    packed = next((path for path in group if isinstance(modules[path], nn.MultiheadAttention)), None)
    if packed:
        return Sublayer("attn", index, packed, packed, packed)
    reader = next((path for path in group if roles[path] in ("attn.q", "attn.qkv")), None)
    output = next((path for path in reversed(group) if roles[path] == "attn.o"), None)
    if reader is None or output is None:
        return None
    return Sublayer("attn", index, _one_module(reader, output, block, modules), reader, output)


# -- feed-forward


def _feed_forwards(
    block: str,
    index: int,
    inside: list[str],
    modules: dict[str, nn.Module],
    roles: dict[str, str],
    banks: dict[str, dict[str, str]],
) -> list[Sublayer]:
    """Feed-forwards of a block, told apart by the block's child that their output stands in."""
    children: dict[str, list[str]] = {}
    for path in inside:
        if roles.get(path) == "mlp.down" or path in banks:
            children.setdefault(_child(path, block), []).append(path)
    ups = [path for path in inside if roles.get(path) in _UP]
    found = []
    for child, outputs in children.items():
        if len(outputs) > 1 or outputs[0] in banks:  # experts: the module around all of them is the branch
            attention = any(roles.get(p, "").startswith("attn.") and p.startswith(f"{child}.") for p in inside)
            if has_forward(modules[child]) and not attention:
                found.append(Sublayer("mlp", index, child, child, None))
            continue
        before = [path for path in ups if inside.index(path) < inside.index(outputs[0])]
        near = [path for path in before if path.startswith(f"{child}.")] or before
        if near:
            reader, output = near[-1], outputs[0]
            found.append(Sublayer("mlp", index, _one_module(reader, output, block, modules), reader, output))
    return found


def _child(path: str, block: str) -> str:
    """The block's child on the way to ``path``."""
    return ".".join(path.split(".")[: len(block.split(".")) + 1])


# -- what both share


def _one_module(reader: str, output: str, block: str, modules: dict[str, nn.Module]) -> str | None:
    """The innermost module around reader and output, if it is below the block, can be called, and adds nothing to the branch.

    A norm in it that stands neither beside the reader nor below it comes after the output: then the residual is added inside.
    """
    both = []
    for a, b in zip(reader.split(".")[:-1], output.split(".")[:-1], strict=False):
        if a != b:
            break
        both.append(a)
    path = ".".join(both)
    if not path.startswith(f"{block}.") or not has_forward(modules[path]):
        return None
    beside = reader.rpartition(".")[0]
    norms = [p for p, m in modules.items() if p.startswith(f"{path}.") and is_norm(p, m)]
    return path if all(p.rpartition(".")[0] == beside for p in norms) else None


def _with_norm(s: Sublayer, position: int, count: int, block: str, modules: dict[str, nn.Module]) -> Sublayer:
    """The sublayer with the norm in front of it: the only norm of a module around it, or of its block in the same order."""
    parent = (s.path or s.reader).rpartition(".")[0]
    norm = None
    while parent.startswith(block):
        norms = [f"{parent}.{name}" for name, m in modules[parent]._modules.items() if m is not None and is_norm(name, m)]
        if norms:
            if len(norms) == 1:
                norm = norms[0]
            elif parent == block and len(norms) == count:
                norm = norms[position]
            break
        if parent == block:
            break
        parent = parent.rpartition(".")[0]
    return Sublayer(s.role, s.block, s.path, s.reader, s.output, norm)
