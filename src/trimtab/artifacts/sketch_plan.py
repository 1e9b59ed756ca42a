"""What becomes of every tensor of a checkpoint when its model is sketched, and in which shard it will stand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trimtab.artifacts.source import Source
from trimtab.compat.weight_names import WeightNames
from trimtab.core import anatomy as anatomy_module
from trimtab.core.anatomy import Anatomy
from trimtab.core.errors import NoMatch, ShapeMismatch, TrimtabError, Unsupported, nearest, raise_all
from trimtab.core.kinds import LinearSite, linear_forward_kind
from trimtab.core.selection import Place, select
from trimtab.core.state import parameter_users
from trimtab.core.structure import is_conv1d
from trimtab.methods.reparameterized.sketchtune import check_groups

__all__ = ["BaseSketch", "Matrix", "Plan", "Shard", "make_plan"]

Targets = str | Sequence[str] | Callable[[str, nn.Module], bool] | None
_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class BaseSketch:
    """How a base is sketched.

    Args:
        bits: of a code, 1 to 8; a group has ``2^bits`` values.
        groups: a row; more cost ``16 * 2^bits / in`` bits a weight each and come nearer.
        power: p, of the columns' weights ``U_jj^-p`` while tables are learnt; where there is calibration data.
        damping: of the inputs' second moments, as a share of their mean diagonal.
        restarts: starts of k-means, the best of which is taken.
        embeddings: also sketch the table of input embeddings (and a head that is tied to it).
        dtype: in which tables and the other matrices are stored: ``auto`` is 16 bits, float16 for a source in float32, else the
            source's own. Vectors keep their dtype. The model computes in the source's dtype.
        seed: of the starts of k-means.
    """

    bits: int = 4
    groups: int = 1
    power: float = 3.0
    damping: float = 0.1
    restarts: int = 4
    embeddings: bool = False
    dtype: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        counts = {"bits": self.bits, "groups": self.groups, "restarts": self.restarts}
        problems: list[TrimtabError] = [
            ShapeMismatch(f"{name} must be an integer of at least 1, found {value!r}")
            for name, value in counts.items()
            if not isinstance(value, int) or isinstance(value, bool) or value < 1
        ]
        if not problems and self.bits > 8:
            problems.append(ShapeMismatch(f"codes have 1 to 8 bits, found {self.bits}"))
        if not self.power >= 0 or not self.damping >= 0:
            problems.append(ShapeMismatch(f"power and damping are not negative, found {self.power!r} and {self.damping!r}"))
        if self.dtype not in _DTYPES:
            problems.append(ShapeMismatch(f"the dtype must be one of {', '.join(_DTYPES)}, found {self.dtype!r}"))
        raise_all(problems)

    def stored(self, dtype: torch.dtype, dim: int) -> torch.dtype:
        """In which dtype a tensor of ``dtype`` and ``dim`` axes is stored, if it is not sketched."""
        if not dtype.is_floating_point or dtype.itemsize < 2 or dim < 2:
            return dtype
        if self.dtype != "auto":
            return getattr(torch, self.dtype)
        return dtype if dtype.itemsize == 2 else torch.float16


@dataclass(frozen=True)
class Matrix:
    """A tensor that is sketched.

    Attributes:
        path: of the module that has it.
        transposed: stored as (in, out).
        block: index of the block that it stands in; None outside of the blocks.
    """

    path: str
    transposed: bool
    block: int | None


@dataclass(frozen=True)
class Shard:
    """One file of the sketch: the tensors in it, and the blocks that are in it whole."""

    file: str
    keys: tuple[str, ...]
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """See the module.

    Attributes:
        model: the model without its weights.
        weights: which tensors of the checkpoint fill which parameters.
        names: parameter or buffer of the model -> the tensor of the checkpoint, where it has one of its own.
        matrices: tensors that are sketched.
        shards: in the order in which they are made.
        dtype: in which the source computes: that of most of its weights.
    """

    source: Source
    sketch: BaseSketch
    model: nn.Module
    anatomy: Anatomy
    weights: WeightNames
    names: dict[str, str]
    matrices: dict[str, Matrix]
    shards: tuple[Shard, ...]
    dtype: torch.dtype


def make_plan(
    source: Source, model: nn.Module, sketch: BaseSketch, *, targets: Targets, shard_bytes: int, walked: bool = False
) -> Plan:
    """Decide what is sketched and which shard it goes to; reads no weight.

    Args:
        walked: the blocks will be run one after the other; a model without blocks is then one shard.

    Raises:
        NoMatch: ``targets`` matches nothing, or the checkpoint has none of the matrices.
        ShapeMismatch: rows that ``sketch`` cannot cut, all of them. Unsupported: a place that is no Linear, or a quantised source.
    """
    quantised = getattr(getattr(model, "config", None), "quantization_config", None)
    if quantised is not None:
        raise Unsupported(f"{source.name} is quantised already ({quantised}); sketch the checkpoint that it was made from")
    if shard_bytes < 1:
        raise ShapeMismatch(f"a shard has at least one byte, found {shard_bytes}")
    anatomy = anatomy_module.of(model)
    weights = WeightNames(model, source.where)
    users = parameter_users(model)
    alike = {name: names for names in users.values() for name in names}
    names = _names(model, source, weights, alike)
    matrices = _matrices(source, model, anatomy, names, sketch, targets)
    problems: list[TrimtabError] = []
    for key, matrix in matrices.items():
        shape = source.shape(key)
        try:
            check_groups(shape[0] if matrix.transposed else shape[-1], sketch.bits, sketch.groups, key)
        except TrimtabError as error:
            problems.append(error)
    raise_all(problems)
    sizes: dict[torch.dtype, int] = {}
    for key in matrices:
        sizes[source.dtype(key)] = sizes.get(source.dtype(key), 0) + source.nbytes(key)
    dtype = max(sizes, key=sizes.__getitem__)
    whole = walked and not anatomy.blocks
    limit = sum(map(source.nbytes, source.where)) if whole else shard_bytes
    shards = _shards(source, _owners(weights, alike, anatomy), limit)
    return Plan(source, sketch, model, anatomy, weights, names, matrices, shards, dtype)


def _names(model: nn.Module, source: Source, weights: WeightNames, alike: Mapping[str, list[str]]) -> dict[str, str]:
    """Parameters and buffers that are one tensor of the checkpoint; tied ones all alike."""
    found = {}
    for name, value in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        group = next((weights.groups[each] for each in alike.get(name, [name]) if each in weights.groups), None)
        if group is not None and group.converter is None and source.shape(group.keys[0]) == tuple(value.shape):
            found[name] = group.keys[0]
    return found


def _owners(weights: WeightNames, alike: Mapping[str, list[str]], anatomy: Anatomy) -> dict[str, int]:
    """Tensor -> index of its block; one that others outside of the block use as well belongs to none."""
    found = {}
    for key, group in weights.groups_by_key.items():
        names = [each for name in group.params for each in alike.get(name, [name])]
        blocks = {anatomy.block_of(name.rpartition(".")[0]) for name in names}
        if len(blocks) == 1 and None not in blocks:
            found[key] = blocks.pop()
    return found


def _matrices(
    source: Source, model: nn.Module, anatomy: Anatomy, names: dict[str, str], sketch: BaseSketch, targets: Targets
) -> dict[str, Matrix]:
    layers = {t.path: range(len(t.blocks)) for t in anatomy.towers} if targets is None and anatomy.blocks else None
    places = select(model, "linear" if targets is None else targets, layers=layers, anatomy=anatomy)
    odd = [place for place in places if not _is_linear(place)]
    if odd and targets is not None:
        shown = ", ".join(place.path for place in odd[:3])
        raise Unsupported(f"Linear layers are sketched, and {len(odd)} of the targeted places are none, such as {shown}")
    found, absent = {}, []
    for place in places:
        name = f"{place.path}.weight"
        if name in names:
            found[names[name]] = Matrix(place.path, is_conv1d(place.module), place.block)
        elif place not in odd:
            absent.append(name)
    if sketch.embeddings:
        found.update(_embeddings(source, model, anatomy, names))
    if absent and targets is not None or not found:
        raise NoMatch(
            f"the checkpoint of {source.name} has no tensor of its own for {', '.join(absent[:3]) or 'any Linear layer'}"
            f"{nearest(absent[0], source.where) if absent else ''}"
        )
    order = {key: i for i, key in enumerate(source.where)}
    return dict(sorted(found.items(), key=lambda item: order[item[0]]))


def _is_linear(place: Place) -> bool:
    weight = place.module._parameters.get("weight")
    whole = place.tensor is None and place.part is None and weight is not None and weight.dim() == 2
    return whole and linear_forward_kind(place.module, "weight") is LinearSite


def _embeddings(source: Source, model: nn.Module, anatomy: Anatomy, names: dict[str, str]) -> dict[str, Matrix]:
    """The table of input embeddings, as transformers names it."""
    table: Any = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    path = next((path for path, module in anatomy.modules.items() if module is table), None)
    if not isinstance(table, nn.Embedding) or f"{path}.weight" not in names:
        raise NoMatch(f"{source.name} has no table of input embeddings that {type(model).__name__} looks up; leave embeddings off")
    if table.max_norm is not None:
        raise Unsupported(f"{path} rescales its rows (max_norm) while it looks them up; leave embeddings off")
    return {names[f"{path}.weight"]: Matrix(path, False, anatomy.block_of(path))}


def _shards(source: Source, owner: dict[str, int], limit: int) -> tuple[Shard, ...]:
    """First what stands outside of the blocks, then whole blocks in their order; at most ``limit`` dense bytes, or one of them."""
    rest = [key for key in source.where if key not in owner]
    blocks: dict[int, list[str]] = {}
    for key in source.where:
        if key in owner:
            blocks.setdefault(owner[key], []).append(key)
    units = [((key,), None) for key in rest] + [(tuple(blocks[i]), i) for i in sorted(blocks)]
    made: list[tuple[list[str], list[int]]] = []
    size = 0
    for keys, block in units:
        own = sum(source.nbytes(key) for key in keys)
        if not made or size + own > limit:
            made.append(([], []))
            size = 0
        made[-1][0].extend(keys)
        made[-1][1].extend([] if block is None else [block])
        size += own
    names = (f"sketch-{i:05d}-of-{len(made):05d}.safetensors" for i in range(1, len(made) + 1))
    return tuple(Shard(name, tuple(keys), tuple(own)) for name, (keys, own) in zip(names, made, strict=True))
