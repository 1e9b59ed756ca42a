"""What an adapter started from, so that only what it learnt has to be stored.

A start is known in one of four ways, tried in this order:

``held``  the adapter keeps it as a buffer (PiSSA, SoKA): ``Adapter.starts``.
``made``  it is built again, from the seed that the manifest remembers, or without any if no random number decides it. Only shapes
          are needed, so no base.
``base``  it is built again on the base's weights (DoRA's magnitudes, tuned norms and biases).
``zero``  unknown: it was drawn from a generator that others had used, or measured on data. The value itself is then the update,
          which is also what the paper does with both factors of a LoRA.

Nothing depends on a start being the true one: a reader that builds the same start gets the same values. That it does is
checked by eight signed sums of all built starts (``sketch``), to one percent: another seed, generator or base is noticed, the same
base in half precision passes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core import anatomy
from trimtab.core.bank import build_adapter
from trimtab.core.checkpoint import rebuild
from trimtab.core.contracts import Adapter, Selection
from trimtab.core.errors import CheckpointMismatch, TrimtabError, Unsupported
from trimtab.core.registry import config_from_dict
from trimtab.core.site import Cohort, Rows, Site
from trimtab.core.state import shapes_by_place, unwrap

__all__ = ["Starts", "compare_sketch", "find", "held", "shells", "sketch"]

FREE, MOST = 1 << 22, 64  # numbers that a place may have without storing them, and how many times those that it stores
PROJECTIONS = 8
TOLERANCE = 0.01


class _NeedsBase(Unsupported):
    """A start that reads the base's weights, while there is no base."""


class _NoTensors(dict):
    """The parameters of a module that is not there."""

    def _needed(self, *_: Any) -> Any:
        raise _NeedsBase("the base's parameters are needed")

    __getitem__ = __contains__ = get = __iter__ = items = values = keys = _needed


class _NoModule(nn.Module):
    """Stands where a base's module would be; whoever looks at it needs the base."""

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["_parameters"] = _NoTensors()

    def __getattr__(self, name: str) -> Any:
        raise _NeedsBase(f"the base's module is needed ({name})")


class _Place(Site):
    """A place as a manifest describes it: shapes and no weights."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        if self.is_meta:
            return torch.empty(self.shape, device="meta", dtype=self.dtype)
        raise _NeedsBase(f"the weight of {self.name} is needed")

    @property
    def carries_bias(self) -> bool:
        raise _NeedsBase(f"the module at {self.name} is needed")

    def parameter(self) -> Tensor:
        return self.weight


def _places(manifest: Mapping[str, Any]) -> list[Site]:
    found = []
    for entry in manifest["places"]:
        config = config_from_dict(entry["method"])
        site = _Place(
            module=_NoModule(), path=entry["path"], tensor=entry["tensor"], shape=tuple(entry["shape"]), part=entry.get("part"),
            rows=Rows(*entry["rows"]) if "rows" in entry else None, role=entry.get("role"), block=entry.get("block"),
            layer=type(config).adapter_class.layer(config), source_path=entry.get("source"),
        )  # fmt: skip
        site.kind = entry["kind"]
        found.append(site)
    return found


def _prefix(site: Site) -> str:
    return f"{site.path}.{site.slot}."


def shells(manifest: Mapping[str, Any], model: nn.Module | None = None) -> list[Adapter]:
    """The adapters of a manifest with shapes only, in its order: they tell parameters from buffers.

    Raises:
        Unsupported: a method looks at the base's module even for its shapes, and there is no ``model``.
    """
    if model is not None:
        return rebuild(unwrap(model), dict(manifest))
    sites = _places(manifest)
    cohorts: dict[str, Cohort] = {}
    for site, entry in zip(sites, manifest["places"], strict=True):
        site.cohort = cohorts.setdefault(json.dumps(entry["method"], sort_keys=True), Cohort())
        site.cohort.sites.append(site)
    built = []
    for site, entry, stored in zip(sites, manifest["places"], shapes_by_place(manifest["tensors"], sites), strict=True):
        twin = site.shapes_only()
        twin.stored = stored
        try:
            adapter = _built(config_from_dict(entry["method"]), twin, torch.Generator())
        except _NeedsBase:
            raise Unsupported(f"{entry['method']['name']} at {site.name} cannot be rebuilt without its base; pass model=") from None
        adapter.site = site
        built.append(adapter)
    return built


def _built(config: Any, site: Site, rng: torch.Generator) -> Adapter:
    """The adapter of one place.

    Raises:
        CheckpointMismatch: the manifest's shape and kind are none that the method can have.
    """
    try:
        return build_adapter(config, site, rng)
    except TrimtabError:
        raise
    except Exception as error:  # whatever a method runs into on a damaged manifest's sizes
        what = f"{config} on a {site.kind} place of shape {list(site.shape)}"
        raise CheckpointMismatch(f"{site.name} cannot be built as the manifest says, {what}: {error}") from error


def _check_size(config: Any, site: Site, stored: int) -> None:
    """Refuse sizes that have nothing to do with the tensors that are stored, before any memory is taken for them."""
    twin = site.shapes_only()
    twin.cohort = Cohort(list(site.cohort.sites))  # what its places share has no values either
    wanted = sum(value.numel() for value in _built(config, twin, torch.Generator()).state_dict().values())
    if wanted > FREE + MOST * stored:
        raise CheckpointMismatch(f"{site.name} has {stored:,} numbers stored, and the manifest's {config} takes {wanted:,}")


def held(adapter: Adapter) -> dict[str, str]:
    """Name of a parameter -> name of the buffer that keeps its start."""
    buffers = {id(value): name for name, value in adapter.named_buffers()}
    return {name: buffers[id(value)] for name, value in adapter.starts().items()}


@dataclass
class Starts:
    """Starts by tensor.

    Attributes:
        made, base: key -> value, built from shapes alone, and on the base's weights.
        lacking: keys of places whose start would need the base, which was not there.
        unknown: keys of places whose start cannot be built again.
    """

    made: dict[str, Tensor] = field(default_factory=dict)
    base: dict[str, Tensor] = field(default_factory=dict)
    lacking: set[str] = field(default_factory=set)
    unknown: set[str] = field(default_factory=set)


@torch.no_grad()
def find(manifest: Mapping[str, Any], model: nn.Module | None = None, *, random: bool = True) -> Starts:
    """Build the starts of all tensors of a manifest again.

    Args:
        model: the base; None: only what needs no base.
        random: also those that a seed decides; without, they are ``unknown``.
    """
    sites = _places(manifest)
    real: list[Site] | None = None
    if model is not None:
        real = [adapter.site for adapter in rebuild(unwrap(model), dict(manifest))]
        facts = anatomy.of(unwrap(model)).facts
        for site in real:
            site.head_size = facts[site.block]["head_size"] if site.block is not None else None
    found = Starts()
    for members in _attaches(manifest["places"]):
        entries = [manifest["places"][i] for i in members]
        own = [sites[i] for i in members]
        for target, chosen in ((found.made, own), (found.base, real and [real[i] for i in members])):
            if chosen is None:
                found.lacking.update(_keys(manifest, own))
                continue
            try:
                values = _build(entries, chosen, manifest["tensors"], random=random)
            except _NeedsBase:
                continue
            if values is None:
                found.unknown.update(_keys(manifest, own))
            else:
                target.update(values)
            break
    return found


def _keys(manifest: Mapping[str, Any], sites: Iterable[Site]) -> Iterator[str]:
    prefixes = tuple(_prefix(site) for site in sites)
    return (key for key in manifest["tensors"] if key.startswith(prefixes))


def _attaches(places: list[Mapping[str, Any]]) -> Iterator[list[int]]:
    """Numbers of the places that one attach made together, from one generator; selections, which draw nothing, one by one."""
    run: list[int] = []
    last: Any = ()
    for i, entry in enumerate(places):
        if issubclass(config_from_dict(entry["method"]).adapter_class, Selection):
            yield [i]
            continue
        seed, order = entry.get("origin", (None, None))
        if run and (seed != last or order == 0):
            yield run
            run = []
        run.append(i)
        last = seed
    if run:
        yield run


def _build(entries: list[Mapping[str, Any]], sites: list[Site], tensors: Mapping[str, Any], *, random: bool) -> dict | None:
    """The starts of one attach, or None where they cannot be had again."""
    configs = [config_from_dict(entry["method"]) for entry in entries]
    if any(config.adapter_class.wants(config) for config in configs):
        return None  # measured on data
    origins = [entry.get("origin") for entry in entries]
    whole = None not in origins and [order for _, order in origins] == list(range(len(origins)))
    seed = origins[0][0] if whole else 0
    cohorts: dict[Any, Cohort] = {}
    for site, config in zip(sites, configs, strict=True):
        keys = [key for key in tensors if key.startswith(_prefix(site))]
        dtypes = [getattr(torch, tensors[key]["dtype"]) for key in keys]
        site.adapter_dtype = next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)
        site.stored = {}
        site.cohort = cohorts.setdefault(config, Cohort())
        site.cohort.sites.append(site)
    rng = torch.Generator().manual_seed(seed)
    untouched = rng.get_state()
    found = {}
    for site, config in zip(sites, configs, strict=True):
        _check_size(config, site, sum(math.prod(tensors[key]["shape"]) for key in tensors if key.startswith(_prefix(site))))
        adapter = _built(config, site, rng)
        for name, value in adapter.state_dict().items():
            key = _prefix(site) + name
            if key in tensors and list(value.shape) == tensors[key]["shape"]:
                found[key] = value.detach().cpu()
    if not torch.equal(rng.get_state(), untouched) and not (whole and random):
        return None  # drawn, and not from the start of a known seed
    return found


def sketch(values: Iterable[Tensor]) -> list[float]:
    """Eight sums of all entries with pseudo-random signs, then the root of their squares' sum; in float64."""
    total = torch.zeros(PROJECTIONS + 1, dtype=torch.float64)
    for position, value in enumerate(values):
        flat = value.reshape(-1).double()
        # a multiplicative hash of the entry's number; bits 24 to 31 of it are the eight signs
        mixed = (torch.arange(flat.numel()) + 7919 * position) * 2654435761 & 0xFFFFFFFF
        mixed = (mixed ^ mixed >> 15) * 2246822519 & 0xFFFFFFFF
        for i in range(PROJECTIONS):
            total[i] += (flat * (1 - 2 * (mixed >> (24 + i) & 1))).sum()
        total[-1] += flat.square().sum()
    total[-1] = total[-1].sqrt()
    return [float(f"{v:.7g}") for v in total.tolist()]


def compare_sketch(values: Iterable[Tensor], stored: list[float], source: str) -> None:
    """Check the starts that a file was written against.

    Raises:
        CheckpointMismatch: the starts built here are others.
    """
    if len(stored) != PROJECTIONS + 1:
        raise CheckpointMismatch(f"{source} is damaged: it holds {len(stored)} sums of the starts, not {PROJECTIONS + 1}")
    ours = sketch(values)
    size = max(abs(stored[-1]), 1e-30)
    off = max(abs(a - b) for a, b in zip(ours, stored, strict=True)) / size
    if not off <= TOLERANCE:
        raise CheckpointMismatch(
            f"{source} was written against other starts than can be built here (they differ by {off:.1%} of their norm): the base "
            "is another one, or torch draws other random numbers; expand it where it was written, or compress it again with "
            "reference='zero'"
        )
