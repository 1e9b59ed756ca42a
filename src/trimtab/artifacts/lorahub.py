"""Weights of a merge found without gradients, from a few examples of a new task.

Minimises ``loss(model with W + sum_i w_i D_i) + penalty mean |w_i|`` over w in a box, from w = 0. Source: LoraHub, arXiv
2307.13269, Sec. 2.3: its budget, bounds and penalty. There the factors A and B are summed apart, so that one adapter at w acts as
w^2 and its sign is lost; here the updates are summed, any methods together, and the result is what ``tt.combine`` stores exactly.
The search is CMA-ES (``kernels/cma.py``) in the place of nevergrad's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from trimtab.artifacts.base import LiveBase
from trimtab.artifacts.combine import check_weights, common_base
from trimtab.artifacts.rules import rule_entry
from trimtab.artifacts.saved import open_saved
from trimtab.artifacts.updates import key_of, put_effect
from trimtab.core.attach import mount_group, remove_group
from trimtab.core.contracts import ActivationAdapter, Adapter, MethodConfig, Reparameterization, TokenAdapter
from trimtab.core.errors import NotMergeable, ShapeMismatch, TrimtabError, raise_all
from trimtab.core.site import Operation, Site
from trimtab.core.state import ATTRIBUTE, state_of, unwrap
from trimtab.core.table import Table
from trimtab.kernels.cma import minimise
from trimtab.kernels.lowrank import low_rank

__all__ = ["FoundWeights", "search_weights"]


@dataclass(frozen=True)
class FoundWeights:
    """What a search found.

    Attributes:
        weights: one an adapter, in the order given; for ``tt.combine(..., weights=found.weights)``.
        loss: of them, without the penalty.
        start: the loss of the base alone.
        trials: a row an evaluation: weights, loss, objective.
    """

    weights: list[float]
    loss: float
    start: float
    trials: Table


def search_weights(
    model: nn.Module,
    adapters: Sequence[str | os.PathLike],
    loss: Callable[[nn.Module], Tensor | float],
    *,
    budget: int = 40,
    bounds: tuple[float, float] = (-1.5, 1.5),
    penalty: float = 0.05,
    rng: Generator | None = None,
) -> FoundWeights:
    """Search the weights with which saved adapters together do best on a few examples; the model is left as it was.

    Args:
        model: the base, in memory; adapters that act on it do not act meanwhile.
        loss: model -> its mean loss on the examples, as a number or a tensor of one; called ``budget`` times without gradients.
        budget: evaluations; the first is the base alone (all weights zero).
        bounds: of every weight.
        penalty: times the mean absolute weight, added to the loss.
        rng: source of the samples; None: seed 0.

    Raises:
        ShapeMismatch: no adapter, or a budget or bounds that leave nothing to search. NotMergeable: something that is no update
        of a weight. CheckpointMismatch, NoMatch: the adapters are damaged or do not fit the model.
    """
    adapters = [adapters] if isinstance(adapters, str | os.PathLike) else list(adapters)
    check_weights(adapters, None, rule_entry("linear"))
    if budget < 1 or not bounds[0] <= 0 <= bounds[1] or bounds[0] == bounds[1]:
        raise ShapeMismatch(f"a search needs a budget of at least 1 and bounds around 0; found {budget} and {bounds}")
    root = unwrap(model)
    opened = [open_saved(path, LiveBase(root)) for path in adapters]
    common_base(opened)
    weights = torch.zeros(len(opened), dtype=torch.float64)
    mixtures = _mixtures([saved.adapters for saved in opened], [saved.source for saved in opened], weights)
    trials = Table(("weights", "loss", "objective"))

    def objective(point: Tensor) -> float:
        weights.copy_(point)
        with torch.no_grad():
            value = float(loss(model))
        trials.add([round(w, 6) for w in point.tolist()], value, value + penalty * point.abs().mean().item())
        return trials.rows[-1][-1]

    name, before, training = _mount(root, mixtures), state_of(root).active, model.training
    state_of(root).active = (name,)
    state_of(root).refresh()
    try:
        model.eval()
        start = torch.zeros_like(weights)
        rng = torch.Generator().manual_seed(0) if rng is None else rng
        best, _ = minimise(objective, start, sigma=(bounds[1] - bounds[0]) / 6, bounds=bounds, budget=budget, rng=rng)
    finally:
        model.train(training)
        remove_group(root, name)
        if ATTRIBUTE in root.__dict__:
            state_of(root).active = tuple(other for other in before if other in state_of(root).groups)
            state_of(root).refresh()
    row = min(trials.rows, key=lambda row: row[2])
    return FoundWeights(best.tolist(), row[1], trials.rows[0][1], trials)


def _mount(root: nn.Module, mixtures: list[Adapter]) -> str:
    """Put the mixtures on the model under a name that is not taken; they do not act yet."""
    state = root.__dict__.get(ATTRIBUTE)
    name = "search"
    while state is not None and name in state.groups:
        name += "'"
    mount_group(root, name, mixtures, trainable=False)
    return name


def _mixtures(adapters: Sequence[Sequence[Adapter]], sources: Sequence[str], weights: Tensor) -> list[Adapter]:
    """One mixture a place."""
    problems: list[TrimtabError] = []
    places: dict[tuple[str, str, str | None], list[tuple[int, Any]]] = {}
    for number, (mine, source) in enumerate(zip(adapters, sources, strict=True)):
        for adapter in mine:
            if isinstance(adapter, TokenAdapter | ActivationAdapter):
                what = f"{type(adapter.config).__name__} at {adapter.site.path}"
                problems.append(NotMergeable(f"{source}: {what} acts on activations and is no update of a weight"))
            put_effect(places.setdefault(key_of(adapter.site), []), number, adapter)
    raise_all(problems)
    made = []
    for members in places.values():
        thin = all(isinstance(a, Reparameterization) and a.factors() is not None and a.site.kind != "bare" for _, a in members)
        made.append((_ThinMixture if thin else _Mixture)(_Config(), members[0][1].site, members, weights))
    return made


class _Mixture(Reparameterization):
    """``W' = W + sum_i w_i (W_i - W)``, and the bias likewise."""

    additive = False

    def __init__(self, config: MethodConfig, site: Site, members: list[tuple[int, Adapter]], weights: Tensor):
        super().__init__(config, site)
        self.members, self.weights = members, weights  # neither is the module's own: nothing of it is ever saved
        self.rebias = any(getattr(adapter, "rebias", False) for _, adapter in members)

    def weight(self, W: Tensor) -> Tensor:
        return W + sum(self.weights[number].item() * (adapter.weight(W) - W) for number, adapter in self.members)

    def bias(self, b: Tensor | None) -> Tensor | None:
        changed = [(n, a.bias(b)) for n, a in self.members if getattr(a, "rebias", False)]
        start = b if b is not None else next((torch.zeros_like(new) for _, new in changed if new is not None), None)
        return (
            start if start is None else start + sum(self.weights[n].item() * (new - start) for n, new in changed if new is not None)
        )


class _ThinMixture(_Mixture):
    """The same where all are factors: one low-rank branch whose columns the weights scale."""

    fast = frozenset({"linear", "conv", "embedding"})

    def __init__(self, config: MethodConfig, site: Site, members: list[tuple[int, Adapter]], weights: Tensor):
        super().__init__(config, site, members, weights)
        pairs: list[Any] = [adapter.factors() for _, adapter in members]
        self.b, self.a = torch.cat([b for b, _ in pairs], 1), torch.cat([a for _, a in pairs])
        self.columns = torch.cat([torch.full((b.shape[1],), n) for (n, _), (b, _) in zip(members, pairs, strict=True)])

    def forward(self, x: Tensor, base: Operation) -> Tensor:
        return low_rank(x, base, self.a, self.b * self.weights[self.columns].to(self.b), scale=1.0)


class _Config(MethodConfig):
    """Says what a mixture is; nobody writes it."""

    adapter_class = _Mixture
