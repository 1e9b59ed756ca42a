"""attach and its dry run; detach comes from ``trimtab.core.removal``."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from trimtab.core import registry
from trimtab.core.assigning import Assignment, Loss, Plan, calibrate, check, missing, plan, plan_sites, prepare
from trimtab.core.bank import build_adapter
from trimtab.core.contracts import Adapter, MethodConfig, TokenAdapter
from trimtab.core.errors import NoMatch, TrimtabError, Unsupported, raise_all
from trimtab.core.guard import watch
from trimtab.core.layers import Layers
from trimtab.core.mounting import feed, mount
from trimtab.core.removal import detach, remove_adapters, remove_group
from trimtab.core.selection import Targets
from trimtab.core.serving import serve_tokens
from trimtab.core.site import Site
from trimtab.core.state import ATTRIBUTE, Group, ModelState, state_of, unwrap
from trimtab.core.table import Table

__all__ = ["Assignment", "attach", "detach", "mount_group", "plan_sites", "remove_adapters", "remove_group"]

def attach(
    model: nn.Module,
    method: MethodConfig,
    *,
    targets: Targets = None,
    layers: Layers = None,
    exclude: str | Iterable[str] | None = None,
    overrides: Mapping[str, MethodConfig] | None = None,
    head: bool | str | Iterable[str] | None = None,
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
            method's own default, of which a place that is too small for the method, or of a kind that it does not act on, is
            left out with a line in the table. Every clause must match.
        layers: block indices to stay within, counted in the one tower of blocks that the targets stand in; or tower -> indices,
            as ``{"decoder": [0, 1]}``, for a model with several (encoder and decoder, vision tower and language model).
        exclude: clauses, as in ``targets``, whose places are left out, a module with all that is below it; each must take away
            something.
        overrides: clause -> config for some of the targeted places; every clause must match among them.
        head: whether the model's task head learns too, as whole values that are saved with the adapter: True, False, or clauses
            that name it. None: it does not, and where it is not known to be trained already this is said. In transformers
            the head is what stands outside of the base model; a language model's output embedding is none.
        name: any text.
        trainable: whether its parameters learn; nothing but this argument ever decides it.
        dtype: dtype that stores the adapter; None means float32 (float64 on a float64 base).
        rng: source of the random start; None draws a seed from torch's default generator.
        loss: ``model -> scalar`` on sample data, or a generator of scalars, one a batch; for methods that start from
            gradients (LoRAGA, GPS, SPT) or activations.
        check_gradients: confirm at the first optimizer step that exactly the declared parameters got gradients, but for those
            that no output of the model depends on: these are told in a warning.
        dry_run: change nothing, return the table of what would happen.

    Returns:
        A table with a row a place: path, role, kind, shape, method, parameters, bytes; its ``notes`` say what was left out.

    Raises:
        NoMatch, ShapeMismatch, Unsupported: all problems together; the model is then unchanged.
    """
    if not isinstance(method, MethodConfig):
        raise Unsupported(f"tt.attach takes a method such as tt.LoRA(rank=8), found {method!r}")
    root = unwrap(model)
    found = plan(root, method, targets=targets, layers=layers, exclude=exclude, overrides=overrides)
    warning = _with_head(root, found, head, trainable=trainable)
    prepare(found.assignments, dtype)
    check(root, found, name)
    if dry_run:
        shapes = [(site, config, build_adapter(config, site.shapes_only(), _generator(None))) for config, site in found.assignments]
        return _table(name, shapes, found)
    calibrate(root, found, loss)
    generator = _generator(rng)
    seed = _fresh_seed(generator)
    adapters = [build_adapter(config, site, generator) for config, site in found.assignments]
    for order, adapter in enumerate(adapters):
        adapter.origin = None if seed is None else (seed, order)
    mount_group(root, name, adapters, trainable=trainable, check_gradients=check_gradients)
    state = state_of(root)
    if name not in state.active:
        state.active = (*state.active, name)
    state.refresh()
    if warning:
        warnings.warn(warning, stacklevel=2)
    return _table(name, [(adapter.site, adapter.config, adapter) for adapter in adapters], found)


def _with_head(root: nn.Module, found: Plan, head: bool | str | Iterable[str] | None, *, trainable: bool) -> str | None:
    """Add the head's own values to the plan, as ``head`` says; the warning that it does not learn, if it should."""
    from trimtab.compat.heads import head_of

    if head is False or (head is None and not trainable):
        return None
    targets: str | Iterable[str] = head if not isinstance(head, bool) and head is not None else []
    if head is None or head is True:
        there = head_of(root)
        if there is None:
            if head:
                raise NoMatch(
                    f"head=True lets the task head learn, and no head of this {type(root).__name__} is known; name it, as in "
                    "head='classifier'"
                )
            return None
        state: ModelState | None = root.__dict__.get(ATTRIBUTE)
        learning = [site.path for _, site in found.assignments]
        learning += [a.site.path for g in (state.groups.values() if state else ()) if g.trainable for a in g.adapters]
        targets = [path for path in there.paths if not any(f"{own}.".startswith(f"{path}.") for own in learning)]
        if not targets:
            return None
        if head is None:
            found.notes.append(there.left_alone(targets))
            return found.notes[-1] if there.alarming else None
    taken = {(site.path, site.slot) for _, site in found.assignments}
    more = plan(root, registry.get("Unfreeze")(), targets=targets).assignments
    found.assignments += [(config, site) for config, site in more if (site.path, site.slot) not in taken]
    return None


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
    raise_all([problem for adapter in adapters for problem in missing(type(adapter), adapter.config, adapter.site)])
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
    try:
        serve_tokens(root, state, name, [adapter for adapter in adapters if isinstance(adapter, TokenAdapter)])
    except TrimtabError:  # the model does not take them: leave it as it was
        if len(group.adapters) == len(adapters):
            remove_group(root, name)
        else:
            remove_adapters(root, name, adapters)
        raise
    if trainable and check_gradients:
        group.checked = False
        watch(root)
    return group


def _freeze(root: nn.Module) -> list[tuple[nn.Module, str]]:
    """Freeze the base; returns what learnt before."""
    thawed = []
    for module in root.modules():
        for tensor, value in module._parameters.items():
            if value is not None and value.requires_grad:
                value.requires_grad_(False)
                thawed.append((module, tensor))
    return thawed


def _table(name: str, rows: list[tuple[Site, MethodConfig, Adapter]], found: Plan) -> Table:
    table = Table(
        ("path", "role", "kind", "shape", "method", "parameters", "bytes"),
        title=f"adapter {name!r}",
        sums=("parameters", "bytes"),
    )
    table.notes = found.notes
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
