"""What became of the adapters' places if the model was changed after they came: checked by every verb, never in a forward.

A module's place is its path; wrappers that stand between (compiled, checkpointed, FSDP's) do not count. A vocabulary that has
grown is followed: the table's old rows are those that it had, to the bit; an adapter's tensors get zeros for the new ones (a whole
copy gets the base's rows), if a trial shows that the old rows' effective weights stay and the new ones are the base's. Everything
else that is no longer what the adapters were made for is refused in words, and stays in memory until ``tt.detach``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from trimtab.core.contracts import Adapter, Selection
from trimtab.core.errors import TrimtabError, Unsupported, raise_all
from trimtab.core.host import CHILD
from trimtab.core.kinds import site_for
from trimtab.core.selection import Place
from trimtab.core.site import base_class, is_quantised

if TYPE_CHECKING:
    from trimtab.core.state import ModelState

__all__ = ["module_at", "verify"]

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module")


def module_at(root: nn.Module, path: str) -> nn.Module | None:
    """The module at ``path``, through wrappers that stand between; None if there is none."""
    module: nn.Module | None = root
    for word in path.split(".") if path else ():
        while module is not None and module._modules.get(word) is None:
            module = _inside(module)
        if module is None:
            return None
        module = module._modules[word]
    return module


def _inside(module: nn.Module) -> nn.Module | None:
    """What a wrapper wraps."""
    return next((module._modules[name] for name in _WRAPPERS if module._modules.get(name) is not None), None)


def verify(root: nn.Module, state: ModelState) -> bool:
    """Follow what can be followed; whether anything was. O(places).

    Raises:
        Unsupported: adapters act, or acted, on modules that are no longer at their places, or whose tensors have other shapes.
    """
    problems: list[TrimtabError] = []
    followed = False
    for path, module in list(state.hosts.items()):
        there = module_at(root, path)
        while there is not None and there is not module and base_class(there) is not base_class(module) and _inside(there):
            there = _inside(there)
        if there is module:
            pass
        elif there is not None and _continues(state, module, there):
            _move(state, path, module, there)
            followed = True
        else:
            problems.append(Unsupported(_lost(root, state, path, module, there)))
    raise_all(problems)
    for module in state.hosts.values():
        here = module._modules[CHILD]
        shapes = {name: value.shape for name, value in module._parameters.items() if value is not None}
        if here.shapes != shapes:  # a comparison a place, whatever number of adapters there is
            grown, more = _follow(state, module)
            followed, problems = followed or grown, problems + more
            here.shapes = None if more else shapes
    raise_all(problems)
    if followed:
        state.refresh()
    return followed


def _follow(state: ModelState, module: nn.Module) -> tuple[bool, list[TrimtabError]]:
    """Let the adapters at one module follow its tensors' shapes."""
    followed, problems = False, []
    for group in state.groups.values():
        for adapter in group.adapters:
            grown = _resized(adapter) if adapter.site.module is module else None
            if grown is None:
                continue
            try:
                _grow(adapter, *grown, merged=group.merged)
            except TrimtabError as error:
                problems.append(error)
                continue
            adapter.requires_grad_(group.trainable)  # resizing freezes the module with all that is beneath it
            followed = True
    return followed, problems


def _names(state: ModelState, module: nn.Module) -> str:
    """The adapters that stand at a module, for messages."""
    names = [name for name, group in state.groups.items() if any(a.site.module is module for a in group.adapters)]
    return " and ".join(map(repr, names or state.groups))


def _lost(root: nn.Module, state: ModelState, path: str, module: nn.Module, there: nn.Module | None) -> str:
    names = _names(state, module)
    now = next((where for where, each in root.named_modules() if each is module), None)
    if now is not None:
        what = f"it is at {now} now"
    elif there is not None:
        what = f"another {base_class(there).__name__} stands there, whose weights are not its own"
    else:
        what = "nothing stands there"
    one = next(iter(state.groups), "")
    return (
        f"the model was changed after the adapter {names} came: {path}, where it acts, is no longer the module it was attached to: "
        f"{what}. Put the old module back, or take the adapter off (tt.detach(model, {one!r}), which drops what it learnt) and "
        "attach or load it again on the changed model"
    )


def _continues(state: ModelState, old: nn.Module, new: nn.Module) -> bool:
    """Whether ``new`` is ``old`` with the same parameters, or with more rows behind those that it had."""
    if type(new) is not base_class(old) or any(group.merged for group in state.groups.values()) or CHILD in new._modules:
        return False
    mine = {name: value for name, value in old._parameters.items() if value is not None}
    others = {name: value for name, value in new._parameters.items() if value is not None}
    return mine.keys() == others.keys() and all(_begins(value, others[name]) for name, value in mine.items())


def _begins(old: Tensor, new: Tensor) -> bool:
    if is_quantised(old) or is_quantised(new) or old.is_meta or new.is_meta or old.dim() != new.dim():
        return False
    if old.shape[1:] != new.shape[1:] or old.shape[0] > new.shape[0] or old.dtype != new.dtype:
        return False
    return torch.equal(old.detach().to(new.device), new.detach()[: old.shape[0]])


def _move(state: ModelState, path: str, old: nn.Module, new: nn.Module) -> None:
    """The host and all that stands beneath ``old`` go to ``new``."""
    cls = type(old)
    new._modules[CHILD] = old._modules.pop(CHILD)
    old.__class__, new.__class__ = base_class(old), cls
    for value in new._parameters.values():
        if value is not None:
            value.requires_grad_(False)
    state.hosts[path] = new
    for group in state.groups.values():
        for adapter in group.adapters:
            if adapter.site.module is old:
                adapter.site.module = new
            if adapter.site.source is old:
                adapter.site.source = new


def _resized(adapter: Adapter) -> tuple[int, int] | None:
    """(axis, size) of the matrix where the base's tensor has another size than the site; None if it has the same.

    Raises nothing: other changes of shape are told by ``_grow``.
    """
    site = adapter.site
    stored = site.module._parameters.get(site.tensor) if site.tensor else None
    if stored is None or site.rows is not None or is_quantised(stored) or stored.numel() == math.prod(site.shape):
        return None
    place = Place(site.path, site.module, tensor=site.tensor, role=site.role, block=site.block)
    shape = site_for(place, site.tensor).shape
    differ = [axis for axis, (old, new) in enumerate(zip(site.shape, shape, strict=False)) if old != new]
    return (differ[0], shape[differ[0]]) if len(differ) == 1 and len(shape) == len(site.shape) else (-1, 0)


@torch.no_grad()
def _grow(adapter: Adapter, axis: int, size: int, *, merged: bool) -> None:
    """Let an adapter follow its grown place.

    Raises:
        Unsupported: it cannot.
    """
    site, old = adapter.site, adapter.site.shape
    name = type(adapter.config).__name__
    if axis < 0 or size < old[axis] or merged:
        why = "it is merged: tt.unmerge it before the model is changed" if merged else "only a table that grew can be followed"
        raise Unsupported(
            f"{site.name} has another shape than the {tuple(old)} that {name} was attached to; {why}; put the old tensor back, or "
            "take the adapter off with tt.detach"
        )
    axes = adapter.out_axes if axis == len(old) - 2 else adapter.in_axes
    if not (isinstance(adapter, Selection) or adapter.whole_ties or axes):
        raise Unsupported(_stays(adapter, old[axis], size))
    W = site.weight.detach()
    known, rest = W.narrow(axis, 0, old[axis]), W.narrow(axis, old[axis], size - old[axis])
    before, effect = {key: value.data for key, value in adapter.named_parameters()}, adapter.weight(known).clone()
    _pad(adapter, {} if adapter.whole_ties else axes or {}, rest, axis)
    site.shape = tuple(W.shape)
    adapter.rebuild()
    new = adapter.weight(W)
    same = torch.allclose(new.narrow(axis, 0, old[axis]), effect, rtol=1e-5, atol=1e-7)
    if same and torch.equal(new.narrow(axis, old[axis], rest.shape[axis]).to(rest.dtype), rest):
        return
    for key, value in adapter.named_parameters():
        value.data = before[key]
    site.shape = old
    adapter.rebuild()
    raise Unsupported(_stays(adapter, old[axis], size))


def _pad(adapter: Adapter, axes: Mapping[str, int], rest: Tensor, axis: int) -> None:
    """Room for the new rows: the base's own in a copy, zeros in factors."""
    for value in adapter.parameters():
        value.grad = None
    if isinstance(adapter, Selection):
        adapter.value.data = torch.cat([adapter.value.data, rest.to(adapter.value.data)], dim=axis)
        return
    for key, dim in axes.items():
        value = adapter.get_parameter(key)
        room = list(value.shape)
        room[dim] = rest.shape[axis]
        value.data = torch.cat([value.data, value.data.new_zeros(room)], dim=dim)


def _stays(adapter: Adapter, old: int, size: int) -> str:
    name = type(adapter.config).__name__
    return (
        f"{adapter.site.name} grew from {old} to {size} rows after {name} was attached, and {name} does not grow with it; tt.save "
        "it before the model is changed, take it off (tt.detach), change the model, and attach again"
    )
