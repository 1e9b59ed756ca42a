"""One adapter a row: rows with adapters of one family (method and shapes) run as one batched operation.

The parameters of a family's adapters are stacked, a row's parameters are gathered by an index tensor, and the method's own
forward is mapped over rows with ``torch.vmap``. So the number of operations depends on the number of families in the batch, not on
the number of adapters. The forward that is mapped is that of a light copy of the adapters with a row's parameters in it: those of
the model are never exchanged, so that threads can share them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.acts import NOTHING, Acts
from trimtab.core.calls import first_of, replace_first, replace_output
from trimtab.core.contracts import ActivationAdapter, Adapter, TokenAdapter
from trimtab.core.errors import Unsupported
from trimtab.core.host import Host, weighed
from trimtab.core.scope import Factor
from trimtab.core.state import ModelState, host
from trimtab.core.tokens import Acting

__all__ = ["routes_of"]

Chain = tuple[Adapter, ...]


def _with(module: nn.Module, values: dict[int, Tensor]) -> nn.Module:
    """A light copy of ``module`` with other tensors, by the id of those that they stand for; all else is shared."""
    new = object.__new__(type(module))
    held = {name: {key: values.get(id(t), t) for key, t in module.__dict__[name].items()} for name in ("_parameters", "_buffers")}
    below = {key: None if child is None else _with(child, values) for key, child in module._modules.items()}
    object.__setattr__(new, "__dict__", {**module.__dict__, **held, "_modules": below})
    return new


@dataclass(frozen=True)
class Step:
    """One of the things that happen at a module: what a row goes through, and whether its adapters have anything to do there."""

    run: Callable[..., Tensor]
    acts: Callable[[Acts], bool]


def _inputs(acts: Acts, x: Tensor) -> Tensor:
    for adapter in acts.inputs:
        x = adapter(x, x)
    return x


def _outputs(acts: Acts, y: Tensor, *reads: Tensor, sources: Sequence[str | None]) -> Tensor:
    """``reads``: what the adapters read, by ``sources``."""
    for adapter in acts.outputs:
        y = adapter(reads[sources.index(adapter.site.source_path)], y)
    return y


INPUTS = Step(_inputs, lambda acts: bool(acts.inputs))
MATRIX = Step(lambda acts, x: acts.contract(x), lambda acts: acts.on_matrix)


@dataclass
class Family:
    """Rows that run together.

    Attributes:
        rows: row numbers, shape ``(rows,)``.
        chains: the different adapters of these rows, alike in methods and shapes; none for rows of the base alone.
        index: which of the chains each row uses, shape ``(rows,)``.
    """

    rows: Tensor
    chains: list[Acts] = field(default_factory=list)
    index: Tensor | None = None

    def acts(self, step: Step) -> bool:
        """Whether its rows take part in ``step``."""
        return bool(self.chains) and step.acts(self.chains[0])

    def gathered(self) -> tuple[list[Tensor], list[Tensor]]:
        """The tensors of the first chain, and what each row has in their places, ``(rows, ...)``.

        Stacked at every call, so that what an optimizer or a load wrote meanwhile is seen.
        """
        tensors = [_tensors(chain) for chain in self.chains]
        stacked = [torch.stack(each) if len(each) > 1 else each[0][None] for each in zip(*tensors, strict=True)]
        return tensors[0], [each.index_select(0, self.index) for each in stacked]

    def mapped(self, step: Step, *rows: Tensor) -> Tensor:
        """``step`` on each row, with its own adapters; ``(rows, items of a row, ...)``."""
        first, gathered = self.gathered()
        template = self.chains[0]

        def one(values: list[Tensor], *row: Tensor) -> Tensor:
            there = {id(old): new for old, new in zip(first, values, strict=True)}
            return step.run(template.mapped(lambda adapter: _with(adapter, there)), *row)

        return torch.vmap(one, randomness="different")(gathered, *rows)


def _tensors(acts: Acts) -> list[Tensor]:
    """Parameters and buffers of a chain, each once."""
    found = {id(t): t for adapter in acts.adapters for t in (*adapter.parameters(), *adapter.buffers())}
    return list(found.values())


@dataclass
class Route:
    """How one module treats the batch's rows.

    Attributes:
        count: number of rows.
        families: rows by their adapters, those of tokens left out.
        order: row number -> position in the families' rows.
        readers: adapters on the module's output, one for every module that some of them read.
        feeds: hosts where adapters of some row read this module's input.
        acting: duty -> token adapters, row by row.
    """

    count: int
    families: list[Family]
    order: Tensor
    readers: list[ActivationAdapter]
    feeds: list[tuple[Host, str]]
    acting: dict[str, Acting]

    def run(self, host: Host, module: nn.Module, factor: Factor | None, args: tuple, kwargs: dict) -> Any:
        """The module's output, each row through its own adapters.

        Matrices are adapted row by row. A module whose activations alone are adapted runs once, on the whole batch: its other
        arguments (masks, positions) may have rows too.
        """
        if not any(family.chains for family in self.families):
            return host.base(module, args, kwargs)
        given, own = first_of(args, kwargs), (args, kwargs)
        inner = self._any(INPUTS) or self._any(MATRIX)
        if self._any(INPUTS):
            args, kwargs = replace_first(args, kwargs, lambda x: self._each(INPUTS, lambda rows: rows, module, x))
        if self._any(MATRIX):
            rest, keys = args[1:], list(kwargs)
            call = lambda x: host.base(module, (x, *rest), kwargs) if args else host.base(module, (), {**kwargs, keys[0]: x})  # noqa: E731
            y = self._each(MATRIX, call, module, first_of(args, kwargs))
        else:
            y = host.base(module, args, kwargs)
        plain = host.plain(module, factor, None if inner else y, *own)
        if self.readers:
            sources = [adapter.site.source_path for adapter in self.readers]
            outputs = Step(partial(_outputs, sources=sources), lambda acts: bool(acts.outputs))
            reads = host.take(self.readers, first_of(args, kwargs), given)
            y = replace_output(y, lambda first: self._each(outputs, lambda rows: rows, module, first, *reads))
        return y if plain is None else weighed(y, plain, factor)

    def alike(self, host: Host, tensor: str) -> tuple[Acts, str | None]:
        """What a read of the module's parameter ``tensor`` means, which has no rows: what acts there, and why it means nothing."""
        acts = [NOTHING if not family.chains else chain for family in self.families for chain in family.chains or [NOTHING]]
        if len(acts) == 1 or not any(tensor in each.read or each.blind for each in acts):
            return acts[0], None
        return NOTHING, (
            f"{host.path}.{tensor} is read past the module's forward, where the rows of a batch have one tensor, and tt.routed "
            "gives them different adapters; run one batch an adapter, or target other places"
        )

    def _any(self, step: Step) -> bool:
        return any(family.acts(step) for family in self.families)

    def _each(self, step: Step, base: Callable[[Tensor], Tensor], module: nn.Module, *tensors: Tensor) -> Tensor:
        """``step`` on every row, by families; ``base`` of the first tensor for rows that do not take part in it."""
        grouped = [t.reshape(self.count, self._per_row(t, module), *t.shape[1:]) for t in tensors]  # (rows, items of a row, ...)
        parts = []
        for family in self.families:
            mine = [t.index_select(0, family.rows) for t in grouped]
            if not family.acts(step):
                y = base(mine[0].flatten(0, 1))
                parts.append(y.reshape(*mine[0].shape[:2], *y.shape[1:]))
                continue
            parts.append(family.mapped(step, *mine))
        return torch.cat(parts).index_select(0, self.order).flatten(0, 1)

    def _per_row(self, x: Tensor, module: nn.Module) -> int:
        """Entries of the first axis that belong to one row: 1, or tokens (windows, beams) if rows were flattened into it."""
        if x.dim() == 0 or x.shape[0] % self.count:
            raise Unsupported(
                f"tt.routed was given {self.count} rows, but {type(module).__name__} got an input of shape {tuple(x.shape)}, "
                f"whose first axis is no multiple of {self.count}; give one name a row of the batch"
            )
        return x.shape[0] // self.count


def routes_of(state: ModelState, rows: list[tuple[str, ...]]) -> dict[str, Route]:
    """The route of every hosted module for these rows, by path.

    Raises:
        Unsupported: an adapter acts by substitution, where rows of a batch cannot be told apart.
    """
    return {path: _route(module, rows) for path, module in state.hosts.items()}


def _route(module: nn.Module, rows: list[tuple[str, ...]]) -> Route:
    here = host(module)
    chains: dict[tuple[str, ...], Chain] = {}
    for row in rows:
        names = tuple(name for name in row if here.adapters(name))
        chains[row] = tuple(a for name in names for a in here.adapters(name) if not isinstance(a, TokenAdapter))
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    buckets: dict[Any, list[int]] = {}
    for number, row in enumerate(rows):
        buckets.setdefault(_signature(chains[row]), []).append(number)
    families = []
    for signature, numbers in buckets.items():
        family = Family(torch.tensor(numbers, device=device))
        if signature:
            distinct = list(dict.fromkeys(rows[n] for n in numbers))
            family.chains = [Acts(chains[row]) for row in distinct]
            family.index = torch.tensor([distinct.index(rows[n]) for n in numbers], device=device)
        families.append(family)
    order = torch.cat([family.rows for family in families]).argsort()
    acting = [a for family in families for chain in family.chains[:1] for a in chain.outputs]
    readers = {a.site.source_path: a for a in reversed(acting)}
    feeds = here.feeds_of(tuple({name for row in rows for name in row}))
    return Route(len(rows), families, order, list(readers.values()), feeds, _duties(here, rows))


def _duties(here: Host, rows: list[tuple[str, ...]]) -> dict[str, Acting]:
    """The token adapters of each row by what the module does for them; a duty that no row asks for is left out."""
    found: dict[str, list[tuple[TokenAdapter, ...]]] = {}
    for number, row in enumerate(rows):
        for name in row:
            for duty, adapter in here.token_duties(name):
                chains = found.setdefault(duty, [()] * len(rows))
                chains[number] = (*chains[number], adapter)
    return {duty: Acting(rows=chains) for duty, chains in found.items()}


def _signature(chain: Chain) -> tuple:
    """Equal for adapters that one template can run: same methods, configs, slots and tensor shapes."""
    for adapter in chain:
        site = adapter.site
        if site.substitutes or (site.kind == "module" and not isinstance(adapter, ActivationAdapter)):
            raise Unsupported(
                f"{site.name} cannot be routed: {type(adapter.config).__name__} changes a tensor that all rows of the batch "
                f"share there ({site.kind} place); run one batch an adapter, or target other places"
            )
    return tuple(
        (
            type(a),
            a.config,
            a.site.slot,
            a.site.source_path,
            tuple((k, v.shape, v.dtype) for k, v in (*a.named_parameters(), *a.named_buffers())),
        )
        for a in chain
    )
