"""One adapter a row: rows with adapters of one family (method and shapes) run as one batched operation.

The parameters of a family's adapters are stacked once when the context is entered; inside, a row's parameters are
gathered by an index tensor and the method's own forward is mapped over rows with ``torch.vmap``. So the number of
operations depends on the number of families in the batch, not on the number of adapters.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from trimtab.core.contracts import ActivationAdapter, Adapter
from trimtab.core.errors import Unsupported
from trimtab.core.host import Host
from trimtab.core.state import ModelState, host

__all__ = ["clear_routes", "set_routes"]

Chain = tuple[Adapter, ...]


class _Run(nn.Module):
    """A row's adapters as a forward, so that ``functional_call`` can give them a row's parameters."""

    def __init__(self, template: Host, module: nn.Module):
        super().__init__()
        self.chain = nn.ModuleList([*template.whole, *(a for part in template.parts for a in part), *template.outputs])
        # plain attributes: the host and the base module stay out of this module's tree
        object.__setattr__(self, "template", template)
        object.__setattr__(self, "module", module)

    def forward(self, args: tuple, kwargs: dict) -> Tensor:
        return self.template.run(self.module, args, kwargs)


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


@dataclass
class Route:
    """How one module treats the batch's rows."""

    count: int
    families: list[Family]
    order: Tensor

    def run(self, host: Host, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """The module's output, each row through its own adapters."""
        base = module._trimtab_base.forward
        if len(self.families) == 1 and self.families[0].run is None:
            return base(module, *args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()))
        per_row = self._per_row(x, module)
        grouped = x.reshape(self.count, per_row, *x.shape[1:])  # (rows, items of a row, ...)
        rest, keys = args[1:], list(kwargs)
        parts = []
        for family in self.families:
            xs = grouped.index_select(0, family.rows)
            if family.run is None:
                flat = xs.flatten(0, 1)
                call = ((flat, *rest), kwargs) if args else ((), {**kwargs, keys[0]: flat})
                y = base(module, *call[0], **call[1])
                parts.append(y.reshape(xs.shape[0], per_row, *y.shape[1:]))
                continue
            tensors = {key: value.index_select(0, family.index) for key, value in family.stacked.items()}

            def one(row_tensors: dict[str, Tensor], row: Tensor, family: Family = family) -> Tensor:
                call = ((row, *rest), kwargs) if args else ((), {**kwargs, keys[0]: row})
                return functional_call(family.run, row_tensors, call)

            parts.append(torch.vmap(one, randomness="different")(tensors, xs))
        y = torch.cat(parts).index_select(0, self.order)
        return y.flatten(0, 1)

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
        Unsupported: an adapter acts by substitution or on tokens, where rows of a batch cannot be told apart.
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
        chains[row] = tuple(a for name in names for a in here.adapters(name))
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    buckets: dict[Any, list[int]] = {}
    for number, row in enumerate(rows):
        buckets.setdefault(_signature(chains[row]), []).append(number)
    families = []
    for signature, numbers in buckets.items():
        family = Family(torch.tensor(numbers, device=device))
        if signature:
            distinct = list(dict.fromkeys(rows[n] for n in numbers))
            _fill(family, module, [chains[row] for row in distinct])
            family.index = torch.tensor([distinct.index(rows[n]) for n in numbers], device=device)
        families.append(family)
    order = torch.cat([family.rows for family in families]).argsort()
    return Route(len(rows), families, order)


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
            tuple((k, v.shape, v.dtype) for k, v in (*a.named_parameters(), *a.named_buffers())),
        )
        for a in chain
    )


def _fill(family: Family, module: nn.Module, chains: list[Chain]) -> None:
    """Template and stacked parameters of a family from its distinct chains."""
    runs = [_Run(_template(chain), module) for chain in chains]
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
