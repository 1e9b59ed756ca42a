"""One adapter a row: rows with adapters of one family (method and shapes) run as one batched operation.

The parameters of a family's adapters are stacked once when the context is entered; inside, a row's parameters are
gathered by an index tensor and the method's own forward is mapped over rows with ``torch.vmap``. So the number of
operations depends on the number of families in the batch, not on the number of adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from trimtab.core.calls import first_of, replace_first, replace_output
from trimtab.core.contracts import ActivationAdapter, Adapter, TokenAdapter
from trimtab.core.errors import Unsupported
from trimtab.core.host import Host
from trimtab.core.state import ModelState, host
from trimtab.core.tokens import Acting

__all__ = ["clear_routes", "set_routes"]

Chain = tuple[Adapter, ...]


class _Run(nn.Module):
    """A row's adapters, so that ``functional_call`` can give them a row's parameters."""

    def __init__(self, template: Host):
        super().__init__()
        parts = (a for part in template.parts for a in part)
        self.chain = nn.ModuleList([*template.whole, *parts, *template.inputs, *template.outputs])
        # a plain attribute: the host stays out of this module's tree
        object.__setattr__(self, "template", template)

    def forward(self, step: Step, *tensors: Tensor) -> Tensor:
        return step.run(self.template, *tensors)


@dataclass(frozen=True)
class Step:
    """One of the things that happen at a module: what a row goes through, and whether a host has anything to do there."""

    run: Callable[..., Tensor]
    acts: Callable[[Host], bool]


def _inputs(host: Host, x: Tensor) -> Tensor:
    for adapter in host.inputs:
        x = adapter(x, x)
    return x


def _outputs(host: Host, y: Tensor, *reads: Tensor, sources: Sequence[str | None]) -> Tensor:
    """``reads``: what the adapters read, by ``sources``."""
    for adapter in host.outputs:
        y = adapter(reads[sources.index(adapter.site.source_path)], y)
    return y


INPUTS = Step(_inputs, lambda host: bool(host.inputs))
MATRIX = Step(lambda host, x: host.contract(x), lambda host: bool(host.whole or host.parts))


@dataclass
class Family:
    """Rows that run together.

    Attributes:
        rows: row numbers, shape ``(rows,)``.
        run: the template; None for rows of the base alone.
        index: which of the stacked adapters each row uses, shape ``(rows,)``.
        stacked: parameter name -> ``(adapters, ...)``.
    """

    rows: Tensor
    run: _Run | None = None
    index: Tensor | None = None
    stacked: dict[str, Tensor] = field(default_factory=dict)

    def acts(self, step: Step) -> bool:
        """Whether its rows take part in ``step``."""
        return self.run is not None and step.acts(self.run.template)


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

    def run(self, host: Host, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """The module's output, each row through its own adapters.

        Matrices are adapted row by row. A module whose activations alone are adapted runs once, on the whole batch: its other
        arguments (masks, positions) may have rows too.
        """
        base = module._trimtab_base.forward
        if all(family.run is None for family in self.families):
            return base(module, *args, **kwargs)
        given = first_of(args, kwargs)
        if self._any(INPUTS):
            args, kwargs = replace_first(args, kwargs, lambda x: self._each(INPUTS, lambda rows: rows, module, x))
        if self._any(MATRIX):
            rest, keys = args[1:], list(kwargs)
            call = lambda x: base(module, x, *rest, **kwargs) if args else base(module, **{**kwargs, keys[0]: x})  # noqa: E731
            y = self._each(MATRIX, call, module, first_of(args, kwargs))
        else:
            y = base(module, *args, **kwargs)
        if not self.readers:
            return y
        sources = [adapter.site.source_path for adapter in self.readers]
        outputs = Step(partial(_outputs, sources=sources), lambda host: bool(host.outputs))
        reads = host.take(self.readers, first_of(args, kwargs), given)
        return replace_output(y, lambda first: self._each(outputs, lambda rows: rows, module, first, *reads))

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
            params = {key: value.index_select(0, family.index) for key, value in family.stacked.items()}

            def one(params: dict[str, Tensor], *row: Tensor, run: _Run = family.run) -> Tensor:
                return functional_call(run, params, (step, *row))

            parts.append(torch.vmap(one, randomness="different")(params, *mine))
        return torch.cat(parts).index_select(0, self.order).flatten(0, 1)

    def _per_row(self, x: Tensor, module: nn.Module) -> int:
        """Entries of the first axis that belong to one row: 1, or tokens (windows, beams) if rows were flattened into it."""
        if x.dim() == 0 or x.shape[0] % self.count:
            raise Unsupported(
                f"tt.routed was given {self.count} rows, but {type(module).__name__} got an input of shape {tuple(x.shape)}, "
                f"whose first axis is no multiple of {self.count}; give one name a row of the batch"
            )
        return x.shape[0] // self.count


def set_routes(state: ModelState, rows: list[tuple[str, ...]]) -> None:
    """Give every host its route for these rows.

    Raises:
        Unsupported: an adapter acts by substitution, where rows of a batch cannot be told apart.
    """
    routes = {path: _route(module, rows) for path, module in state.hosts.items()}
    for path, route in routes.items():
        host(state.hosts[path]).route = route


def clear_routes(state: ModelState) -> None:
    """Take the routes away."""
    for module in state.hosts.values():
        host(module).route = None


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
            _fill(family, [chains[row] for row in distinct])
            family.index = torch.tensor([distinct.index(rows[n]) for n in numbers], device=device)
        families.append(family)
    order = torch.cat([family.rows for family in families]).argsort()
    acting = [a for family in families if family.run is not None for a in family.run.template.outputs]
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


def _fill(family: Family, chains: list[Chain]) -> None:
    """Template and stacked parameters of a family from its distinct chains."""
    runs = [_Run(_template(chain)) for chain in chains]
    tensors = [dict((*run.named_parameters(), *run.named_buffers())) for run in runs]
    family.run = runs[0]
    family.stacked = {key: torch.stack([each[key] for each in tensors]) for key in tensors[0]}


def _template(chain: Chain) -> Host:
    """A host outside the model that holds one chain alone, all of it acting."""
    template = Host()
    for position, adapter in enumerate(chain):
        template.put(str(position), adapter.site.slot, adapter)
    template.refresh(tuple(str(position) for position in range(len(chain))))
    return template
