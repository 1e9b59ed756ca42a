"""S2FT: whole attention heads and feed-forward channels learn, as slices of the frozen matrices that belong to them.

With ``index`` (k,) chosen once, and ``d`` zero at the start, so that training starts at the base::

    inputs  (attn.o, mlp.down):          W'[:, index] = W[:, index] + d^T      d (k, out)
    outputs (attn.q/k/v, mlp.up/gate):   W'[index, :] = W[index, :] + d        d (k, in)

It equals fine-tuning of the slice with everything else masked, for Adam without weight decay; decay acts on the change. The
base is never written: gathering k columns costs less than a percent of the product, keeps the start equal to the base to the
bit, works for grouped queries, biases and fused matrices, and lets adapters with other indices share one base, where the
paper permutes the model until the slice is contiguous. Units: an attention head (q and o: query heads, k and v: key-value
heads), a channel of the feed-forward, elsewhere one input or output. Source: arXiv 2412.06289, Sec. 3.
Trainable: ``k out`` or ``k in``. Saved for backward: the k columns of ``x``, (tokens, k); outputs: ``x``. As a LoRA: exact, of
rank k, with one factor of unit vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from trimtab.core.contracts import MethodConfig, Reparameterization, Span
from trimtab.core.errors import ShapeMismatch, Unsupported
from trimtab.core.registry import method
from trimtab.core.site import Operation, Site
from trimtab.kernels.beside import beside
from trimtab.kernels.slices import Columns, Rows, kept_anyway, picked

__all__ = ["S2FT", "S2FTAdapter"]

#: the share that learns where nothing is said
USUAL = 0.03
STRATEGIES = ("random", "weight", "activation", "product", "gradient")
INPUTS = ("attn.o", "mlp.down")  # where the slice stands along the inputs, by role
COUPLED = {"attn": ("attn.q", "attn.k", "attn.v", "attn.o"), "mlp": ("mlp.up", "mlp.gate", "mlp.gate_up", "mlp.down")}


@dataclass(frozen=True)
class S2FT(MethodConfig):
    """A few heads and channels learn entirely; hardly any activation is kept, and the finished slice is a small adapter.

    Not where what must change is spread over all channels of a few directions: an update of equal size is then better as LoRA.
    Not for convolutions with large kernels, of which it takes single taps.

    Args:
        ratio: share of the units that learn, over all places of one role together (``pool="model"``) or at each. None: 0.03,
            one unit at least.
        units: how many at each place, instead of a ratio.
        strategy: how they are chosen: ``random``; by the norm of the slice (``weight``), the root mean square of what flows
            through it (``activation``), their ``product``, or the norm of its ``gradient``; the last three need
            ``tt.attach(..., loss=...)``.
        order: take the ``smallest`` scores or the ``largest``.
        pool: ``"model"``: draw from all places of a role together, so that places get different numbers, as the authors do;
            ``"layer"``: the same number at each; None: the model if random, else the layer, since scores do not compare.
        coupled: q, k, v and o of a block get the same heads (whole key-value groups), up, gate and down the same channels.
        side: ``inputs``, ``outputs``, or ``auto``: by the place's role, outputs where it has none.
    """

    search = {"ratio": Span(0.005, 0.1, log=True), "strategy": ("random", "weight")}
    learning_rate = Span(5e-5, 5e-3, log=True)

    ratio: float | None = None
    units: int | None = None
    strategy: str = "random"
    order: str = "smallest"
    pool: str | None = None
    coupled: bool = False
    side: str = "auto"

    def __post_init__(self) -> None:
        self.require(self.ratio is None or 0 < self.ratio <= 1, f"ratio must be above 0 and at most 1, found {self.ratio!r}")
        self.require_count("units", optional=True)
        self.require_choice("strategy", STRATEGIES)
        self.require_choice("order", ("smallest", "largest"))
        self.require_choice("side", ("auto", "inputs", "outputs"))
        self.require(self.pool in (None, "model", "layer"), f'pool must be None, "model" or "layer", found {self.pool!r}')
        alone = self.units is not None or self.coupled or self.strategy != "random"
        self.require(not (alone and self.pool == "model"), "units, coupled and scores are a place's own: pool must be the layer")
        if self.pool is None:
            object.__setattr__(self, "pool", "layer" if alone else "model")

    def on_inputs(self, site: Site) -> bool:
        """Whether the slice at ``site`` stands along the inputs."""
        return site.role in INPUTS if self.side == "auto" else self.side == "inputs"

    def count(self, units: int) -> int:
        """How many of ``units`` learn."""
        if self.units is not None:
            return self.units
        return max(1, int(USUAL * units)) if self.ratio is None else int(self.ratio * units)

    def partners(self, site: Site) -> list[Site]:
        """The sites that get the same units as ``site``, itself among them; the one whose scores decide first."""
        roles = next((group for group in COUPLED.values() if site.role in group), ())
        if not (self.coupled and roles):
            return [site]
        found = [s for s in site.cohort.sites if s.block == site.block and s.role in roles] or [site]
        return sorted(found, key=lambda s: s.role not in INPUTS)

    def layout(self, site: Site) -> tuple[int, int, int]:
        """``(units, size, repeats)``: a unit is ``size`` neighbours, ``repeats`` times at equal distances (fused gate and up)."""
        width = site.shape[-1 if self.on_inputs(site) else -2]
        if site.role == "mlp.gate_up":
            return width // 2, 1, 2
        partners = self.partners(site)
        if site.role in COUPLED["attn"] and site.head_size:
            heads = [s.shape[-1 if self.on_inputs(s) else -2] // site.head_size for s in partners]
            return min(heads), width // min(heads), 1
        return width, 1, 1


def _scores(config: S2FT, site: Site) -> Tensor:
    """One score a unit of ``site``."""
    inputs = config.on_inputs(site)
    units, size, repeats = config.layout(site)
    norms = lambda M: torch.linalg.vector_norm(M.detach().double().cpu(), dim=-2 if inputs else -1)  # noqa: E731
    flow = None if site.activation is None else site.activation[0 if inputs else 1].double()
    by = {
        "weight": lambda: norms(site.weight),
        "gradient": lambda: norms(site.gradient),
        "activation": lambda: flow,
        "product": lambda: flow * norms(site.weight),
    }[config.strategy]()
    return by.view(repeats, units, size).square().sum((0, 2)).sqrt()


def _drawn(config: S2FT, sites: Sequence[Site], rng: Generator) -> dict[str, Tensor]:
    """Units of every site, drawn from all of them together without replacement."""
    sizes = [config.layout(site)[0] for site in sites]
    flat = torch.randperm(sum(sizes), generator=rng)[: config.count(sum(sizes))].sort().values
    ends = torch.tensor(sizes).cumsum(0)
    owner = torch.searchsorted(ends, flat, right=True)
    return {site.name: flat[owner == i] - (ends[i] - sizes[i]) for i, site in enumerate(sites)}


@method(
    S2FT,
    paper="arXiv:2412.06289 Sec. 3",
    tests=(
        {"units": 3, "side": "inputs"},
        {"units": 2, "side": "outputs", "strategy": "weight"},
        {"ratio": 0.3, "strategy": "gradient", "order": "largest"},
        {"units": 2, "side": "inputs", "strategy": "product"},
    ),
)
class S2FTAdapter(Reparameterization):
    """``d`` (k, out) or (k, in) at the buffer ``index`` (k,); none of it where a draw from the model left a place out."""

    targets = "attn.o | mlp.down"
    fast = frozenset({"linear"})
    needs_weight = False

    def __init__(self, config: S2FT, site: Site, *, rng: Generator):
        super().__init__(config, site)
        self.inputs = config.on_inputs(site)
        index = torch.empty(site.stored["index"]) if site.stored else self._index(rng)
        self.register_buffer("index", index.to(site.device, torch.int32))
        self.register_parameter("d", self.zeros(len(index), site.shape[-2 if self.inputs else -1]) if len(index) else None)

    @classmethod
    def wants(cls, config: S2FT) -> str | None:
        return {"gradient": "gradient", "activation": "activation", "product": "activation"}.get(config.strategy)

    @classmethod
    def check(cls, config: S2FT, site: Site) -> None:
        if cls.wants(config) == "activation" and site.kind != "linear":
            raise Unsupported(f"activations are measured at linear layers, and {site.name} is none; use another strategy")
        units, size, repeats = config.layout(site)
        width = site.shape[-1 if config.on_inputs(site) else -2]
        if units * size * repeats != width:
            raise ShapeMismatch(f"the {width} channels of {site.name} are no multiple of its head size {site.head_size}")
        peers = cls._pool(config, site)
        total = sum(config.layout(s)[0] for s in peers)
        count = config.count(total)
        if not 1 <= count <= total:
            raise ShapeMismatch(
                f"{config} takes {count} of the {total} units of {site.name}" + ", and its likes" * (len(peers) > 1)
                + f"; choose a ratio of at least 1/{total}, or units from 1 to {total}"
            )  # fmt: skip

    @staticmethod
    def _pool(config: S2FT, site: Site) -> list[Site]:
        """The sites that ``site``'s units are drawn with."""
        bank = len(site.shape) == 3 or not any(s.name == site.name for s in site.cohort.sites)  # its experts draw by themselves
        alone = config.pool == "layer" or bank
        return [site] if alone else [s for s in site.cohort.sites if s.role == site.role and len(s.shape) == 2]

    def _index(self, rng: Generator) -> Tensor:
        """(k,) inputs or outputs, ascending."""
        config, site = self.config, self.site
        peers, partners = self._pool(config, site), config.partners(site)
        units, size, repeats = config.layout(site)
        share: Callable = site.cohort.share if len(peers) > 1 or len(partners) > 1 else lambda key, make: make()
        if len(peers) > 1:
            chosen = share(("S2FT", site.role, site.is_meta), lambda: _drawn(config, peers, rng))[site.name]
        elif config.strategy == "random" or site.is_meta:
            draw = lambda: torch.randperm(units, generator=rng)[: config.count(units)]  # noqa: E731
            chosen = share(("S2FT", site.block, partners[0].name, site.is_meta), draw)
        else:
            chosen = _scores(config, partners[0]).argsort(descending=config.order == "largest", stable=True)[: config.count(units)]
        whole = chosen[:, None] * size + torch.arange(size)
        return torch.cat([whole.flatten() + i * units * size for i in range(repeats)]).sort().values

    def weight(self, W: Tensor) -> Tensor:
        if self.d is None:
            return W
        wide = W.to(torch.promote_types(W.dtype, self.d.dtype))
        return wide.index_add(-1, self.index, self.d.t()) if self.inputs else wide.index_add(-2, self.index, self.d)

    def forward(self, x: Tensor, base: Operation) -> Tensor:
        if self.d is None:
            return base(x)
        if self.inputs:
            return beside(Columns(self.index, whole=kept_anyway(x)), x, base, self.d)
        return beside(Rows(self.index, base.out_features), x, base, self.d)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        if self.d is None:
            return None
        units = picked(self.index, self.site.shape[-1 if self.inputs else -2], self.d.dtype)
        return (self.d.t(), units) if self.inputs else (units.t(), self.d)
