"""SPT: the budget goes where the loss is sensitive, as LoRA where much of a matrix is and as single entries elsewhere.

Sensitivity of an entry: the sum over sample batches of its squared gradient. The ``tau`` most sensitive entries of all places
together are counted place by place. A matrix with ``c >= r (in + out) / divisor`` of them gets a low-rank update ``B A``
(``A`` (r, in) Kaiming-uniform, ``B`` (out, r) at zero, no scale); otherwise its c entries get deltas ``d`` (c,) at zero. A bias or
norm vector learns whole if ``c >= length / vector_divisor``, else in its c entries. Training starts at the base. Without ``tau``,
the one is taken whose number of trainable parameters is nearest to ``budget``.
Source: arXiv 2303.08566, Sec. 3 (SPT-LoRA; there divisor 1, in the released code 10). Trainable: as chosen, summed over places.
Saved for backward: ``x`` alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core.contracts import MethodConfig, Reparameterization, Span
from trimtab.core.errors import ShapeMismatch, Unsupported
from trimtab.core.registry import method
from trimtab.core.site import Operation, Site
from trimtab.kernels.entries import added, entries
from trimtab.kernels.lowrank import low_rank
from trimtab.kernels.ranking import Top, bisect, most
from trimtab.methods.reparameterized.lora import start_bound

__all__ = ["SPT", "SPTAdapter"]


@dataclass(frozen=True)
class SPT(MethodConfig):
    """Parameters placed by sensitivity: LoRA in some matrices, single entries in others; needs ``tt.attach(..., loss=...)``.

    The loss yields one scalar a batch (the paper: 16 batches of 32). Not without sample data of the task, nor to serve several
    adapters in one batch, which vectors that learn rule out. A matrix so small that LoRA would cost more than its entries
    always gets entries.

    Args:
        budget: trainable parameters wanted: a number, or, below 1, a share of the places' weights.
        tau: how many entries count as sensitive, likewise, rounded up; None: found from the budget.
        rank: r of the low-rank updates.
        divisor: a matrix gets LoRA from ``r (in + out) / divisor`` sensitive entries on; at least 1.
        vector_divisor: a vector learns whole from ``length / vector_divisor`` of them on; at least 1.
        dropout: probability of zeroing an entry of a low-rank branch's input while training (the paper: 0.1).
    """

    search = {"budget": Span(0.0005, 0.02, log=True), "rank": (2, 4, 8, 16)}
    learning_rate = Span(1e-4, 1e-2, log=True)

    budget: float = 0.005
    tau: float | None = None
    rank: int = 8
    divisor: float = 10.0
    vector_divisor: float = 5.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        self.require_rank(self.rank)
        self.require_probability("dropout", self.dropout)
        self.require(self.budget > 0, f"budget must be above 0, found {self.budget!r}")
        self.require(self.tau is None or self.tau > 0, f"tau must be None or above 0, found {self.tau!r}")
        for name in ("divisor", "vector_divisor"):
            self.require(getattr(self, name) >= 1, f"{name} must be at least 1, found {getattr(self, name)!r}")

    def is_structured(self, shape: Sequence[int], count: int) -> bool:
        """Whether a tensor of this shape with ``count`` sensitive entries learns by LoRA (a matrix) or whole (a vector)."""
        if len(shape) == 1:
            return count >= shape[0] / self.vector_divisor
        cost = self.rank * sum(shape)
        return cost < math.prod(shape) and count >= cost / self.divisor

    def cost(self, shape: Sequence[int], count: int) -> int:
        """Trainable parameters of that tensor."""
        if not self.is_structured(shape, count):
            return count
        return shape[0] if len(shape) == 1 else self.rank * sum(shape)


@dataclass(frozen=True)
class _Allocation:
    """What each site of a cohort gets; ``top`` is None where gradients are not known (a plan)."""

    counts: dict[str, int]
    positions: dict[str, int]
    top: Top | None


def _amount(value: float, total: int) -> int:
    return math.ceil(value * total) if value < 1 else math.ceil(value)


def _allocate(config: SPT, sites: Sequence[Site], scores: Sequence[Tensor] | None) -> _Allocation:
    """Counts of sensitive entries for all sites of one attach."""
    shapes = [site.shape for site in sites]
    sizes = [math.prod(shape) for shape in shapes]
    total = sum if config.tau is not None else lambda counts: sum(map(config.cost, shapes, counts))
    wanted = _amount(config.budget if config.tau is None else config.tau, sum(sizes))
    fits = lambda counts: total(counts) <= wanted  # noqa: E731
    if scores is None:
        top, counts = None, _guess(sizes, fits)
    else:
        top = min(most(scores, fits), key=lambda choice: abs(total(choice.counts) - wanted))
        counts = top.counts
    names = [site.name for site in sites]
    return _Allocation(dict(zip(names, counts, strict=True)), {name: i for i, name in enumerate(names)}, top)


def _guess(sizes: Sequence[int], fits: Callable[[Sequence[int]], bool]) -> list[int]:
    """Counts for a plan without gradients: a density that grows from place to place, so that not all cross a threshold at once."""
    weights = [size * (i + 1) for i, size in enumerate(sizes)]
    counts = lambda n: [min(size, n * w // sum(weights)) for size, w in zip(sizes, weights, strict=True)]  # noqa: E731
    return counts(bisect(0, sum(weights), lambda n: fits(counts(n))))


@method(
    SPT,
    paper="arXiv:2303.08566 Sec. 3",
    tests=({"tau": 60.0, "rank": 1, "divisor": 2.0}, {"budget": 0.3, "rank": 1, "divisor": 1.0}),
)
class SPTAdapter(Reparameterization):
    """``a`` (r, in) and ``b`` (out, r), or ``d`` (c,) at the buffer ``index`` (c,) of the flattened tensor; nothing if c = 0."""

    targets = "linear | norm"
    tensors = ("weight", "bias")
    kinds = frozenset({"linear", "conv", "grouped", "embedding", "bare", "vector"})
    fast = frozenset({"linear", "conv", "embedding"})
    needs_weight = False
    needs_gradient = True
    gradient_power = 2

    def __init__(self, config: SPT, site: Site, *, rng: torch.Generator):
        super().__init__(config, site)
        for name in ("a", "b", "d"):
            self.register_parameter(name, None)
        index = self._index()
        if index is None:
            out, fan_in = site.shape
            self.a = self.uniform(config.rank, fan_in, bound=start_bound(site), rng=rng)
            self.b = self.zeros(out, config.rank)
            return
        small = math.prod(site.shape) <= torch.iinfo(torch.int32).max
        self.register_buffer("index", index.to(site.device, torch.int32 if small else torch.int64))
        if len(index):
            self.d = self.zeros(len(index))

    @classmethod
    def check(cls, config: SPT, site: Site) -> None:
        if len(site.shape) > 2:
            raise Unsupported(
                f"{site.name} is a bank of {site.shape[0]} matrices, to which SPT cannot give different shapes; "
                "target the linear layers"
            )
        sites = site.cohort.sites or [site]
        total, name = sum(math.prod(s.shape) for s in sites), "budget" if config.tau is None else "tau"
        wanted = getattr(config, name)
        if site is sites[0] and wanted > total:
            raise ShapeMismatch(
                f"{name}={wanted} is more than the {total} weights of the {len(sites)} targeted places; use at most {total}"
            )

    def _index(self) -> Tensor | None:
        """Where single entries learn; None for a low-rank update. What is saved decides, else the gradients, else a guess."""
        config, site = self.config, self.site
        if site.stored:
            return None if "b" in site.stored else torch.empty(site.stored["index"], dtype=torch.int64, device="meta")
        sites, known = site.cohort.sites or [site], site.gradient is not None
        scores = [s.gradient for s in sites] if known else None
        found: _Allocation = site.cohort.share(("SPT", known), lambda: _allocate(config, sites, scores))  # type: ignore[assignment]
        count = found.counts[site.name]
        if config.is_structured(site.shape, count):
            return None if len(site.shape) == 2 else torch.arange(site.shape[0])
        if found.top is None:
            return torch.empty(count, dtype=torch.int64, device="meta")
        return found.top.index(site.gradient, found.positions[site.name])

    def weight(self, W: Tensor) -> Tensor:
        if self.b is not None:
            return W + self.b @ self.a
        return W if self.d is None else added(W, self.index.long(), self.d)

    def forward(self, x: Tensor, base: Operation) -> Tensor:
        if self.b is not None:
            return low_rank(x, base, self.a, self.b, dropout=self.config.dropout * self.training)
        if self.d is None:
            return base(x)
        if base.kind == "linear":
            return entries(x, base, self.index.long, self.d)
        return base.apply(x, self.weight(base.weight))

    def factors(self) -> tuple[Tensor, Tensor] | None:
        return None if self.b is None else (self.b, self.a)
