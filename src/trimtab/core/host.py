"""The child module ``trimtab`` beneath an adapted module: all adapters there, and the forward that runs them.

A place keeps its module: its class is swapped (``trimtab.core.mounting``) for a subclass whose ``forward`` asks the host, and
whose substituted parameters are properties (``module.bias`` then reads the adapted bias wherever it is read from, while
``_parameters`` and the state dict keep the base's own tensor).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core import flows
from trimtab.core.calls import first_of, first_tensor, handed, replace_first, replace_output, thread
from trimtab.core.contracts import ActivationAdapter, Adapter, TokenAdapter
from trimtab.core.errors import Unsupported
from trimtab.core.kinds import PartOperation, Through, bias_site, weight_site
from trimtab.core.noting import note
from trimtab.core.site import Operation, Site, dense
from trimtab.core.tokens import Acting, Extra, Without, passages

__all__ = ["CHILD", "BiasOf", "Host", "Slots", "WeightOf", "adapted_chain", "escape", "on_tensors", "unescape", "whole_site"]

CHILD = "trimtab"


def escape(name: str) -> str:
    """An adapter name as a module name: state-dict keys use dots, so ``.`` becomes ``%2E``."""
    return name.replace("%", "%25").replace(".", "%2E")


def unescape(name: str) -> str:
    """Inverse of ``escape``."""
    return name.replace("%2E", ".").replace("%25", "%")


def _no_shortcut(module: nn.Module, args: tuple) -> None:
    """A hook that does nothing; its presence is its purpose."""


class Slots(nn.Module):
    """One adapter's parameters at one module, a child a slot (``weight``, ``bias``, ``weight_q``).

    Attributes:
        feeds: (host, path) of other modules where the adapter reads this module's input, and the path of this module.
    """

    def __init__(self) -> None:
        super().__init__()
        self.feeds: list[tuple[Host, str]] = []


class Host(nn.Module):
    """All adapters at one module: a child an adapter name, and plain lists of those that act now.

    The lists are rewritten by ``refresh`` alone. A compiled graph guards on their structure and not on the names, so
    switching between adapters of one shape recompiles nothing.

    ``scale`` is None, or the factor on all that the adapters change here (``core.activation.scaled``): a tensor, so that no
    graph depends on its value. ``damped`` is whether it differs from 1; a compiled graph does not ask.
    """

    def __init__(self) -> None:
        super().__init__()
        self.whole: list[Adapter] = []
        self.parts: list[list[Adapter]] = []
        self.tensors: dict[str, list[list[Adapter]]] = {}
        self.inputs: list[ActivationAdapter] = []
        self.outputs: list[ActivationAdapter] = []
        self.feeds: list[tuple[Host, str]] = []
        #: (path of another module, thread) -> its input and output in the forward that is running
        self.fed: dict[tuple[str, int], tuple[Tensor, Any]] = {}
        self.route: Any = None
        #: path of the module, which token passages know it by; of the block that tokens go to from here
        self.path = self.next = ""
        #: adapter name -> duties for token adapters that stand at other modules (trimtab.core.flows)
        self.served: dict[str, list[tuple[str, TokenAdapter]]] = {}
        #: duty -> the token adapters that act with it now
        self.acting: dict[str, Acting] = {}
        #: how an attention is reached: its function is asked from a registry; its scores are written out beside a cache; at all
        self.redirected = self.cached = self.reachable = False
        #: whether the attention of this block can be reached; whether this body's positions are rotations
        self.reaches = self.rotates = False
        #: how a prompt acts in the stack that this body runs (trimtab.core.trial), None: not known yet; the stack's blocks
        self.manner: str | None = None
        self.blocks: list[nn.Module] = []
        #: width of its embeddings; name of the method that came first
        self.width, self.asked = 0, ""
        self.scale: Tensor | None = None
        self.damped = False
        # nn.TransformerEncoderLayer's inference shortcut reads its children's weights past their forward, unless a hook
        # stands on a module below it; the host itself is never called, so this costs nothing
        self.register_forward_pre_hook(_no_shortcut)

    def __setattr__(self, name: str, value: Any) -> None:
        # children are adapters, entered in ``_modules`` by ``slots``; one may be called "whole" or "route" like an attribute
        object.__setattr__(self, name, value)

    def adapters(self, name: str) -> list[Adapter]:
        """The adapters called ``name`` at this module."""
        slots = self._modules.get(escape(name))
        return [] if slots is None else list(slots._modules.values())

    def put(self, name: str, slot: str, adapter: Adapter) -> None:
        """Add an adapter under ``name`` (the module tables are written directly: any name is allowed, "forward" too)."""
        self.slots(name)._modules[slot] = adapter

    def slots(self, name: str) -> Slots:
        """The child for what is called ``name``, made if there is none."""
        return self._modules.setdefault(escape(name), Slots())

    def refresh(self, active: tuple[str, ...]) -> None:
        """Recompute what acts: O(adapters that act here)."""
        self.whole, self.inputs, self.outputs = [], [], []
        self.feeds = self.feeds_of(active)
        parts: dict[str, list[Adapter]] = {}
        tensors: dict[str, dict[str | None, list[Adapter]]] = {}
        for name in active:
            for adapter in self.adapters(name):
                site = adapter.site
                if isinstance(adapter, TokenAdapter):
                    continue
                if isinstance(adapter, ActivationAdapter):
                    (self.inputs if adapter.at_input else self.outputs).append(adapter)
                elif site.substitutes:
                    for each in on_tensors(adapter):
                        tensors.setdefault(each.site.tensor, {}).setdefault(each.site.part, []).append(each)
                elif site.part is not None:
                    parts.setdefault(site.part, []).append(adapter)
                else:
                    self.whole.append(adapter)
        self.parts = list(parts.values())
        self.tensors = {tensor: list(chains.values()) for tensor, chains in tensors.items()}
        duties: dict[str, list[TokenAdapter]] = {}
        for name in active:
            for duty, adapter in self.token_duties(name):
                duties.setdefault(duty, []).append(adapter)
        self.acting = {duty: Acting(adapters) for duty, adapters in duties.items()}

    def token_duties(self, name: str) -> Iterator[tuple[str, TokenAdapter]]:
        """What this module does for the token adapters called ``name``, which stand here or elsewhere."""
        for adapter in self.adapters(name):
            if isinstance(adapter, TokenAdapter):
                yield adapter.duty, adapter
        yield from self.served.get(name, ())

    def duties(self) -> dict[str, Acting]:
        """Duty -> the token adapters that act with it now, row by row if the batch is routed."""
        return self.acting if self.route is None else self.route.acting

    def extras(self, n: int) -> list[Extra]:
        """Keys and values of the adapters that stand at this attention, for a batch of ``n``."""
        acting = self.duties().get("beside")
        if acting is None or any(isinstance(passage, Without) and passage.path == self.path for passage in passages()):
            return []
        return acting.extras(n)

    def feeds_of(self, names: tuple[str, ...]) -> list[tuple[Host, str]]:
        """Hosts where the adapters ``names`` read this module's input."""
        slots = [self._modules[escape(name)] for name in names if escape(name) in self._modules]
        return list({id(target): (target, path) for each in slots for target, path in each.feeds}.values())

    def run(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """The adapted forward of ``module``."""
        note(self)
        acting = self.duties()
        if not acting:
            return self.without_tokens(module, args, kwargs)
        y = flows.run(self, module, args, kwargs, acting, partial(self.without_tokens, module))
        if self.scale is None or not (torch.compiler.is_compiling() or self.damped):
            return y
        plain = flows.plain(self, acting, partial(self.without_tokens, module), args, kwargs)
        return y if plain is None else replace_output(y, lambda full: torch.lerp(plain, full, _rows(self.scale, full)))

    def without_tokens(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """The forward of ``module`` with all adapters but those of tokens."""
        feeds = self.feeds if self.route is None else self.route.feeds
        if not feeds:
            return self._run(module, args, kwargs) if self.route is None else self.route.run(self, module, args, kwargs)
        y = self._run(module, args, kwargs) if self.route is None else self.route.run(self, module, args, kwargs)
        for target, path in feeds:
            target.fed[path, thread()] = first_of(args, kwargs), y
        return y

    def take(self, outputs: list[ActivationAdapter], x: Tensor, given: Tensor) -> list[Tensor]:
        """What each of ``outputs`` reads: ``x``, the module's input, or another module's input in this forward.

        Args:
            given: the module's input before adapters changed it.
        """
        if not self.fed and not any(output.site.source_path for output in outputs):
            return [x] * len(outputs)
        key = thread()
        fed = {path: self.fed.pop((path, key)) for path in {path for path, k in self.fed if k == key}}
        return [x if output.site.source_path is None else handed(output, fed, given) for output in outputs]

    def _run(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        base = module._trimtab_base.forward
        inner = self.whole or self.parts or self.inputs
        if not (inner or self.outputs):
            return base(module, *args, **kwargs)
        damped = self.scale is not None and (torch.compiler.is_compiling() or self.damped)
        given = first_of(args, kwargs)
        x, y = self._inner(module, args, kwargs) if inner else (given, base(module, *args, **kwargs))
        plain = first_tensor(base(module, *args, **kwargs) if inner else y) if damped else None
        for output, read in zip(self.outputs, self.take(self.outputs, x, given), strict=True):
            y = replace_output(y, lambda first, output=output, read=read: output(read, first))
        return y if plain is None else replace_output(y, lambda full: torch.lerp(plain, full, _rows(self.scale, full)))

    def _inner(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[Tensor, Any]:
        """The module's first input after what acts on it, and its output before what acts on that."""
        for adapter in self.inputs:
            args, kwargs = replace_first(args, kwargs, lambda x, adapter=adapter: adapter(x, x))
        x = first_of(args, kwargs)
        y = self.contract(x) if self.whole or self.parts else module._trimtab_base.forward(module, *args, **kwargs)
        return x, y

    def contract(self, x: Tensor) -> Tensor:
        """The module's matrix operation with the acting adapters in order: ``W' = a_n(... a_1(W))``."""
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

    def substitute(self, module: nn.Module, tensor: str) -> Tensor:
        """The value that ``module`` reads for its parameter ``tensor``, in the base's layout and dtype."""
        stored = module._parameters.get(tensor)
        chains = self.tensors.get(tensor)
        if not chains:
            return stored
        site = chains[0][0].site
        value = site.unmatrix(adapted_chain(site, chains))
        if self.scale is not None and (torch.compiler.is_compiling() or self.damped):
            value = torch.lerp(site.unmatrix(adapted_chain(site, [])), value, _alone(self.scale, value, site))
        return value.to(site.dtype) if stored is None else value.reshape(stored.shape).to(stored.dtype)


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


def on_tensors(adapter: Adapter) -> list[Adapter | BiasOf | WeightOf]:
    """The adapter as it acts on tensors: itself, and once more on the bias if it does; nothing if it acts on activations alone."""
    if isinstance(adapter, TokenAdapter):
        return []
    if isinstance(adapter, ActivationAdapter):
        site = weight_site(adapter.site)
        if site is None or adapter.site.source is not None or not adapter.merges(adapter.config, adapter.site):
            return []
        with torch.no_grad():
            moved = site.bias is not None or adapter.bias(None) is not None
        return [WeightOf(adapter, site), BiasOf(adapter)] if moved and site.carries_bias else [WeightOf(adapter, site)]
    return [adapter, BiasOf(adapter)] if getattr(adapter, "rebias", False) and adapter.site.carries_bias else [adapter]


def whole_site(adapter: Adapter) -> Operation:
    """The site of the fused matrix that ``adapter``'s part belongs to."""
    from dataclasses import replace

    site = adapter.site
    return replace(site, part=None, rows=None, shape=(site.module.weight.shape[0], site.in_features))


def adapted_chain(site: Site, chains: list[list[Adapter]], *, dtype: torch.dtype | None = None) -> Tensor:
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


def _rows(scale: Tensor, y: Tensor) -> Tensor:
    """A factor, or one a row of the batch, shaped to multiply ``y`` (rows, or rows times tokens, ...)."""
    if scale.dim() == 0:
        return scale.to(y.dtype)
    if y.shape[0] % scale.shape[0]:
        raise Unsupported(
            f"{scale.shape[0]} rows were given a factor each, and a layer has an output of shape {tuple(y.shape)}, whose first "
            "axis is no multiple of that"
        )
    each = scale.to(y.dtype).repeat_interleave(y.shape[0] // scale.shape[0])
    return each.view(-1, *(1,) * (y.dim() - 1))


def _alone(scale: Tensor, value: Tensor, site: Site) -> Tensor:
    """The factor of a tensor that all rows share."""
    if scale.dim():
        raise Unsupported(f"{site.name} is one tensor for all rows of the batch, so that rows cannot have factors of their own")
    return scale.to(value.dtype)
