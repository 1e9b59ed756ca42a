"""The tensors of a merged checkpoint: which there are, and the merged values of one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.artifacts.base import values_in
from trimtab.artifacts.combine import place_seed
from trimtab.artifacts.heads import head_value
from trimtab.artifacts.rules import RuleEntry
from trimtab.artifacts.saved import Saved
from trimtab.artifacts.shards import Output
from trimtab.artifacts.updates import Place, whole_value
from trimtab.compat.head_file import HEAD_TENSORS
from trimtab.compat.pretrained import Pretrained
from trimtab.compat.safetensors_file import Header, dtype_name
from trimtab.compat.weight_names import Group
from trimtab.core.host import adapted_chain
from trimtab.core.merging import Target, accumulate, check_target, report_table
from trimtab.core.site import Site, dense, is_quantised
from trimtab.core.table import Table

__all__ = ["Made", "Merge", "MergedTensor", "add_rows", "moved", "outputs_of", "path_of"]


@dataclass
class MergedTensor:
    """One parameter of the base that the merge changes.

    Attributes:
        site: a site on it; the first adapter's.
        chains: adapter number -> what of it acts here, each as a chain of its own.
        group: the checkpoint's tensors that fill it; None for a new head.
        name: the parameter's name in the model.
        tied: other names of the same parameter.
    """

    site: Site
    chains: dict[int, list[list[Any]]]
    group: Group | None = None
    name: str = ""
    tied: tuple[str, ...] = ()


@dataclass
class Merge:
    """The resolved work.

    Attributes:
        heads: what becomes of heads that the base has no values for.
        notes: what the adapters remember of their model.
        flags: where in the config a flag that ties a merged tensor is turned off; ``model`` is the model without it.
        loose: names of parameters that shared a tensor through it and need one of their own.
    """

    base: Pretrained
    opened: list[Saved]
    weights: list[float]
    rule: RuleEntry
    parameters: dict[str, Any]
    into: str | None
    max_error: float | None
    seed: int
    report: Table
    heads: str = "average"
    notes: dict[str, Any] = field(default_factory=dict)
    tensors: list[MergedTensor] = field(default_factory=list)
    flags: list[tuple[str, ...]] = field(default_factory=list)
    loose: list[str] = field(default_factory=list)
    model: nn.Module | None = None


def outputs_of(work: Merge, made: Made) -> list[Output]:
    """Every tensor of the new checkpoint, in the order of the base's files."""
    base, dense_all = work.base, work.base.codec is not None and work.into == "dequantised"
    changed = {key: t.group for t in work.tensors if t.group is not None and not moved(t) for key in base.keys(t.group)}
    inside = {part: name for name, parts in base.parts.items() for part in parts} if dense_all else {}
    outputs: dict[str, Output] = {}
    for header in base.files:
        for entry in header.entries.values():
            file, key = header.file.name, inside.get(entry.name, entry.name)
            if entry.name in inside:  # the first of a quantised weight's tensors stands for the dense weight
                shape = tuple(base.dense_shape(key))
                outputs.setdefault(key, Output(file, key, dtype_name(base.dtype), shape, partial(made.dense, key, changed)))
            elif key in changed:
                shape = None if base.codec is not None else entry.shape
                outputs[key] = Output(file, key, entry.dtype, shape, partial(made.part, changed[key], key))
            else:
                outputs[key] = Output(file, key, entry.dtype, entry.shape, partial(_copy, header, key), entry.end - entry.begin)
    for t in work.tensors:
        shape = tuple(t.site.parameter().shape)
        if t.group is None:
            home = HEAD_TENSORS if base.prefix else base.files[-1].file.name  # no class of the model has a head beside its prefix
            outputs[t.name] = Output(home, t.name, dtype_name(base.dtype), shape, partial(made.own, t))
            continue
        header = base.where[base.keys(t.group)[0]]
        home, dtype = header.file.name, header.entries[base.keys(t.group)[0]].dtype
        if moved(t):
            outputs[t.name] = Output(home, t.name, dtype, shape, partial(made.own, t))
    for name in work.loose:
        path, _, tensor = name.rpartition(".")
        key = base.keys(base.group(base.prefix + path, tensor))[0]
        header, shape = base.where[key], tuple(base.model.get_parameter(name).shape)
        value = partial(base.value, base.prefix + path, tensor)
        outputs[name] = Output(header.file.name, name, header.entries[key].dtype, shape, value)
    return list(outputs.values())


def _copy(header: Header, key: str) -> tuple[Header, str]:
    return header, key


def moved(tensor: MergedTensor) -> bool:
    """Whether a tied tensor's values stand under another name, which keeps the old ones."""
    return bool(tensor.tied) and tensor.name not in tensor.group.params


class Made:
    """Merged tensors on demand; those of a group whose other tensors come later in the same file are kept until then."""

    def __init__(self, work: Merge):
        self.work = work
        self.waiting: dict[str, Tensor] = {}

    def forget(self) -> None:
        """Let go of what a finished file did not need."""
        self.waiting.clear()
        self.work.base.forget()

    def part(self, group: Group, key: str) -> Tensor:
        """One tensor of the checkpoint's files."""
        if key not in self.waiting:
            self.waiting.update(self._group(group))
        return self.waiting.pop(key)

    def dense(self, key: str, changed: dict[str, Group]) -> Tensor:
        """A weight that was quantised, dense."""
        base = self.work.base
        if base.parts[key][0] in changed:
            return self._group(changed[base.parts[key][0]])[key]
        return dense(base.tensor(key), nn.Module()).detach().to(base.dtype).contiguous()

    def own(self, tensor: MergedTensor) -> Tensor:
        """A tensor that the checkpoint does not have under its own name."""
        return _merged(self.work, tensor).detach()

    def _group(self, group: Group) -> dict[str, Tensor]:
        """All tensors of a group, as the files hold them."""
        work, base = self.work, self.work.base
        values = dict(base.values(group))
        for tensor in work.tensors:
            if tensor.group is group and not moved(tensor):
                values[tensor.name] = _merged(work, tensor)
        base.forget()
        made = {}
        for key, value in base.names.write(group, values).items():
            again = is_quantised(value) and key in base.parts
            made |= base.codec.write(key, value) if again else {key: value.detach()}
        return made


def _merged(work: Merge, tensor: MergedTensor) -> Tensor:
    """The parameter to store; its row goes into the report."""
    site, dtype, scratch = tensor.site, accumulate(tensor.site), report_table("")
    if tensor.group is None:  # whole values: nothing is rounded but their own average
        place = Place(site, [(number, chains[0][0]) for number, chains in tensor.chains.items()])
        new, _ = head_value(place, [whole_value(effect) for _, effect in place.effects], work.weights, work.heads)
        new = site.unmatrix(new).reshape(site.parameter().shape).to(work.base.dtype)
        row = path_of(site), "x".join(map(str, site.shape)), str(new.dtype).removeprefix("torch."), 0.0, 0.0, 0.0
        add_rows(work.report, [row])
        return new
    with values_in(work.base, [site]):
        exact = _exact(work, tensor, dtype)
        target = Target(site, [chain for chains in tensor.chains.values() for chain in chains])
        new = check_target(target, exact, work.into, scratch, work.max_error)
    add_rows(work.report, scratch.rows)
    return new


def path_of(site: Site) -> str:
    """A tensor as reports name it."""
    return site.path if site.tensor == "weight" else f"{site.path}.{site.tensor}"


def _exact(work: Merge, tensor: MergedTensor, dtype: torch.dtype) -> Tensor:
    """``W + rule(D_1, ...)`` before rounding, in the contraction's layout."""
    site = tensor.site
    alone = list(tensor.chains) == [0] and len(work.weights) == 1 and work.weights == [1.0] and work.rule.name == "linear"
    if alone:
        return adapted_chain(site, tensor.chains[0], dtype=dtype)
    W = adapted_chain(site, [], dtype=dtype)
    updates = [adapted_chain(site, chains, dtype=dtype) - W for chains in tensor.chains.values()]
    weights = [work.weights[number] for number in tensor.chains]
    return W + work.rule(updates, weights, work.parameters, seed=place_seed(work.seed, path_of(site)))


def add_rows(report: Table, rows: Sequence[Sequence[Any]]) -> None:
    """Rows whose tensor is not reported yet: one that fills several files is made for each of them."""
    known = set(report.column("path"))
    for row in rows:
        if row[0] not in known:
            report.add(*row)
