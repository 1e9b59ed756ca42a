"""What a row of the table method <-> peft type is (``Twin``), and the layouts in which the two differ."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trimtab.compat.peft_files import pattern_key
from trimtab.core.contracts import Adapter, MethodConfig
from trimtab.core.site import Site

__all__ = [
    "Fields", "Stored", "Tensors", "Twin", "channels", "kernel", "layer_of", "pack_ia3", "pack_projections", "pointwise",
    "other_blocks", "other_side", "projections", "slices", "unpack_ia3",
    "without_tensors",
]  # fmt: skip

Fields = dict[str, Any]
Tensors = dict[str, Tensor]


def layer_of(site: Site) -> str:
    """The name of a site's layer as ``Twin.layers`` lists it; ``*`` marks convolutions with groups or dilation."""
    if site.kind == "linear":
        return "Conv1D" if site.transposed else "Linear"
    if site.kind in ("conv", "grouped"):
        m = site.module
        name = f"Conv{len(m.kernel_size)}d"
        if m.padding_mode != "zeros":
            return f"{name} with padding_mode={m.padding_mode!r}"
        return name + "*" * (m.groups > 1 or any(d > 1 for d in m.dilation))
    return {"embedding": "Embedding"}.get(site.kind, f"{type(site.module).__name__}.{site.tensor} ({site.kind})")


# -- layouts: our shape -> peft's, for the layer kinds where they differ


def _same(site: Site, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape


def kernel(site: Site, shape: tuple[int, ...]) -> tuple[int, ...]:
    """``(r, in * k) -> (r, in, k...)`` on convolutions."""
    if site.kind not in ("conv", "grouped"):
        return shape
    k = tuple(site.module.kernel_size)
    return (shape[0], shape[1] // math.prod(k), *k)


def pointwise(site: Site, shape: tuple[int, ...]) -> tuple[int, ...]:
    """``(out, r) -> (out, r, 1...)`` on convolutions."""
    return (*shape, *(1 for _ in site.module.kernel_size)) if site.kind == "conv" else shape


def channels(site: Site, shape: tuple[int, ...]) -> tuple[int, ...]:
    """``(out,) -> (1, out, 1...)`` on convolutions."""
    return (1, *shape, *(1 for _ in site.module.kernel_size)) if site.kind == "conv" else shape


@dataclass(frozen=True)
class Stored:
    """One tensor of a place: our name, peft's (below the module's path), peft's shape, peft's name on an embedding.

    ``derived``: ``unpack`` makes it; the file does not hold it at the place.
    """

    ours: str
    theirs: str
    shape: Callable[[Site, tuple[int, ...]], tuple[int, ...]] = _same
    embedding: str | None = None
    derived: bool = False

    def name(self, site: Site) -> str:
        """peft's name at ``site``."""
        return self.embedding or self.theirs if site.kind == "embedding" else self.theirs


@dataclass(frozen=True)
class Twin:
    """One peft type.

    Attributes:
        peft_type: as in ``adapter_config.json``.
        methods: our methods that are written as this type.
        tensors: what a place stores.
        layers: the layers on which peft computes the same, as ``layer_of`` names them.
        fields: the config's fields that decide the function, with peft's defaults; ``...`` where the file must say it.
        read: these fields at one place, and its tensors -> our config.
        write: our config -> these fields, or None if peft cannot express it.
        harmless: fields without influence on the trained function.
        training: dropouts that trimtab's method lacks, which matter while training only.
        patterns: field -> the field that overrides it by place, and the prefix that a pattern may have.
        unpack, pack: other changes of a place's tensors, after reading and before writing.
        common, pack_common: tensors that all places share.
        gather: fields that all places make together, such as lists of them.
        against: (config, path, a place's tensors, site) -> in which field the config contradicts the tensors, in words, or None.
    """

    peft_type: str
    methods: tuple[str, ...]
    tensors: tuple[Stored, ...]
    layers: frozenset[str]
    fields: Fields
    read: Callable[[Fields, Tensors], MethodConfig]
    write: Callable[[Any], Fields | None]
    harmless: tuple[str, ...] = ()
    training: tuple[str, ...] = ()
    patterns: dict[str, str] = field(default_factory=dict)
    prefix: str = r"(.*\.)?"
    unpack: Callable[[Tensors, Fields, Site, Tensors], Tensors] = lambda stored, fields, site, common: stored
    pack: Callable[[Tensors, Fields, Adapter], Tensors] = lambda stored, fields, adapter: stored
    common: Callable[[Fields, list[Site], Tensors], Tensors] = lambda fields, sites, loose: {}
    pack_common: Callable[[list[Adapter]], Tensors | None] = lambda adapters: {}
    gather: Callable[[list[Adapter]], Fields] = lambda adapters: {}
    against: Callable[[Fields, str, Tensors, Site], str | None] = lambda config, path, stored, site: None
    #: names that ``unpack`` turns into others
    also: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """All names of tensors that a place may have."""
        return [n for s in self.tensors if not s.derived for n in (s.theirs, s.embedding) if n] + list(self.also)

    def at(self, config: Fields, path: str) -> Fields:
        """The function-deciding fields at one place: the config's, peft's defaults, and the place's own rank and alpha."""
        fields = self.fields | {key: config[key] for key in self.fields if config.get(key) is not None}
        for key, patterns in self.patterns.items():
            table = config.get(patterns) or {}
            fields[key] = table.get(pattern_key(table, path, self.prefix), fields[key])
        return fields


def without_tensors(peft_type: str, *harmless: str) -> Twin:
    """A type that has no tensors of its own: parameters, or rows of them, as they are."""
    none = lambda *given: None  # noqa: E731
    return Twin(
        peft_type=peft_type, methods=(), tensors=(), layers=frozenset(), fields={}, read=none, write=none, harmless=harmless
    )


# -- VeRA: A and B stand once in the file, or in the seed alone


def projections(f: Fields, sites: list[Site], loose: Tensors) -> Tensors:
    """The two matrices that all places share, as large as the largest place needs."""
    if not sites:
        return {}
    # moved before they are cut, so that all places see one storage; a base of shapes alone has no device
    device = torch.device("cpu") if sites[0].is_meta else sites[0].device
    if f["save_projection"]:
        names = {"vera_A": "base_model.vera_A", "vera_B": "base_model.vera_B"}
        return {key: loose.pop(name).to(device) for key, name in names.items() if name in loose}
    out, fan_in = max(s.shape[-2] for s in sites), max(s.shape[-1] for s in sites)
    rng = torch.Generator().manual_seed(f["projection_prng_key"])
    draw = lambda *shape: torch.empty(shape).uniform_(-math.sqrt(6 / shape[1]), math.sqrt(6 / shape[1]), generator=rng)  # noqa: E731
    return {"vera_A": draw(f["r"], fan_in).to(device), "vera_B": draw(out, f["r"]).to(device)}


def slices(stored: Tensors, f: Fields, site: Site, common: Tensors) -> Tensors:
    """A place's own part of the two matrices."""
    out, fan_in = site.shape
    if "vera_A" in common and "vera_B" in common:
        stored |= {"vera_A": common["vera_A"][:, :fan_in], "vera_B": common["vera_B"][:out]}
    return stored


def pack_projections(adapters: list[Any]) -> Tensors | None:
    """The two matrices of all places, or None if they are not parts of one pair."""
    A = max((a.A for a in adapters), key=lambda v: v.shape[1]).detach()
    B = max((a.B for a in adapters), key=lambda v: v.shape[0]).detach()
    if not all(torch.equal(a.A, A[:, : a.A.shape[1]]) and torch.equal(a.B, B[: a.B.shape[0]]) for a in adapters):
        return None  # attached in several calls: more than one pair
    return {"base_model.vera_A": A, "base_model.vera_B": B}


# -- IA3: the shape of a gain tells its side, (1, in) or (out, 1)


def unpack_ia3(stored: Tensors, f: Fields, site: Site, common: Tensors) -> Tensors:
    """The gain as a vector, and its side among the fields."""
    gain = stored.get("ia3_l")
    if gain is None:
        return stored
    f["side"] = "input" if gain.shape[0] == 1 else "output"
    return stored | {"ia3_l": gain.flatten()}


def other_side(config: Fields, path: str, stored: Tensors, site: Site) -> str | None:
    """Where ``feedforward_modules`` puts the gain at the other side than its shape does; peft looks at a path's end."""
    gain, names = stored.get("ia3_l"), config.get("feedforward_modules")
    if gain is None or gain.numel() == 1 or names is None:
        return None
    said = re.fullmatch(names, path) is not None if isinstance(names, str) else any(path.endswith(name) for name in names)
    if said == (gain.shape[0] == 1):
        return None
    return f"feedforward_modules says that the gain is on the {'input' if said else 'output'}, and it is {tuple(gain.shape)}"


def other_blocks(config: Fields, stored: Tensors, site: Site, *, size: int | None, names: tuple[str, str]) -> str | None:
    """Where the config tells another size of a rotation's blocks than the tensors; ``names``: of the size, of the number."""
    if size is None or site.kind != "linear":
        return None
    by_size, by_number = (config.get(name) or 0 for name in names)
    if by_size and site.in_features % by_size == 0 and by_size != size:
        return f"{names[0]}={by_size}, and the tensors have blocks of {size}"
    if by_number and not by_size and site.in_features % by_number == 0 and site.in_features // by_number != size:
        return f"{names[1]}={by_number}, and the tensors have {site.in_features // size} blocks of {size}"
    return None


def pack_ia3(stored: Tensors, f: Fields, adapter: Any) -> Tensors:
    """The gain as peft has it."""
    return {key: v[None] if adapter.at_input else v[:, None] for key, v in stored.items()}
