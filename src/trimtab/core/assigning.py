"""Which config acts at which site: targets, what is excluded, overrides, and what the defaults pass by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core import anatomy as anatomy_module
from trimtab.core.anatomy import Anatomy
from trimtab.core.calibrate import site_activations, site_gradients
from trimtab.core.contracts import ActivationAdapter, Adapter, MethodConfig, Selection, TokenAdapter
from trimtab.core.errors import NoMatch, ShapeMismatch, TooSmall, TrimtabError, Unsupported, raise_all
from trimtab.core.excluding import Exclusion
from trimtab.core.kinds import site_for
from trimtab.core.layers import Layers
from trimtab.core.places import sites_of
from trimtab.core.selection import GROUPS, Place, Targets, clauses_of, select
from trimtab.core.site import Cohort, Site
from trimtab.core.stacks import token_places, vocabulary
from trimtab.core.state import host, parameter_users
from trimtab.core.trial import table_width

__all__ = ["Assignment", "Loss", "Plan", "calibrate", "check", "missing", "plan", "plan_sites", "prepare"]

Assignment = tuple[MethodConfig, Site]
Loss = Callable[[nn.Module], Tensor | Iterable[Tensor]]


@dataclass
class Plan:
    """What an attach would do.

    Attributes:
        assignments: config and site, in model order.
        notes: what the defaults passed by, a sentence a place.
        free: whether no hyperparameter was given either, so that any place that does not fit is passed by.
    """

    assignments: list[Assignment]
    notes: list[str] = field(default_factory=list)
    free: bool = False

    def leave_out(self, config: MethodConfig, site: Site, why: object) -> None:
        """Take a site out, with a line that says so."""
        self.assignments.remove((config, site))
        if site in site.cohort.sites:
            site.cohort.sites.remove(site)
        self.notes.append(f"left out: {site.name}: {why}")


def plan(
    root: nn.Module,
    method: MethodConfig,
    *,
    targets: Targets = None,
    layers: Layers = None,
    exclude: str | Iterable[str] | None = None,
    overrides: Mapping[str, MethodConfig] | None = None,
) -> Plan:
    """Which config goes to which site, in model order.

    Raises:
        NoMatch: a clause of ``targets``, ``exclude`` or ``overrides`` matches nothing, or nothing is left.
    """
    anatomy = anatomy_module.of(root)
    out = Exclusion(exclude, lambda clause: _select(root, method, clause, None, anatomy, excluding=True))
    notes: list[str] = []
    places = _select(root, method, targets, layers, anatomy, out=out, notes=notes)
    problems: list[TrimtabError] = []
    configs, places = _overridden(root, method, places, overrides or {}, targets, anatomy, problems)
    found: dict[tuple[str, str], Assignment] = {}
    for config, place in zip(configs, places, strict=True):
        cls = type(config).adapter_class
        try:
            for site in sites_of(place, cls, width=_width(anatomy, place)):
                site.layer, site.clause = cls.layer(config), place.clause
                site.head_size = anatomy.facts[site.block]["head_size"] if site.block is not None else None
                site.vocabulary = vocabulary(anatomy, site) if site.role in ("stack", "block") else None
                if not out.takes(site):
                    # a container and what is below it may both match (a head and its layers): a tensor is one site
                    found.setdefault((site.path, site.slot), (cls.fit(config, site), site))
        except Unsupported as error:
            if place.clause is None:
                notes.append(f"left out: {error}")
            else:
                problems.append(error)
        except TrimtabError as error:
            problems.append(error)
    if targets is None:
        notes += _absent(root, method, anatomy)
    problems += out.unused(len(found))
    raise_all(problems)
    _follow_ties(root, anatomy, found)
    assignments = list(found.values())
    if not assignments:
        raise NoMatch(_nothing(method, places, notes, out))
    for config, site in assignments:
        _read_alike(config, site)
    assignments = _without_ties(root, assignments, notes)
    return Plan(assignments, notes, free=all(getattr(method, f.name) == f.default for f in fields(method)))


def default_places(method: MethodConfig, anatomy: Anatomy) -> str:
    """Where ``method`` acts if no targets are named.

    A method of linear layers acts on convolutions too where the blocks are made of these, or where there is nothing else.
    """
    cls = type(method).adapter_class
    default = cls.places(method, anatomy)
    if default != "linear" or not cls.kinds & {"conv", "grouped"} or anatomy.banks:
        return default
    linear = [path for path, role in anatomy.roles.items() if GROUPS["linear"](role)]
    convs = [path for path, role in anatomy.roles.items() if role == "conv"]
    if not linear:
        return "conv" if convs else default
    inside = [[path for path in paths if anatomy.block_of(path) is not None] for paths in (linear, convs)]
    return "linear | conv" if inside[1] and not inside[0] else default


def _absent(root: nn.Module, method: MethodConfig, anatomy: Anatomy) -> list[str]:
    """A sentence for each clause of the method's default that matches nothing in this model."""
    default = default_places(method, anatomy)
    found = []
    for clause in clauses_of(default, "") if "|" in default else ():
        try:
            _select(root, method, clause, None, anatomy, excluding=True)
        except NoMatch:
            found.append(f"the default {default!r} finds no {clause!r} here")
        except Unsupported:  # rows that no trial told: the search for the places has noted it
            continue
    return found


def plan_sites(root: nn.Module, method: MethodConfig) -> list[Assignment]:
    """Which config goes to which site by the method's own default; see ``plan``."""
    return plan(root, method).assignments


def _overridden(
    root: nn.Module,
    method: MethodConfig,
    places: list[Place],
    overrides: Mapping[str, MethodConfig],
    targets: Targets,
    anatomy: Anatomy,
    problems: list[TrimtabError],
) -> tuple[list[MethodConfig], list[Place]]:
    """A config a place; places with an override carry its clause, for it names them."""
    configs: list[MethodConfig] = [method] * len(places)
    places = list(places)
    where = {place.key: index for index, place in enumerate(places)}
    for clause, config in overrides.items():
        try:
            chosen = _select(root, config, clause, None, anatomy)  # the targets are within the layers already
        except TrimtabError as error:
            problems.append(error)
            continue
        hits = [where[place.key] for place in chosen if place.key in where]
        if not hits:
            problems.append(
                NoMatch(
                    f"the override {clause!r} matches {len(chosen)} places, none of which is targeted by "
                    f"{targets or default_places(method, anatomy)!r}; add it to targets, or attach it on its own"
                )
            )
        for index in hits:
            configs[index], places[index] = config, replace(places[index], clause=clause)
    return configs, places


def _nothing(method: MethodConfig, places: list[Place], notes: list[str], out: Exclusion) -> str:
    """Why nothing would learn."""
    kind = type(method).__name__
    if out.clauses:
        return f"exclude={out.clauses!r} takes away all places that {kind} was to act on; nothing would learn"
    if notes:
        return f"{kind} fits none of its {len(places)} default places: {notes[0].removeprefix('left out: ')}"
    named = ", ".join(place.path for place in places[:3])
    return f"{kind} has nothing to act on at {named}{', ...' if len(places) > 3 else ''}: no parameter there is its to change"


def _read_alike(config: MethodConfig, site: Site) -> None:
    """A method that needs other adapters reads at a place what they read there."""
    here = site.module._modules.get("trimtab")
    for name in type(config).adapter_class.needs(config) if here is not None else ():
        for other in here.adapters(name):
            if other.site.source is not None:
                site.source, site.source_path = other.site.source, other.site.source_path
                site.shape = (site.shape[0], other.site.shape[1])


def _select(
    root: nn.Module,
    method: MethodConfig,
    targets: Targets,
    layers: Layers,
    anatomy: Any,
    *,
    out: Exclusion | None = None,
    excluding: bool = False,
    notes: list[str] | None = None,
) -> list[Place]:
    """The places of a method; ``excluding``: of a clause that takes places away, for which no place needs to fit it."""
    cls = type(method).adapter_class
    leaves: Callable[[nn.Module], bool] | None = None
    containers = False
    wanted = ""
    if cls.kinds == frozenset({"module"}) or (issubclass(cls, Selection) and cls.tensors is None):
        leaves, containers = (lambda module: True), True
    elif cls.tensors is not None:
        names = cls.tensors
        leaves = lambda module: any(module._parameters.get(tensor) is not None for tensor in names)  # noqa: E731
        wanted = f"a parameter called {' or '.join(names)}"
    default = default_places(method, anatomy)
    reads = cls.reads(method) if issubclass(cls, ActivationAdapter) else None
    if excluding and reads == "residual":
        reads = "input"
    found = select(
        root, targets, layers=layers, anatomy=anatomy, default=default, leaves=leaves, containers=containers, reads=reads,
        wanted=wanted, notes=notes,
    )  # fmt: skip
    if excluding:
        return found
    found = found if out is None else out.left(found)
    if out is not None and not found:
        return []
    return token_places(type(method).__name__, cls.entry(method), found, anatomy) if issubclass(cls, TokenAdapter) else found


def _width(anatomy: Any, place: Place) -> int | None:
    """Width of the place's block, or of the first; of a body's embeddings."""
    if place.role == "stack" and (width := table_width(place.module)) is not None:
        return width
    return anatomy.facts[place.block or 0]["width"] if anatomy.blocks else None


def _follow_ties(root: nn.Module, anatomy: Anatomy, found: dict[tuple[str, str], Assignment]) -> None:
    """Add the other ends of tied tensors, for methods that change a tie as one."""
    tied = [entry for entry in found.values() if type(entry[0]).adapter_class.whole_ties and entry[1].tensor]
    users = parameter_users(root) if tied else {}
    for config, site in tied:
        for name in users[id(site.parameter())]:
            path, _, tensor = name.rpartition(".")
            place = Place(path, anatomy.modules[path], role=anatomy.roles.get(path), block=anatomy.block_of(path))
            other = site_for(place, tensor)
            other.layer, other.clause = site.layer, site.clause
            found.setdefault((other.path, other.slot), (config, other))


def _without_ties(root: nn.Module, assignments: list[Assignment], notes: list[str]) -> list[Assignment]:
    """A tied tensor is one site: no two adapters of one attach on it, and no selection that would cut the tie.

    A selection replaces what its own module reads; the other users of a tied tensor would keep the old values. Places that the
    method's default found are left out, with a note; others are refused.
    """
    problems: list[TrimtabError] = []
    users = parameter_users(root)
    seen: dict[int, Site] = {}
    kept: list[Assignment] = []
    for config, site in assignments:
        others: list[str] = []
        if site.kind != "module" and site.rows is None and not type(config).adapter_class.whole_ties:
            others = [n for n in users[id(site.parameter())] if n != ".".join(filter(None, (site.path, site.tensor)))]
        alone = issubclass(type(config).adapter_class, Selection)
        if not others or not (alone or seen.setdefault(id(site.parameter()), site) is not site):
            kept.append((config, site))
        elif site.clause is None and (len(assignments) > 1 or not alone):
            notes.append(f"left out: {site.path}.{site.tensor}, which is one tied tensor with {others[0]}")
        else:
            problems.append(
                Unsupported(
                    f"{site.path}.{site.tensor} and {others[0]} are one tied tensor, and {type(config).__name__} would change one "
                    "of them alone; attach a low-rank method to one of the two, or untie the model before attaching"
                )
            )
    if not kept and not problems:
        problems = [Unsupported(f"{type(assignments[0][0]).__name__} finds tied tensors alone: {notes[-1]}; untie the model first")]
    raise_all(problems)
    return kept


def prepare(assignments: list[Assignment], dtype: torch.dtype | None) -> None:
    """Give sites their adapter dtype and cohort."""
    cohorts: dict[MethodConfig, Cohort] = {}
    for config, site in assignments:
        site.adapter_dtype = dtype or (torch.float64 if site.dtype == torch.float64 else torch.float32)
        site.cohort = cohorts.setdefault(config, Cohort())
        site.cohort.sites.append(site)


def check(root: nn.Module, found: Plan, name: str) -> None:
    """Collect everything that does not fit, then raise once; places of the default that are too small are passed by."""
    problems: list[TrimtabError] = []
    small: list[TrimtabError] = []
    if not isinstance(name, str) or not name:
        problems.append(Unsupported(f"an adapter's name is a non-empty text, found {name!r}"))
    state = root.__dict__.get("_trimtab_state")
    taken = {(a.site.path, a.site.slot) for a in state.groups[name].adapters} if state and name in state.groups else set()
    if state and name in state.groups and state.groups[name].merged:
        problems.append(Unsupported(f"the adapter {name!r} is merged; tt.unmerge it before extending it"))
    for config, site in list(found.assignments):
        if (site.path, site.slot) in taken:
            problems.append(
                Unsupported(f"the adapter {name!r} already acts on {site.name}; choose another name, or tt.detach it first")
            )
            continue
        if not _finite(site):
            problems.append(
                ShapeMismatch(
                    f"the base weight {site.name} holds NaN or infinite values; repair or reload the base before attaching"
                )
            )
            continue
        lacking = missing(type(config).adapter_class, config, site)
        problems += lacking
        try:
            if not lacking:
                type(config).adapter_class.check(config, site)
        except TrimtabError as error:
            if site.clause is None and (found.free or isinstance(error, TooSmall)):
                small.append(error)
                found.leave_out(config, site, error)
            else:
                problems.append(error)
    if not found.assignments and not problems:
        problems = small[:3]
    raise_all(problems)


def missing(cls: type[Adapter], config: MethodConfig, site: Site) -> list[TrimtabError]:
    """The adapters that ``config`` needs at ``site`` and that are not there."""
    module = site.module
    return [
        NoMatch(
            f"{type(config).__name__} at {site.path} needs the adapter {name!r} there; attach or load it first, at the same "
            "places, or name other targets"
        )
        for name in cls.needs(config)
        if "trimtab" not in module._modules or not host(module).adapters(name)
    ]


def _finite(site: Site) -> bool:
    """Whether the base tensor is finite; one reduction, no temporary of its size."""
    if site.kind == "module" or site.is_meta or not site.parameter().is_floating_point():
        return True
    stored = site.parameter()
    if type(stored) is not nn.Parameter:
        return True
    return bool(torch.isfinite(stored.detach().sum(dtype=torch.float64 if stored.device.type == "cpu" else torch.float32)))


def calibrate(root: nn.Module, found: Plan, loss: Loss | None) -> None:
    """Measure gradients and activations for the sites whose method starts from them.

    A place of the default that the sample data does not reach is passed by.
    """
    asked: dict[str, list[Assignment]] = {}
    for config, site in found.assignments:
        want = type(config).adapter_class.wants(config)
        if want and not site.is_meta:
            asked.setdefault(want, []).append((config, site))
    if asked and loss is None:
        (config, _), *_ = next(iter(asked.values()))
        raise Unsupported(
            f"{type(config).__name__} starts from the {next(iter(asked))}s of sample data; pass loss=lambda model: ..., "
            "a function that runs the model on sample data and returns its scalar loss"
        )
    unreached: list[Site] = []
    if "gradient" in asked:
        powers = [type(config).adapter_class.gradient_power for config, _ in asked["gradient"]]
        unreached += site_gradients(root, [site for _, site in asked["gradient"]], loss, powers)
    if "activation" in asked:
        unreached += site_activations(root, [site for _, site in asked["activation"]], loss)
    for config, site in [(config, site) for config, site in found.assignments if any(site is one for one in unreached)]:
        found.leave_out(config, site, "the loss of the sample data does not depend on it")
