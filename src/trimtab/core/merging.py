"""merge and unmerge: the update written into the base weights, and the base's very bytes put back."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab.core.contracts import Adapter
from trimtab.core.errors import NotMergeable, TrimtabError, raise_all
from trimtab.core.host import BiasOf, WeightOf, adapted_chain, on_tensors
from trimtab.core.scope import present
from trimtab.core.site import Site, dense, is_quantised
from trimtab.core.state import Group, ModelState, adapter_group, dependants, parameter_users, state_of, unwrap
from trimtab.core.table import Table

__all__ = ["INTO", "Target", "accumulate", "check_target", "merge", "report_table", "unmerge"]

PROBE_ROWS = 16
INTO = (None, "dequantised", "requantised")
#: (test of an old storage, function(dense (out, in), old storage) -> new parameter); filled by trimtab.compat
REQUANTISERS: list[tuple[Callable[[Tensor], bool], Callable[[Tensor, Tensor], nn.Parameter]]] = []


@dataclass
class Target:
    """One base parameter that a merge will write."""

    site: Site
    chains: list[list[Adapter | BiasOf | WeightOf]]

    @property
    def key(self) -> tuple[int, str]:
        return id(self.site.module), self.site.tensor


def merge(
    model: nn.Module,
    name: str,
    *,
    into: str | None = None,
    max_error: float | None = None,
    untie: bool = False,
    permanent: bool = False,
) -> Table:
    """Write the adapter's update into the base weights; exact up to the rounding to the base's dtype, which is reported.

    The sum is formed in float32 (float64 on a float64 base). The original tensors are kept, so that ``unmerge`` puts the
    same bytes back. All checks come before the first write.

    Args:
        into: for a quantised base, said explicitly: ``"dequantised"`` replaces the weight by a dense one,
            ``"requantised"`` quantises the sum again in the same format.
        max_error: refuse if any place's relative output error on a random probe is larger.
        untie: give a tied tensor's other users the old values: the merged place gets a tensor of its own. The config of a
            transformers model then says that nothing is tied, and every user has a tensor of its own, so that
            ``save_pretrained`` writes all of them.
        permanent: keep no original and take the adapter off; the merged model is then an ordinary model.

    Returns:
        A table: per tensor the largest absolute rounding error, that error over the update's Frobenius norm, and the
        relative output error on a probe x ~ N(0, 1).

    Raises:
        NotMergeable: nothing has been written.
    """
    root = unwrap(model)
    state = state_of(root)
    group = adapter_group(state, name)
    _refuse_contexts(state)
    if others := dependants(state, name):
        raise NotMergeable(f"{others[0]!r} needs {name!r} beside the weights; tt.detach(model, {others[0]!r}) first")
    targets = _targets(state, group, into)
    ties = _ties(root, targets)
    _refuse(root, group, targets, ties, untie)
    report = report_table(name)
    planned = []
    cut = [f"{t.site.path}.{t.site.tensor}" for t in targets if t.key in ties] if untie else []
    with torch.no_grad():
        for target in targets:
            exact = adapted_chain(target.site, target.chains, dtype=accumulate(target.site))
            planned.append(check_target(target, exact, into, report, max_error))
        _refuse_apart(targets, planned)
        state.originals[name] = []  # insertion order is the order of merging
        written: dict[int, Tensor] = {}  # a tied tensor is written once
        for target, stored in zip(targets, planned, strict=True):
            _write(state, name, target, stored, written, own=untie and target.key in ties, keep=not permanent)
        if cut:
            _loosen(root, state, name, cut)
    group.merged = True
    if permanent:
        state.originals.pop(name)
        state.untied.pop(name, None)
        from trimtab.core.attach import remove_group

        remove_group(root, name)
    else:
        if name not in state.active:
            state.active = (*state.active, name)
        state.refresh()
    return report


def report_table(name: str) -> Table:
    """An empty report of a merge; ``check_target`` adds its rows."""
    return Table(("path", "shape", "dtype", "max error", "error / update", "output error"), title=f"merged {name!r}")


def unmerge(model: nn.Module, name: str) -> None:
    """Put the base's own bytes back; the adapter acts beside the weights again.

    Raises:
        NotMergeable: it is not merged, or another adapter was merged on top of it at a common place.
    """
    state = state_of(model)
    group = adapter_group(state, name)
    _refuse_contexts(state)
    if not group.merged:
        raise NotMergeable(f"the adapter {name!r} is not merged")
    mine = {(id(module), tensor) for module, tensor, _, _ in state.originals[name]}
    order = list(state.originals)
    for other in order[order.index(name) + 1 :]:
        if mine & {(id(module), tensor) for module, tensor, _, _ in state.originals[other]}:
            raise NotMergeable(f"{other!r} was merged on top of {name!r}; tt.unmerge(model, {other!r}) first")
    for module, tensor, saved, replaced in state.originals.pop(name):
        if replaced:
            module._parameters[tensor] = saved
        else:
            module._parameters[tensor].data.copy_(saved)
    if configs := state.untied.pop(name, ()):
        from trimtab.compat import ties

        for config in configs:
            setattr(config, ties.FLAG, True)
        ties.refresh(unwrap(model))
    group.merged = False
    state.refresh()


def _refuse_contexts(state: ModelState) -> None:
    """What acts in a block was settled when it began; a write into the base would come on top of it."""
    plan = present(state.owner)
    if state.owner.open or (plan is not None and (plan.acts is not None or plan.factors is not None)):
        kind = "tt.routed" if state.owner.open else "tt.disabled or tt.scaled"
        raise NotMergeable(f"a block of {kind} is open on this model, here or in another thread; merge and unmerge outside of it")


def _targets(state: ModelState, group: Group, into: str | None) -> list[Target]:
    """The base parameters behind the group's adapters, parts of one tensor together."""
    if into not in INTO:
        raise NotMergeable(f"into= must be one of {INTO}, found {into!r}")
    if group.merged:
        raise NotMergeable(f"the adapter {group.name!r} is merged already")
    found: dict[tuple[int, str], Target] = {}
    problems: list[TrimtabError] = []
    for adapter in group.adapters:
        tensors = on_tensors(adapter)
        if not tensors:
            kind, path = type(adapter.config).__name__, adapter.site.path
            problems.append(NotMergeable(f"{kind} at {path} acts on activations and has no weight form; serve it attached"))
        for each in tensors:
            target = found.setdefault((id(each.site.module), each.site.tensor), Target(each.site, []))
            target.chains.append([each])
    raise_all(problems)
    return list(found.values())


def _ties(root: nn.Module, targets: list[Target]) -> dict[tuple[int, str], str]:
    """Targets whose tensor a place of the model shares that is no target itself -> that place's name."""
    users = parameter_users(root)
    names = {f"{target.site.path}.{target.site.tensor}" for target in targets}
    ties = {}
    for target in targets:
        others = [name for name in users.get(id(target.site.parameter()), ()) if name not in names]  # a bias may not be there yet
        if others:
            ties[target.key] = others[0]
    return ties


def _refuse(root: nn.Module, group: Group, targets: list[Target], ties: dict, untie: bool) -> None:
    problems: list[TrimtabError] = []
    for target in targets:
        if target.key in ties and not untie:
            problems.append(
                NotMergeable(
                    f"{target.site.name} is tied to {ties[target.key]}, so that merging {group.name!r} would change both; "
                    "tt.merge(..., untie=True) gives the merged place a tensor of its own"
                )
            )
        if target.site.is_meta:
            problems.append(NotMergeable(f"{target.site.name} is on the meta device and has no values to merge into"))
    if ties and not problems:
        from trimtab.compat.ties import never_called

        problems += never_called(root, [target.site for target in targets if target.key in ties])
    raise_all(problems)


def _refuse_apart(targets: list[Target], planned: list[Tensor]) -> None:
    """The ends of a tie that all are targets must become the same tensor."""
    ends: dict[int, list[tuple[Target, Tensor]]] = {}
    for target, new in zip(targets, planned, strict=True):
        ends.setdefault(id(target.site.parameter()), []).append((target, new))
    raise_all([
        NotMergeable(
            f"{first.site.name} and {other.site.name} are one tied tensor, which the adapter changes in two ways; untie the model "
            "before attaching, or target one of them"
        )
        for (first, one), *rest in ends.values() if first.site.parameter() is not None
        for other, new in rest if not _same(one, new)
    ])  # fmt: skip


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(*(t.dequantize() if is_quantised(t) and hasattr(t, "dequantize") else t.detach() for t in (one, other)))


def _loosen(root: nn.Module, state: ModelState, name: str, cut: list[str]) -> None:
    """Turn the config's flag off that tied the tensors ``cut``, if it does nothing else, and give every other name that it tied a
    tensor of its own, too; ``unmerge`` takes both back."""
    from trimtab.compat import ties

    before = ties.tied_pairs(root)
    configs = ties.flags(root, cut)
    if not ties.separable(root, ties.flag_paths(root, configs)):
        return
    for config in configs:
        setattr(config, ties.FLAG, False)
    ties.refresh(root)
    state.untied[name] = configs
    for each in ties.free(root, before):
        path, _, tensor = each.rpartition(".")
        module = root.get_submodule(path)
        old = module._parameters[tensor]
        if name in state.originals:
            state.originals[name].append((module, tensor, old, True))
        module._parameters[tensor] = nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad)


def accumulate(site: Site) -> torch.dtype:
    """The dtype in which a merge forms its sum at ``site``."""
    return torch.float64 if site.dtype == torch.float64 else torch.float32


def check_target(target: Target, exact: Tensor, into: str | None, report: Table, max_error: float | None) -> Tensor:
    """The tensor to store for one target, after all checks; adds the target's row to the report.

    Args:
        exact: the merged matrix in the accumulation dtype and the contraction's layout.

    Raises:
        NotMergeable: not finite, above ``max_error``, or quantised without ``into``.
    """
    site = target.site
    stored = site.parameter()
    if not bool(torch.isfinite(exact).all()):
        raise NotMergeable(f"the merged weight of {site.name} holds NaN or infinite values; nothing was written")
    whole = site.unmatrix(exact)
    if stored is None:  # a bias for a module that had none
        new = nn.Parameter(whole.to(site.dtype), requires_grad=False)
        read = new.detach()
    elif is_quantised(stored):
        new, read = _quantised(site, whole, into)
    else:
        new = whole.reshape(stored.shape).to(stored.dtype)
        read = new
    kept = read.to(exact.dtype).reshape(whole.shape)
    before = adapted_chain(site, [], dtype=exact.dtype)
    error = site.matrix(kept) - exact
    update = (exact - before).norm().item()
    output = _output_error(exact, error)
    norm = error.norm().item()
    report.add(
        site.path if site.tensor == "weight" else f"{site.path}.{site.tensor}",
        "x".join(map(str, exact.shape)),
        str(site.dtype if stored is None else stored.dtype).removeprefix("torch."),
        error.abs().max().item(),
        norm / update if update else float(norm > 0),
        output,
    )
    if max_error is not None and output > max_error:
        raise NotMergeable(
            f"merging into {site.name} has a relative output error of {output:.2e}, above max_error={max_error:.2e}; "
            "nothing was written"
        )
    return new


def _output_error(exact: Tensor, error: Tensor) -> float:
    """``||x E^T|| / ||x W'^T||`` on a fixed probe; for vectors the relative error of the vector."""
    if exact.dim() < 2:
        size = exact.norm().item()
        return error.norm().item() / size if size else error.norm().item()
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(PROBE_ROWS, exact.shape[-1], generator=rng).to(exact)
    size = (x @ exact.transpose(-1, -2)).norm().item()
    loss = (x @ error.transpose(-1, -2)).norm().item()
    return loss / size if size else (0.0 if loss == 0 else math.inf)


def _quantised(site: Site, whole: Tensor, into: str | None) -> tuple[nn.Parameter, Tensor]:
    """A new parameter for a quantised place, and what it reads as."""
    if into is None:
        raise NotMergeable(
            f"{site.name} is quantised ({type(site.parameter()).__name__}); say what it becomes: "
            'tt.merge(..., into="dequantised") or tt.merge(..., into="requantised")'
        )
    if into == "dequantised":
        value = whole.to(site.dtype)
        return nn.Parameter(value, requires_grad=False), value
    for test, requantise in REQUANTISERS:
        if test(site.parameter()):
            new = requantise(whole.to(site.dtype), site.parameter())
            return new, dense(new, site.module)
    raise NotMergeable(f'{site.name}: no way is known to requantise a {type(site.parameter()).__name__}; use into="dequantised"')


def _write(
    state: ModelState, name: str, target: Target, new: Tensor, written: dict[int, Tensor], *, own: bool, keep: bool
) -> None:
    """Store the merged tensor: in place, or as another parameter where the storage changes or a tie is cut."""
    module, tensor = target.site.module, target.site.tensor
    old = target.site.parameter()
    replace = own or isinstance(new, nn.Parameter)
    if old is not None and id(old) in written:  # the other end of a tie
        if not replace:
            return
        new = written[id(old)]
    if keep:
        saved = old if replace else old.detach().clone()
        state.originals[name].append((module, tensor, saved, replace))
    if replace:
        module._parameters[tensor] = new if isinstance(new, nn.Parameter) else nn.Parameter(new, requires_grad=False)
    else:
        old.data.copy_(new)
    if old is not None:
        written[id(old)] = module._parameters[tensor]
