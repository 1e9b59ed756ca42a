"""What adapters of any method add to their base: ``D = W' - W`` a place, as factors where the method has them, else dense.

Factors come from the method's own ``factors()``; an update that does not depend on W from ``weight(0)``; any other from
``weight(W) - W``, for which the base is needed. Nothing is held but what one place asks for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.artifacts.base import Base, values_in
from trimtab.artifacts.saved import Saved
from trimtab.core.contracts import Reparameterization, Selection
from trimtab.core.errors import NotMergeable, TrimtabError, Unsupported, raise_all
from trimtab.core.host import BiasOf, on_tensors
from trimtab.core.site import Site, dense
from trimtab.kernels.thin import Thin, Update

__all__ = ["Place", "effects_of", "key_of", "places", "put_effect", "reference", "update_of", "whole_value"]

#: an adapter, an adapter as it acts on its bias, or two of them in order: a site, a config and ``weight(W)``
Effect = Any


@dataclass
class Place:
    """One tensor, or some rows of it, on which at least one of the adapters acts.

    Attributes:
        site: the site; the whole tensor's where one adapter acts on all of it and another on rows.
        effects: an entry an adapter that acts here: its number and what acts.
    """

    site: Site
    effects: list[tuple[int, Effect]]

    @property
    def name(self) -> str:
        """Path, tensor and part."""
        return self.site.name


def effects_of(adapters: Sequence[Saved]) -> list[tuple[int, Effect]]:
    """What acts on a tensor, each with the number of its adapter.

    Raises:
        NotMergeable: something acts on activations or tokens and is no update of a weight; all of it together.
    """
    problems: list[TrimtabError] = []
    effects: list[tuple[int, Effect]] = []
    for number, saved in enumerate(adapters):
        for adapter in saved.adapters:
            tensors = on_tensors(adapter)
            if not tensors:
                what = f"{type(adapter.config).__name__} at {adapter.site.path}"
                problems.append(
                    NotMergeable(f"{saved.source}: {what} acts on activations and is no update of a weight; keep it attached")
                )
            effects += [(number, each) for each in tensors]
    raise_all(problems)
    return effects


def places(adapters: Sequence[Saved]) -> list[Place]:
    """All places of all adapters, those of one tensor together where the whole of it is among them.

    Raises:
        NotMergeable: see ``effects_of``. ShapeMismatch is left to the merge.
    """
    found: dict[tuple[str, str, str | None], Place] = {}
    wholes: dict[tuple[str, str], Site] = {}
    effects = effects_of(adapters)
    for _, effect in effects:
        site = effect.site
        if site.rows is None:
            wholes.setdefault((site.path, site.tensor), site)
    for number, effect in effects:
        whole = wholes.get((effect.site.path, effect.site.tensor))
        site = effect.site if whole is None else whole
        put_effect(found.setdefault(key_of(site), Place(site, [])).effects, number, effect)
    return list(found.values())


def key_of(site: Site) -> tuple[str, str, str | None]:
    """The tensor, or the rows of it, whatever layer of methods stands there."""
    return site.path, site.tensor, site.part


def put_effect(here: list[tuple[int, Effect]], number: int, effect: Effect) -> None:
    """Add what adapter ``number`` does at a place; where it acts twice (units cut out, then its own update), as one effect."""
    before = next((i for i, (n, e) in enumerate(here) if n == number and key_of(e.site) == key_of(effect.site)), None)
    if before is None:
        here.append((number, effect))
    else:
        here[before] = number, _Composed(here[before][1], effect)


class _Composed:
    """Two effects of one adapter at one place, in order; stands for them as one."""

    def __init__(self, first: Effect, second: Effect):
        self.first, self.second = first, second
        self.site, self.config = second.site, second.config

    def weight(self, W: Tensor) -> Tensor:
        """The second's weight of the first's."""
        return self.second.weight(self.first.weight(W))


def update_of(effect: Effect, target: Site, base: Base | None) -> Update:
    """``D`` of one effect, on the whole of ``target`` where that is more than its own rows.

    Factors are float64, which costs them nothing; a dense update is float32, or float64 on such a base.

    Raises:
        Unsupported: it depends on the base's weights and there is no base, or the base has no such tensor.
    """
    site = effect.site
    with torch.no_grad():
        update = _own_update(effect, base)
    if site.rows is None or target.rows is not None:
        return update
    if isinstance(update, Thin):
        return Thin(_spread(update.b, site, target.shape[-2]), update.a)
    return _spread(update, site, target.shape[site.row_axis])


def _spread(part: Tensor, site: Site, rows: int) -> Tensor:
    """``part`` at its rows of a tensor of zeros."""
    axis = part.dim() + site.row_axis if site.row_axis < 0 else site.row_axis
    shape = list(part.shape)
    shape[axis] = rows
    return site.rows.put(part.new_zeros(shape), axis, part)


def _own_update(effect: Effect, base: Base | None) -> Update:
    site = effect.site
    dtype = torch.float64 if site.dtype == torch.float64 else torch.float32
    if isinstance(effect, Reparameterization):
        factors = effect.factors()
        if factors is not None:
            return Thin(*(f.detach().double() for f in factors))
        if effect.additive:
            return effect.weight(torch.zeros(site.shape, dtype=dtype, device=site.device)).detach()
    method = type(effect.config).__name__
    if base is None:
        raise Unsupported(f"the update of {method} at {site.name} depends on the base's weights; say which base: base=...")
    W = reference(site, base, dtype)
    if W is None and isinstance(effect, BiasOf):  # a layer without a bias
        W = torch.zeros(site.shape, dtype=dtype)
    if W is None:
        raise Unsupported(f"the base has no {site.path}.{site.tensor}, so that {method} has nothing there to be an update of")
    with values_in(base, [site]):
        return effect.weight(W).detach() - W


def reference(site: Site, base: Base | None, dtype: torch.dtype) -> Tensor | None:
    """The base's own values at ``site``, in the contraction's layout, or None if there is no base or it has none."""
    if base is None:
        return None
    stored = base.value(site.path, site.tensor)
    return None if stored is None else site.take(site.matrix(dense(stored, site.module))).detach().to(dtype)


def whole_value(effect: Effect) -> Tensor | None:
    """The values that an effect puts in the place of all of its tensor's (or rows'), whatever the base; else None."""
    if isinstance(effect, Selection) and tuple(effect.value.shape) == tuple(effect.site.shape):
        return effect.value.detach()
    return None
