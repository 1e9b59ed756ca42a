"""The child module ``trimtab`` beneath an adapted module: all adapters there, and the forward that runs them.

A place keeps its module: its class is swapped (``trimtab.core.mounting``) for a subclass whose ``forward`` asks the host. A
parameter that adapters act on is a property of that class, which reads as the adapted value wherever it is read from, while
``_parameters`` and the state dict keep the base's own tensor. The module's own forward runs on a second object with the same
``__dict__``, the *inside*, whose class has no such properties but those that act by substitution: which of the two values a read
means depends on the object that is asked, and on no state.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from threading import local
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from trimtab.core import flows
from trimtab.core.acts import NOTHING, Acts, BiasOf, WeightOf, adapted_chain, by_weight, on_tensors, rows_of, value_of, whole_site
from trimtab.core.calls import first_of, first_tensor, handed, replace_first, replace_output
from trimtab.core.contracts import ActivationAdapter, Adapter, TokenAdapter
from trimtab.core.noting import note
from trimtab.core.reads import Reading, shown
from trimtab.core.scope import Factor, Owner, Plan, plan_for
from trimtab.core.site import CHILD
from trimtab.core.tokens import Acting, Extra, Without, passages

__all__ = [
    "CHILD", "BiasOf", "Host", "Slots", "WeightOf", "adapted_chain", "by_weight", "escape", "on_tensors", "unescape",
    "weighed", "whole_site",
]  # fmt: skip


def escape(name: str) -> str:
    """An adapter name as a module name: state-dict keys use dots, so ``.`` becomes ``%2E``."""
    return name.replace("%", "%25").replace(".", "%2E")


def unescape(name: str) -> str:
    """Inverse of ``escape``."""
    return name.replace("%2E", ".").replace("%25", "%")


def _no_shortcut(module: nn.Module, args: tuple) -> None:
    """A hook that does nothing; its presence is its purpose."""


class _Handed(local):
    """What modules have handed to adapters elsewhere in the forward that this thread runs: host -> path -> input and output."""

    def __init__(self) -> None:
        self.to: WeakKeyDictionary[Host, dict[str, tuple[Tensor, Any]]] = WeakKeyDictionary()


_HANDED = _Handed()


class Slots(nn.Module):
    """One adapter's parameters at one module, a child a slot (``weight``, ``bias``, ``weight_q``).

    Attributes:
        feeds: (host, path) of other modules where the adapter reads this module's input, and the path of this module.
    """

    def __init__(self) -> None:
        super().__init__()
        self.feeds: list[tuple[Host, str]] = []


class Host(nn.Module):
    """All adapters at one module: a child an adapter name. ``acts`` is what acts outside of all contexts, rewritten by ``refresh``
    alone; what holds in a context is asked from ``trimtab.core.scope`` at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.acts = NOTHING
        self.owner = Owner()
        #: in a compiled graph: path of another module -> its input and output in the forward that is running
        self.fed: dict[str, tuple[Tensor, Any]] = {}
        #: path of the module, which contexts and token passages know it by; of the block that tokens go to from here
        self.path = self.next = ""
        #: adapter name -> duties for token adapters that stand at other modules (trimtab.core.flows)
        self.served: dict[str, list[tuple[str, TokenAdapter]]] = {}
        #: how an attention is reached: its function is asked from a registry; its scores are written out beside a cache; at all
        self.redirected = self.cached = self.reachable = False
        #: whether the attention of this block can be reached; whether this body's positions are rotations
        self.reaches = self.rotates = False
        #: how a prompt acts in the stack that this body runs (trimtab.core.laws), None: not known yet; the stack's blocks
        self.manner: str | None = None
        self.blocks: list[nn.Module] = []
        #: width of its embeddings; name of the method that came first
        self.width, self.asked = 0, ""
        #: shapes of the module's parameters when the adapters were last found to fit them (trimtab.core.changes)
        self.shapes: dict[str, torch.Size] | None = None
        # nn.TransformerEncoderLayer's inference shortcut reads its children's weights past their forward, unless a hook
        # stands on a module below it; the host itself is never called, so this costs nothing
        self.register_forward_pre_hook(_no_shortcut)

    def __setattr__(self, name: str, value: Any) -> None:
        # children are adapters, entered in ``_modules`` by ``slots``; one may be called "acts" or "owner" like an attribute
        object.__setattr__(self, name, value)

    def __getstate__(self) -> dict:
        """Without the inside and what was read, which belong to the very module above it."""
        return {key: value for key, value in self.__dict__.items() if key not in ("inside_object", "given")}

    def inside(self, module: nn.Module) -> nn.Module:
        """``module`` as its own forward sees it."""
        cls = getattr(type(module), "_trimtab_inside", None)
        if cls is None:
            return module
        found = self.__dict__.get("inside_object")
        if torch.compiler.is_compiling():
            return found
        if found is None or type(found) is not cls or found.__dict__ is not module.__dict__:
            found = object.__new__(cls)
            object.__setattr__(found, "__dict__", module.__dict__)
            self.__dict__["inside_object"] = found
        return found

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
        """Recompute what acts outside of contexts: O(adapters that act here)."""
        self.acts = self.acts_of(active)

    def acts_of(self, names: tuple[str, ...]) -> Acts:
        """What acts here if ``names`` do, in this order."""
        duties: dict[str, list[TokenAdapter]] = {}
        for name in names:
            for duty, adapter in self.token_duties(name):
                duties.setdefault(duty, []).append(adapter)
        adapters = [adapter for name in names for adapter in self.adapters(name)]
        return Acts(adapters, self.feeds_of(names), {duty: Acting(found) for duty, found in duties.items()})

    def token_duties(self, name: str) -> Iterator[tuple[str, TokenAdapter]]:
        """What this module does for the token adapters called ``name``, which stand here or elsewhere."""
        for adapter in self.adapters(name):
            if isinstance(adapter, TokenAdapter):
                yield adapter.duty, adapter
        yield from self.served.get(name, ())

    def feeds_of(self, names: tuple[str, ...]) -> list[tuple[Host, str]]:
        """Hosts where the adapters ``names`` read this module's input."""
        slots = [self._modules[escape(name)] for name in names if escape(name) in self._modules]
        return list({id(target): (target, path) for each in slots for target, path in each.feeds}.values())

    # -- what holds now

    def acting(self, plan: Plan | None) -> Acts:
        """What acts here under ``plan``, the same for all rows."""
        return self.acts if plan is None or plan.acts is None else plan.acts.get(self.path, NOTHING)

    def route(self, plan: Plan | None) -> Any:
        """How the rows of the batch are treated here; None: all alike."""
        return None if plan is None or plan.routes is None else plan.routes.get(self.path)

    def factor(self, plan: Plan | None) -> Factor | None:
        """The factor on all that the adapters change here."""
        return None if plan is None or plan.factors is None else plan.factors.get(self.path)

    def duties(self) -> dict[str, Acting]:
        """Duty -> the token adapters that act with it now, row by row if the batch is routed."""
        return self._duties(plan_for(self.owner))

    def _duties(self, plan: Plan | None) -> dict[str, Acting]:
        route = self.route(plan)
        return self.acting(plan).duties if route is None else route.acting

    def extras(self, n: int) -> list[Extra]:
        """Keys and values of the adapters that stand at this attention, for a batch of ``n``."""
        acting = self.duties().get("beside")
        if acting is None or any(isinstance(passage, Without) and passage.path == self.path for passage in passages()):
            return []
        return acting.extras(n)

    # -- the forward

    def run(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """The adapted forward of ``module``."""
        note(self)
        plan = plan_for(self.owner)
        acting = self._duties(plan)
        if not acting:
            return self._without_tokens(module, plan, args, kwargs)
        inner = partial(self._without_tokens, module, plan)
        y = flows.run(self, module, args, kwargs, acting, inner)
        factor = self.factor(plan)
        if factor is None or not factor.asks:
            return y
        plain = flows.plain(self, acting, inner, args, kwargs, damped=factor.damped)
        return y if plain is None else weighed(y, plain, factor)

    def _without_tokens(self, module: nn.Module, plan: Plan | None, args: tuple, kwargs: dict) -> Any:
        """The forward of ``module`` with all adapters but those of tokens."""
        route, factor = self.route(plan), self.factor(plan)
        if route is None:
            acts = self.acting(plan)
            y, feeds = self._run(module, acts, factor, args, kwargs), acts.feeds
        else:
            y, feeds = route.run(self, module, factor, args, kwargs), route.feeds
        if feeds:
            self._feed(feeds, first_of(args, kwargs), y)
        return y

    def _run(self, module: nn.Module, acts: Acts, factor: Factor | None, args: tuple, kwargs: dict) -> Any:
        inner = acts.whole or acts.parts or acts.inputs
        if not (inner or acts.outputs):
            return self.base(module, args, kwargs)
        given = first_of(args, kwargs)
        x, y = self._inner(module, acts, args, kwargs) if inner else (given, self.base(module, args, kwargs))
        plain = self.plain(module, factor, None if inner else y, args, kwargs)
        for output, read in zip(acts.outputs, self.take(acts.outputs, x, given), strict=True):
            y = replace_output(y, lambda first, output=output, read=read: output(read, first))
        return y if plain is None else weighed(y, plain, factor)

    def _inner(self, module: nn.Module, acts: Acts, args: tuple, kwargs: dict) -> tuple[Tensor, Any]:
        """The module's first input after what acts on it, and its output before what acts on that."""
        for adapter in acts.inputs:
            args, kwargs = replace_first(args, kwargs, lambda x, adapter=adapter: adapter(x, x))
        x = first_of(args, kwargs)
        return x, acts.contract(x) if acts.whole or acts.parts else self.base(module, args, kwargs)

    def base(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """The module's own forward."""
        return type(module)._trimtab_base.forward(self.inside(module), *args, **kwargs)

    def plain(self, module: nn.Module, factor: Factor | None, y: Any, args: tuple, kwargs: dict) -> Tensor | None:
        """What the base gives, for a factor that asks for it: of ``y``, if that is the base's own output, else of a second run."""
        if factor is None or not factor.asks:
            return None
        return first_tensor(self.base(module, args, kwargs) if y is None else y)

    # -- what modules hand to adapters at others

    def _feed(self, feeds: list[tuple[Host, str]], x: Tensor, y: Any) -> None:
        for target, path in feeds:
            if torch.compiler.is_compiling():
                target.fed[path] = x, y
            else:
                _HANDED.to.setdefault(target, {})[path] = x, y

    def take(self, outputs: list[ActivationAdapter], x: Tensor, given: Tensor) -> list[Tensor]:
        """What each of ``outputs`` reads: ``x``, the module's input, or another module's input in this forward.

        Args:
            given: the module's input before adapters changed it.
        """
        if not any(output.site.source_path for output in outputs):
            return [x] * len(outputs)
        if torch.compiler.is_compiling():
            fed = {path: self.fed.pop(path) for path in list(self.fed)}
        else:
            fed = _HANDED.to.pop(self, {})
        return [x if output.site.source_path is None else handed(output, fed, given) for output in outputs]

    # -- what is read of the module's parameters

    def substitute(self, module: nn.Module, tensor: str) -> Tensor | None:
        """The value that the forward of ``module`` reads for its parameter ``tensor``, in the base's layout and dtype."""
        stored = module._parameters.get(tensor)
        plan = plan_for(self.owner)
        chains = self.acting(plan).tensors.get(tensor)
        return value_of(chains, stored, self.factor(plan)) if chains else stored

    def read(self, module: nn.Module, tensor: str) -> Tensor | None:
        """What others read for the parameter ``tensor`` of ``module``."""
        if tensor not in module._parameters:
            return module.__dict__[tensor]
        stored = module._parameters[tensor]
        plan = plan_for(self.owner)
        route = self.route(plan)
        acts, refusal = (self.acting(plan), None) if route is None else route.alike(self, tensor)
        chains = acts.read.get(tensor, [])
        if acts.blind and refusal is None and stored is not None:
            kind = type(acts.blind[0].config).__name__
            refusal = (
                f"{self.path}.{tensor} is read past the module's forward, where {kind} cannot act: it changes what the module puts "
                "out, which no weight does; target another place, or use a method that changes the weight"
            )
        if not chains and refusal is None:
            return stored
        if stored is None and all(isinstance(e, BiasOf) and e.adapter.bias(None) is None for chain in chains for e in chain):
            return None
        reading = Reading(self, stored, chains, self.factor(plan), refusal)
        return reading.value() if torch.compiler.is_compiling() else shown(reading, self.__dict__.setdefault("given", {}), tensor)


def weighed(y: Any, plain: Tensor, factor: Factor) -> Any:
    """A module's output, of what adapters changed in it the part ``factor``."""
    return replace_output(y, lambda full: torch.lerp(plain, full, rows_of(factor.value, full)))

