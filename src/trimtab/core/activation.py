"""Which adapters act: activate, disabled, routed; and what an optimizer and a person get to see."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from trimtab.core.contracts import ActivationAdapter
from trimtab.core.errors import NoMatch, Unsupported, nearest
from trimtab.core.host import Host, adapted_chain, on_tensors
from trimtab.core.routing import routes_of
from trimtab.core.scope import Factor, Plan, changed, entered, present, within
from trimtab.core.state import ModelState, adapter_group, host, resolve_names, state_of, trainable_parameters, unwrap
from trimtab.core.table import Table

__all__ = ["activate", "disabled", "effective_weight", "named_parameters", "parameters", "routed", "scaled", "summary"]


def activate(model: nn.Module, *names: str) -> None:
    """Let exactly these adapters act, composed in this order; none of them for ``activate(model)``.

    O(places), whatever number of adapters is loaded; what is trainable does not change; nothing recompiles between
    adapters of one shape. Inside a block of ``disabled``, ``routed`` or ``scaled`` it holds until that block ends, and in it
    alone. Outside, not to be called while another thread runs the model: use ``routed`` to serve several at once.

    Raises:
        NoMatch: an unknown name.
        Unsupported: a name twice, or a merged adapter would be left out (its update stands in the weights).
    """
    state = state_of(model)
    _check_names(state, names)
    plan = present(state.owner)
    if plan is None:
        state.active = tuple(names)
        state.refresh()
    else:
        changed(state.owner, _naming(state, names))


def _check_names(state: ModelState, names: Sequence[str]) -> None:
    groups = [adapter_group(state, name) for name in names]
    if len(set(names)) != len(names):
        raise Unsupported(f"tt.activate got an adapter twice: {', '.join(names)}")
    left_out = [g.name for g in state.groups.values() if g.merged and g not in groups]
    if left_out:
        raise Unsupported(
            f"{left_out[0]!r} is merged into the base and cannot stop acting; tt.unmerge(model, {left_out[0]!r}) first"
        )


def _naming(state: ModelState, names: Sequence[str]) -> Plan:
    """The plan in which ``names`` act, under the factors that hold now."""
    beside = state.unmerged(names)
    acts = {path: host(module).acts_of(beside) for path, module in state.hosts.items()} if beside else {}
    return within(state.owner, names=tuple(names), acts=acts, routes=None)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The base alone inside the block, for the caller's context: other threads and tasks go on as they were.

    Raises:
        Unsupported: an adapter is merged.
    """
    state = state_of(model)
    _check_names(state, ())
    with entered(state.owner, _naming(state, ())):
        yield


@contextmanager
def routed(model: nn.Module, names: Sequence[str | Sequence[str] | None]) -> Iterator[None]:
    """One adapter a row of the batch inside the block: ``names[i]`` for row i, None for the base alone.

    Rows with adapters of one method and shape run as one batched operation whatever their number. The block holds for the caller's
    context: threads and tasks may each have their own on one model, and a block inside it ends with the outer one's rows.

    Args:
        names: one entry a row; an entry may be a list of adapters composed in order.

    Raises:
        NoMatch: an unknown name.
        Unsupported: an adapter that acts on something without rows (an expert bank), or a merged one.
    """
    state = state_of(model)
    rows = [() if entry is None else (entry,) if isinstance(entry, str) else tuple(entry) for entry in names]
    for name in {name for row in rows for name in row}:
        adapter_group(state, name)
    merged = [g.name for g in state.groups.values() if g.merged]
    if merged:
        raise Unsupported(f"{merged[0]!r} is merged into the base, so rows cannot choose; tt.unmerge it first")
    with entered(state.owner, within(state.owner, names=None, acts=None, routes=routes_of(state, rows))):
        yield


@contextmanager
def scaled(model: nn.Module, factors: Mapping[str, float | Tensor]) -> Iterator[None]:
    """Inside, adapted modules give ``y = base + f (adapted - base)``, f their factor; afterwards all is as it was, to the bit.

    Parameters and the adapters' own scales are not touched. The base's operation runs once more where f is not 1. Other factors
    recompile nothing.

    Args:
        factors: path of an adapted module -> f, a number or a tensor of one factor a row, shape ``(rows,)``; 1 elsewhere.

    Raises:
        NoMatch: nothing is attached at a path. Unsupported, in forward: rows cannot be told apart at a place.
    """
    hosts = {path: host(module) for path, module in state_of(model).hosts.items()}
    unknown = [path for path in factors if path not in hosts]
    if unknown:
        raise NoMatch(f"no adapter is attached at {unknown[0]!r}{nearest(unknown[0], hosts)}")
    found: dict[str, Factor] = {}
    for path, each in hosts.items():
        factor = factors.get(path, 1.0)
        device = next((p.device for p in each.parameters()), torch.device("cpu"))
        value = torch.as_tensor(factor, device=device, dtype=torch.float32)
        found[path] = Factor(value, isinstance(factor, Tensor) or factor != 1)
    owner = state_of(model).owner
    with entered(owner, within(owner, factors=found)):
        yield


def named_parameters(model: nn.Module, name: str | None = None) -> Iterator[tuple[str, nn.Parameter]]:
    """``(path.slot.name, parameter)`` of the trainable parameters of one adapter, or of all."""
    for group in resolve_names(state_of(model), name):
        for adapter in group.adapters:
            for key, parameter in adapter.named_parameters():
                if parameter.requires_grad:
                    yield f"{adapter.site.path}.{adapter.site.slot}.{key}", parameter


def parameters(model: nn.Module, name: str | None = None) -> list[nn.Parameter]:
    """What an optimizer gets: the trainable parameters of the adapter ``name`` (None: of all adapters), each once."""
    found: dict[int, nn.Parameter] = {}
    for group in resolve_names(state_of(model), name):
        found.update((id(p), p) for p in trainable_parameters(group))
    return list(found.values())


def effective_weight(model: nn.Module, path: str, name: str | Sequence[str] | None = None, *, tensor: str | None = None) -> Tensor:
    """The adapted weight at ``path``, dense, ``(out, in)`` (a bank: ``(experts, out, in)``), detached.

    Args:
        path: dotted path of the module.
        name: the adapter, or several composed in order; None for those that act.
        tensor: the parameter, if the module's adapters act on several, such as ``"bias"``; None for its matrix.

    Raises:
        NoMatch: no such adapter, or none acts at ``path``.
        Unsupported: one of them acts on activations there and has no weight form.
    """
    state = state_of(model)
    if name is None and state.acting() is None:
        raise Unsupported("inside tt.routed every row has its own adapters; say whose: tt.effective_weight(..., name=)")
    names = state.acting() if name is None else (name,) if isinstance(name, str) else tuple(name)
    for each in names:
        adapter_group(state, each)
    if path not in state.hosts:
        raise NoMatch(f"no adapter is attached at {path!r}{nearest(path, state.hosts)}")
    here = host(state.hosts[path])
    _refuse_weightless(here, [n for n in names if not state.groups[n].merged], path)
    acting = {n: [e for a in here.adapters(n) for e in on_tensors(a)] for n in state.groups}
    sites = {each.site.tensor for found in acting.values() for each in found}
    if tensor is None:
        tensor = "weight" if "weight" in sites or len(sites) != 1 else next(iter(sites))
    chains: dict[tuple, list] = {}
    for each in names:
        if state.groups[each].merged:
            continue  # its update already stands in the base weight
        for adapter in acting[each]:
            if adapter.site.tensor == tensor:
                chains.setdefault((adapter.site.part, getattr(adapter, "outer", False)), []).append(adapter)
    some = next((each for found in acting.values() for each in found if each.site.tensor == tensor), None)
    if some is None:
        raise NoMatch(f"no adapter acts on the parameter {tensor!r} of {path!r}{nearest(tensor, sites)}")
    with torch.no_grad():
        return adapted_chain(some.site, list(chains.values())).detach()


def _refuse_weightless(here: Host, names: Sequence[str], path: str) -> None:
    for name in names:
        for adapter in here.adapters(name):
            if isinstance(adapter, ActivationAdapter) and not on_tensors(adapter):
                raise Unsupported(
                    f"{type(adapter.config).__name__} ({name!r}) acts on the activations of {path}, which no weight does; compare "
                    "outputs instead"
                )


def summary(model: nn.Module) -> Table:
    """One row an adapter: places, trainable and total parameters, bytes, whether it acts, learns, is merged."""
    state = state_of(model)
    root = unwrap(model)
    adapters_total = {id(p) for g in state.groups.values() for a in g.adapters for p in a.parameters()}
    base = sum(p.numel() for p in root.parameters() if id(p) not in adapters_total)
    table = Table(
        ("name", "methods", "places", "trainable", "parameters", "share %", "bytes", "active", "merged"),
        title=f"{type(root).__name__}: {base:,} base parameters",
    )
    for group in state.groups.values():
        values = {id(p): p for a in group.adapters for p in a.parameters()}.values()
        count = sum(p.numel() for p in values)
        table.add(
            group.name,
            ", ".join(sorted({type(a.config).__name__ for a in group.adapters})),
            len(group.adapters),
            sum(p.numel() for p in values if p.requires_grad),
            count,
            100 * count / max(base, 1),
            sum(p.numel() * p.element_size() for p in values),
            group.name in state.active,
            group.merged,
        )
    return table
