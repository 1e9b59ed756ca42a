"""Adapters that act together at one module, and what they make of its operation and of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimtab.core.contracts import ActivationAdapter, Adapter, TokenAdapter
from trimtab.core.errors import Unsupported
from trimtab.core.kinds import PartOperation, Through, bias_site, weight_site
from trimtab.core.site import Operation, Site, dense

if TYPE_CHECKING:
    from trimtab.core.host import Host
    from trimtab.core.scope import Factor
    from trimtab.core.tokens import Acting

__all__ = ["NOTHING", "Acts", "BiasOf", "WeightOf", "adapted_chain", "by_weight", "on_tensors", "rows_of", "value_of", "whole_site"]


class WeightOf:
    """An affine adapter on a Linear's activations as it acts on the matrix."""

    #: acts after whatever changes the matrix itself
    outer = True

    def __init__(self, adapter: ActivationAdapter, site: Site):
        self.adapter, self.config, self.site = adapter, adapter.config, site
        self.weight = adapter.weight


class BiasOf:
    """An adapter as it acts on its module's bias: ``weight`` is its ``bias``, on the place of the bias."""

    def __init__(self, adapter: Adapter):
        self.adapter, self.config = adapter, adapter.config
        self.site = bias_site(adapter.site)
        self.outer = isinstance(adapter, ActivationAdapter)

    def weight(self, b: Tensor) -> Tensor:
        """The adapted bias (out,); ``b`` is zero where the base has none."""
        none = self.site.parameter() is None
        new = self.adapter.bias(None if none else b)
        return b if new is None else new


Effect = Adapter | BiasOf | WeightOf


def on_tensors(adapter: Adapter) -> list[Effect]:
    """The adapter as it acts on tensors: itself, and once more on the bias if it does; nothing if it acts on activations alone."""
    found = by_weight(adapter)
    if isinstance(adapter, ActivationAdapter) and len(found) > 1 and adapter.site.module._parameters["bias"] is None:
        with torch.no_grad():
            return found if adapter.bias(None) is not None else found[:1]
    return found


def by_weight(adapter: Adapter) -> list[Effect]:
    """As ``on_tensors``, and on a bias that the module lacks also where the adapter has none to give now."""
    if isinstance(adapter, TokenAdapter):
        return []
    if isinstance(adapter, ActivationAdapter):
        site = weight_site(adapter.site)
        if site is None or adapter.site.source is not None or not adapter.merges(adapter.config, adapter.site):
            return []
        return [WeightOf(adapter, site), BiasOf(adapter)] if site.carries_bias else [WeightOf(adapter, site)]
    return [adapter, BiasOf(adapter)] if getattr(adapter, "rebias", False) and adapter.site.carries_bias else [adapter]


def whole_site(adapter: Adapter) -> Operation:
    """The site of the fused matrix that ``adapter``'s part belongs to."""
    site = adapter.site
    rows = getattr(site.module, "out_features", None) or site.matrix(site.parameter()).shape[0]
    return replace(site, part=None, rows=None, shape=(rows, site.in_features))


def adapted_chain(site: Site, chains: list[list[Effect]], *, dtype: torch.dtype | None = None) -> Tensor:
    """The whole tensor behind ``site`` after the chains, dense, in the contraction's layout; whole chains before parts, what acts
    on the output last.

    Args:
        dtype: compute in this dtype; None: the base's.
    """
    stored = site.parameter()
    if stored is None:  # the bias of a module that has none
        out = site.shape if site.rows is None else (site.module.out_features,)
        value = torch.zeros(out, device=site.device, dtype=site.dtype)
    else:
        value = site.matrix(dense(stored, site.module))
    value = value if dtype is None else value.to(dtype)
    for chain in sorted(chains, key=lambda chain: (getattr(chain[0], "outer", False), chain[0].site.part is not None)):
        here = chain[0].site
        part = here.take(value)
        for adapter in chain:
            part = adapter.weight(part)
        value = here.put(value, part)
    return value


def value_of(chains: list[list[Effect]], stored: Tensor | None, factor: Factor | None) -> Tensor:
    """The adapted value of a parameter, in the base's layout and dtype, less what ``factor`` leaves out."""
    site = chains[0][0].site
    value = site.unmatrix(adapted_chain(site, chains))
    if factor is not None and factor.asks:
        if factor.value.dim():
            raise Unsupported(f"{site.name} is one tensor for all rows of the batch, so that rows cannot have factors of their own")
        value = torch.lerp(site.unmatrix(adapted_chain(site, [])), value, factor.value.to(value.dtype))
    return value.to(site.dtype) if stored is None else value.reshape(stored.shape).to(stored.dtype)


def rows_of(factor: Tensor, y: Tensor) -> Tensor:
    """A factor, or one a row of the batch, shaped to multiply ``y`` (rows, or rows times tokens, ...)."""
    if factor.dim() == 0:
        return factor.to(y.dtype)
    if y.shape[0] % factor.shape[0]:
        raise Unsupported(
            f"{factor.shape[0]} rows were given a factor each, and a layer has an output of shape {tuple(y.shape)}, whose first "
            "axis is no multiple of that"
        )
    each = factor.to(y.dtype).repeat_interleave(y.shape[0] // factor.shape[0])
    return each.view(-1, *(1,) * (y.dim() - 1))


class Acts:
    """Adapters that act together at one module, in order, sorted by what they act on. Not changed once it is made.

    A compiled graph guards on the structure of the lists and not on names, so that switching between adapters of one shape
    recompiles nothing.

    Attributes:
        adapters: all of them, those of tokens left out.
        whole, parts: on the module's matrix, and on rows of it, a chain a part.
        inputs, outputs: on the module's activations.
        tensors: parameter -> chains, for parameters that the module's own forward reads adapted.
        read: parameter -> chains, for those that others may read past the module's forward.
        blind: on activations or as learned keys and values, without a weight form: no parameter that others read shows them.
        feeds: hosts where the adapters read this module's input, and the path of this module.
        duties: duty -> the token adapters that act with it.
    """

    def __init__(
        self,
        adapters: Iterable[Adapter] = (),
        feeds: Iterable[tuple[Host, str]] = (),
        duties: Mapping[str, Acting] | None = None,
    ):
        adapters = list(adapters)
        self.adapters = [adapter for adapter in adapters if not isinstance(adapter, TokenAdapter)]
        self.whole: list[Adapter] = []
        self.inputs: list[ActivationAdapter] = []
        self.outputs: list[ActivationAdapter] = []
        self.feeds = list(feeds)
        self.duties = dict(duties or {})
        self.blind: list[Adapter] = [a for a in adapters if isinstance(a, TokenAdapter) and a.duty == "beside"]
        parts: dict[str, list[Adapter]] = {}
        tensors: dict[str, dict[Any, list[Effect]]] = {}
        read: dict[str, dict[Any, list[Effect]]] = {}
        for adapter in self.adapters:
            site, effects = adapter.site, by_weight(adapter)
            if isinstance(adapter, ActivationAdapter):
                (self.inputs if adapter.at_input else self.outputs).append(adapter)
                self.blind += [] if effects else [adapter]
            elif not site.substitutes and site.part is not None:
                parts.setdefault(site.part, []).append(adapter)
            elif not site.substitutes:
                self.whole.append(adapter)
            for each in effects:
                key = each.site.part, getattr(each, "outer", False)
                read.setdefault(each.site.tensor, {}).setdefault(key, []).append(each)
                if site.substitutes:
                    tensors.setdefault(each.site.tensor, {}).setdefault(key, []).append(each)
        self.parts = list(parts.values())
        self.tensors = {tensor: list(chains.values()) for tensor, chains in tensors.items()}
        self.read = {tensor: list(chains.values()) for tensor, chains in read.items()}

    @property
    def on_matrix(self) -> bool:
        """Whether the module's matrix operation changes."""
        return bool(self.whole or self.parts)

    def contract(self, x: Tensor) -> Tensor:
        """The module's matrix operation with the adapters in order: ``W' = a_n(... a_1(W))``."""
        op: Operation = self.whole[0].site if self.whole else whole_site(self.parts[0][0])
        for adapter in self.whole:
            op = Through(adapter, op)
        y = op(x)
        for chain in self.parts:
            site = chain[0].site
            part: Operation = PartOperation(site, op, x, y)
            for adapter in chain:
                part = Through(adapter, part)
            y = site.rows.put(y, -1, part(x))
        return y

    def mapped(self, change: Callable[[Adapter], Adapter]) -> Acts:
        """The same, each adapter exchanged for ``change`` of it; without what acts on tensors."""
        new = object.__new__(Acts)
        new.adapters = [change(adapter) for adapter in self.adapters]
        of = {id(old): fresh for old, fresh in zip(self.adapters, new.adapters, strict=True)}
        new.whole, new.inputs, new.outputs = ([of[id(a)] for a in given] for given in (self.whole, self.inputs, self.outputs))
        new.parts = [[of[id(a)] for a in chain] for chain in self.parts]
        new.tensors, new.read, new.blind, new.feeds, new.duties = {}, {}, [], [], {}
        return new


NOTHING = Acts()
