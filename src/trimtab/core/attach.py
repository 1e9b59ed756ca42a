"""attach and its dry run; detach comes from ``trimtab.core.removal``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core import anatomy as anatomy_module
from trimtab.core.bank import build_adapter
from trimtab.core.calibrate import site_activations, site_gradients
from trimtab.core.contracts import ActivationAdapter, Adapter, MethodConfig, Selection, TokenAdapter
from trimtab.core.errors import NoMatch, ShapeMismatch, TrimtabError, Unsupported, raise_all
from trimtab.core.guard import watch
from trimtab.core.kinds import site_for
from trimtab.core.mounting import feed, mount, serve
from trimtab.core.places import sites_of
from trimtab.core.removal import detach, remove_adapters, remove_group
from trimtab.core.selection import Place, select
from trimtab.core.site import Cohort, Site
from trimtab.core.stacks import companions, token_places, vocabulary
from trimtab.core.state import Group, ModelState, host, parameter_users, state_of, unwrap
from trimtab.core.table import Table

__all__ = ["Assignment", "attach", "detach", "mount_group", "plan_sites", "remove_adapters", "remove_group"]

Targets = str | Sequence[str] | Callable[[str, nn.Module], bool] | None
Assignment = tuple[MethodConfig, Site]
Loss = Callable[[nn.Module], Tensor | Iterable[Tensor]]


def attach(
    model: nn.Module,
    method: MethodConfig,
    *,
    targets: Targets = None,
    layers: Sequence[int] | None = None,
    overrides: Mapping[str, MethodConfig] | None = None,
    name: str = "default",
    trainable: bool = True,
    dtype: torch.dtype | None = None,
    rng: torch.Generator | None = None,
    loss: Loss | None = None,
    check_gradients: bool = True,
    dry_run: bool = False,
) -> Table:
    """Attach ``method`` to ``model`` in place, and freeze everything else.

    Attaching again under the same name extends that adapter by further places (a head beside LoRA, say).

    Args:
        model: any module.
        method: a config such as ``tt.LoRA(rank=8)``.
        targets: where to act: a role expression, regex, name, suffix, list of those, callable, or None for the
            method's own default. Every clause must match.
        layers: block indices to stay within.
        overrides: clause -> config for some of the targeted places; every clause must match among them.
        name: any text.
        trainable: whether its parameters learn; nothing but this argument ever decides it.
        dtype: dtype that stores the adapter; None means float32 (float64 on a float64 base).
        rng: source of the random start; None draws a seed from torch's default generator.
        loss: ``model -> scalar`` on sample data, or a generator of scalars, one a batch; for methods that start from
            gradients (LoRAGA, GPS, SPT) or activations.
        check_gradients: confirm at the first optimizer step that exactly the declared parameters got gradients.
        dry_run: change nothing, return the table of what would happen.

    Returns:
        A table with a row a place: path, role, kind, shape, method, parameters, bytes.

    Raises:
        NoMatch, ShapeMismatch, Unsupported: all problems together; the model is then unchanged.
    """
    if not isinstance(method, MethodConfig):
        raise Unsupported(f"tt.attach takes a method such as tt.LoRA(rank=8), found {method!r}")
    root = unwrap(model)
    assignments = plan_sites(root, method, targets=targets, layers=layers, overrides=overrides)
    _prepare(assignments, dtype)
    _check(root, assignments, name)
    if dry_run:
        return _table(
            name,
            [(site, config, build_adapter(config, site.shapes_only(), _generator(None))) for config, site in assignments],
        )
    _calibrate(root, assignments, loss)
    generator = _generator(rng)
    seed = _fresh_seed(generator)
    adapters = [build_adapter(config, site, generator) for config, site in assignments]
    for order, adapter in enumerate(adapters):
        adapter.origin = None if seed is None else (seed, order)
    mount_group(root, name, adapters, trainable=trainable, check_gradients=check_gradients)
    state = state_of(root)
    if name not in state.active:
        state.active = (*state.active, name)
    state.refresh()
    return _table(name, [(adapter.site, adapter.config, adapter) for adapter in adapters])


def plan_sites(
    root: nn.Module,
    method: MethodConfig,
    *,
    targets: Targets = None,
    layers: Sequence[int] | None = None,
    overrides: Mapping[str, MethodConfig] | None = None,
) -> list[Assignment]:
    """Which config goes to which site, in model order.

    Raises:
        NoMatch: a clause of ``targets`` or ``overrides`` matches nothing.
    """
    anatomy = anatomy_module.of(root)
    places = _select(root, method, targets, layers, anatomy)
    configs = [method] * len(places)
    problems: list[TrimtabError] = []
    where = {(place.path, place.tensor, place.part): index for index, place in enumerate(places)}
    for clause, config in (overrides or {}).items():
        try:
            chosen = _select(root, config, clause, layers, anatomy)
        except TrimtabError as error:
            problems.append(error)
            continue
        hits = [where[key] for place in chosen if (key := (place.path, place.tensor, place.part)) in where]
        if not hits:
            problems.append(
                NoMatch(
                    f"the override {clause!r} matches {len(chosen)} places, none of which is targeted by "
                    f"{targets or type(method).adapter_class.places(method, anatomy)!r}; add it to targets, or attach it on its own"
                )
            )
        for index in hits:
            configs[index] = config
    found: dict[tuple[str, str], Assignment] = {}
    for config, place in zip(configs, places, strict=True):
        try:
            for site in sites_of(place, type(config).adapter_class, width=_width(anatomy, place)):
                site.layer = type(config).adapter_class.layer(config)
                # a container and what is below it may both match (a head and its layers): a tensor is one site
                found.setdefault((site.path, site.slot), (config, site))
        except TrimtabError as error:
            problems.append(error)
    raise_all(problems)
    _follow_ties(root, anatomy, found)
    assignments = list(found.values())
    for _, site in assignments:
        site.head_size = anatomy.facts[site.block]["head_size"] if site.block is not None else None
        site.vocabulary = vocabulary(anatomy, site) if site.role in ("stack", "block") else None
    for config, site in assignments:
        _read_alike(config, site)
    _refuse_ties(root, assignments)
    return assignments


def _read_alike(config: MethodConfig, site: Site) -> None:
    """A method that needs other adapters reads at a place what they read there."""
    here = site.module._modules.get("trimtab")
    for name in type(config).adapter_class.needs(config) if here is not None else ():
        for other in here.adapters(name):
            if other.site.source is not None:
                site.source, site.source_path = other.site.source, other.site.source_path
                site.shape = (site.shape[0], other.site.shape[1])


def _select(root: nn.Module, method: MethodConfig, targets: Targets, layers: Sequence[int] | None, anatomy: Any) -> list[Place]:
    cls = type(method).adapter_class
    leaves: Callable[[nn.Module], bool] | None = None
    containers = False
    if cls.kinds == frozenset({"module"}) or (issubclass(cls, Selection) and cls.tensors is None):
        leaves, containers = (lambda module: True), True
    elif cls.tensors is not None:
        names = cls.tensors
        leaves = lambda module: any(module._parameters.get(tensor) is not None for tensor in names)  # noqa: E731
    default = cls.places(method, anatomy)
    reads = cls.reads(method) if issubclass(cls, ActivationAdapter) else None
    found = select(
        root, targets, layers=layers, anatomy=anatomy, default=default, leaves=leaves, containers=containers, reads=reads
    )
    return token_places(type(method).__name__, cls.entry(method), found, anatomy) if issubclass(cls, TokenAdapter) else found


def _width(anatomy: Any, place: Place) -> int | None:
    """Width of the place's block, or of the first."""
    return anatomy.facts[place.block or 0]["width"] if anatomy.blocks else None


def _follow_ties(root: nn.Module, anatomy: Any, found: dict[tuple[str, str], Assignment]) -> None:
    """Add the other ends of tied tensors, for methods that change a tie as one."""
    tied = [entry for entry in found.values() if type(entry[0]).adapter_class.whole_ties and entry[1].tensor]
    users = parameter_users(root) if tied else {}
    for config, site in tied:
        for name in users[id(site.parameter())]:
            path, _, tensor = name.rpartition(".")
            place = Place(path, anatomy.modules[path], role=anatomy.roles.get(path), block=anatomy.block_of(path))
            other = site_for(place, tensor)
            other.layer = site.layer
            found.setdefault((other.path, other.slot), (config, other))


def _refuse_ties(root: nn.Module, assignments: list[Assignment]) -> None:
    """A tied tensor is one site: no two adapters of one attach on it, and no selection that would cut the tie.

    A selection replaces what its own module reads; the other users of a tied tensor would keep the old values.
    """
    problems: list[TrimtabError] = []
    users = parameter_users(root)
    seen: dict[int, Site] = {}
    for config, site in assignments:
        if site.kind == "module" or site.rows is not None or type(config).adapter_class.whole_ties:
            continue
        others = [n for n in users[id(site.parameter())] if n != ".".join(filter(None, (site.path, site.tensor)))]
        if others and (
            seen.setdefault(id(site.parameter()), site) is not site or issubclass(type(config).adapter_class, Selection)
        ):
            problems.append(
                Unsupported(
                    f"{site.path}.{site.tensor} and {others[0]} are one tied tensor, and {type(config).__name__} would change one "
                    "of them alone; attach a low-rank method to one of the two, or untie the model before attaching"
                )
            )
    raise_all(problems)


def _prepare(assignments: list[Assignment], dtype: torch.dtype | None) -> None:
    """Give sites their adapter dtype and cohort."""
    cohorts: dict[MethodConfig, Cohort] = {}
    for config, site in assignments:
        site.adapter_dtype = dtype or (torch.float64 if site.dtype == torch.float64 else torch.float32)
        site.cohort = cohorts.setdefault(config, Cohort())
        site.cohort.sites.append(site)


def _check(root: nn.Module, assignments: list[Assignment], name: str) -> None:
    """Collect everything that does not fit, then raise once."""
    problems: list[TrimtabError] = []
    if not isinstance(name, str) or not name:
        problems.append(Unsupported(f"an adapter's name is a non-empty text, found {name!r}"))
    state = root.__dict__.get("_trimtab_state")
    taken = {(a.site.path, a.site.slot) for a in state.groups[name].adapters} if state and name in state.groups else set()
    if state and name in state.groups and state.groups[name].merged:
        problems.append(Unsupported(f"the adapter {name!r} is merged; tt.unmerge it before extending it"))
    for config, site in assignments:
        if (site.path, site.slot) in taken:
            problems.append(
                Unsupported(f"the adapter {name!r} already acts on {site.name}; choose another name, or tt.detach it first")
            )
            continue
        try:
            if site.kind == "module" or site.is_meta or not site.parameter().is_floating_point() or _finite(site):
                cls = type(config).adapter_class
                problems += _missing(cls, config, site)
                cls.check(config, site)
            else:
                problems.append(
                    ShapeMismatch(
                        f"the base weight {site.name} holds NaN or infinite values; repair or reload the base before attaching"
                    )
                )
        except TrimtabError as error:
            problems.append(error)
    raise_all(problems)


def _finite(site: Site) -> bool:
    """Whether the base tensor is finite; one reduction, no temporary of its size."""
    stored = site.parameter()
    if type(stored) is not nn.Parameter:
        return True
    return bool(torch.isfinite(stored.detach().sum(dtype=torch.float64 if stored.device.type == "cpu" else torch.float32)))


def _calibrate(root: nn.Module, assignments: list[Assignment], loss: Loss | None) -> None:
    """Measure gradients and activations for the sites whose method starts from them."""
    asked: dict[str, list[Assignment]] = {}
    for config, site in assignments:
        want = type(config).adapter_class.wants(config)
        if want and not site.is_meta:
            asked.setdefault(want, []).append((config, site))
    if asked and loss is None:
        (config, _), *_ = next(iter(asked.values()))
        raise Unsupported(
            f"{type(config).__name__} starts from the {next(iter(asked))}s of sample data; pass loss=lambda model: ..., "
            "a function that runs the model on sample data and returns its scalar loss"
        )
    if "gradient" in asked:
        powers = [type(config).adapter_class.gradient_power for config, _ in asked["gradient"]]
        site_gradients(root, [site for _, site in asked["gradient"]], loss, powers)
    if "activation" in asked:
        site_activations(root, [site for _, site in asked["activation"]], loss)


def _generator(rng: torch.Generator | None) -> torch.Generator:
    return rng if rng is not None else torch.Generator().manual_seed(int(torch.randint(2**62, ())))


def _fresh_seed(rng: torch.Generator) -> int | None:
    """The seed of a generator that nothing has been drawn from yet, from which a start can be made again; else None."""
    if rng.device.type != "cpu":
        return None
    seed = rng.initial_seed()
    return seed if torch.equal(rng.get_state(), torch.Generator().manual_seed(seed).get_state()) else None


def mount_group(root: nn.Module, name: str, adapters: list[Adapter], *, trainable: bool, check_gradients: bool = True) -> Group:
    """Put built adapters beneath their modules under ``name`` and freeze the base. Used by attach and load."""
    raise_all([problem for adapter in adapters for problem in _missing(type(adapter), adapter.config, adapter.site)])
    first = "_trimtab_state" not in root.__dict__
    state = state_of(root, create=True)
    if first:
        state.thawed = _freeze(root)
    group = state.groups.setdefault(name, Group(name, trainable=trainable, checked=not check_gradients))
    for adapter in adapters:
        adapter.site.gradient = adapter.site.activation = adapter.site.vocabulary = None
        adapter.train(adapter.site.module.training)
        adapter.requires_grad_(trainable)
        mount(adapter.site.module, name, adapter)
        state.hosts[adapter.site.path] = adapter.site.module
        if adapter.site.source is not None:
            feed(adapter.site.source, name, adapter)
            state.hosts[adapter.site.source_path] = adapter.site.source
        group.adapters.append(adapter)
    _serve(root, state, name, [adapter for adapter in adapters if isinstance(adapter, TokenAdapter)])
    if trainable and check_gradients:
        group.checked = False
        watch(root)
    return group


def _serve(root: nn.Module, state: ModelState, name: str, adapters: list[TokenAdapter]) -> None:
    """Let the modules that serve token adapters know of them."""
    from trimtab.compat.bodies import rotates

    anatomy = anatomy_module.of(root) if adapters else None
    for adapter in adapters:
        if adapter.duty == "prompt":
            host(adapter.site.module).rotates = rotates(adapter.site.module)
        before = adapter.site.module
        for path, duty in companions(adapter, anatomy):
            module = anatomy.modules[path]
            if duty == "carry":
                host(before).next, before = path, module
            there = serve(module, path, name, duty, adapter)
            state.hosts[path] = module
            if adapter.duty == "fresh":
                host(adapter.site.module).reaches = there.reachable


def _missing(cls: type[Adapter], config: MethodConfig, site: Site) -> list[TrimtabError]:
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


def _freeze(root: nn.Module) -> list[tuple[nn.Module, str]]:
    """Freeze the base; returns what learnt before."""
    thawed = []
    for module in root.modules():
        for tensor, value in module._parameters.items():
            if value is not None and value.requires_grad:
                value.requires_grad_(False)
                thawed.append((module, tensor))
    return thawed


def _table(name: str, rows: list[tuple[Site, MethodConfig, Adapter]]) -> Table:
    table = Table(
        ("path", "role", "kind", "shape", "method", "parameters", "bytes"),
        title=f"adapter {name!r}",
        sums=("parameters", "bytes"),
    )
    seen: set[int] = set()  # what places share counts at the first of them
    for site, config, adapter in rows:
        values = [value for value in adapter.parameters() if id(value) not in seen]
        seen.update(map(id, values))
        table.add(
            site.name,
            site.role or "",
            site.kind,
            "x".join(map(str, site.shape)),
            repr(config),
            sum(v.numel() for v in values),
            sum(v.numel() * v.element_size() for v in values),
        )
    return table
