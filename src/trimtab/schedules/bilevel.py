"""SNELLA's bi-level competition: places compete for a shrinking budget of entries, entries compete inside their place.

A place's score is the sum over its factors of the mean importance (schedules/importance.py). At step i of T, between warm-up
w_i and final phase w_f, ``n(i) = floor(n1 + (n0 - n1) (1 - (i - w_i) / (T - w_f - w_i))^3)`` entries may differ from zero; they
are given out in proportion to the scores, no place more than it has. Inside a place its threshold does the rest, at every
forward. Source: arXiv 2510.24037 and its code; the score is AdaLoRA's (arXiv 2303.10512, Eqs. 8-10).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from trimtab.core.errors import Unsupported
from trimtab.methods.reparameterized.snella import SNELLAAdapter
from trimtab.schedules.contract import Schedule
from trimtab.schedules.importance import Importance, check_betas
from trimtab.schedules.registry import schedule

__all__ = ["BilevelCompetition", "cubic_budget", "fill"]


def cubic_budget(step: int, steps: int, warmup: int, final: int, first: int, last: int) -> int:
    """The budget at ``step``: ``first`` through the warm-up, ``last`` in the final phase, a cubic between."""
    if step <= warmup:
        return first
    if step > steps - final:
        return last
    left = 1 - (step - warmup) / (steps - final - warmup)
    return math.floor(last + (first - last) * left**3)


def fill(scores: Sequence[float], capacities: Sequence[int], budget: int) -> list[int]:
    """Whole numbers that add up to ``min(budget, sum(capacities))``, in proportion to ``scores``, none above its capacity.

    Water filling, and units that rounding leaves over go where ``(given + 1) / score`` is least; no share shrinks as the budget
    grows. Places of score zero share equally what is left when the others are full.

    Raises:
        ValueError: a negative or non-finite score, a negative capacity or budget.
    """
    if any(not math.isfinite(q) or q < 0 for q in scores) or any(c < 0 for c in capacities) or budget < 0:
        raise ValueError("scores must be finite and at least 0, capacities and the budget at least 0")
    given = [0] * len(scores)
    for zero in (False, True):
        group = [i for i, q in enumerate(scores) if (q == 0) is zero]
        shares = [1.0 if zero else scores[i] for i in group]
        taken = _proportional(shares, [capacities[i] for i in group], budget - sum(given))
        for i, k in zip(group, taken, strict=True):
            given[i] = k
    return given


def _proportional(shares: Sequence[float], capacities: Sequence[int], budget: int) -> list[int]:
    """``fill`` for scores above zero."""
    budget = min(budget, sum(capacities))
    level, left, weight = 0.0, float(budget), math.fsum(shares)
    for i in sorted(range(len(shares)), key=lambda i: capacities[i] / shares[i]):
        level = left / weight if weight > 0 else level
        if level * shares[i] < capacities[i]:
            break
        left, weight = left - capacities[i], weight - shares[i]
    given = [min(c, math.floor(level * q)) for c, q in zip(capacities, shares, strict=True)]
    while sum(given) > budget:  # a floor that rounding of ``level`` lifted
        most = max((i for i in range(len(given)) if given[i]), key=lambda i: given[i] / shares[i])
        given[most] -= 1
    while sum(given) < budget:
        open_ = (i for i in range(len(given)) if given[i] < capacities[i])
        given[min(open_, key=lambda i: (given[i] + 1) / shares[i])] += 1
    return given


@schedule(paper="arXiv:2510.24037", tests=({"target": 0.5},))
class BilevelCompetition(Schedule):
    """The schedule of SNELLA: from its nearly dense start to ``target``, place by place.

    Not for ``tt.SNELLA(dense=True)``, where no entry competes.

    Args:
        target: the share of entries that are zero at the end, over all places together.
        warmup: steps before the budget shrinks.
        final: last steps, with the budget at its target.
        interval: give the budget out every so many steps, and at the last.
        betas: decays of the two moving averages.
        metric: ``"sensitivity"``: ``|theta grad|``; ``"magnitude"``: ``|theta|``.

    Raises:
        ValueError: a number out of its range.
    """

    owns = frozenset({"rank"})
    needs_steps = True

    def __init__(self, target: float = 0.9, *, warmup: int = 0, final: int = 0, interval: int = 1,
                 betas: tuple[float, float] = (0.85, 0.85), metric: str = "sensitivity"):  # fmt: skip
        if not 0 <= target < 1:
            raise ValueError(f"the target sparsity must be at least 0 and below 1, found {target!r}")
        if warmup < 0 or final < 0 or interval < 1:
            raise ValueError(f"warmup and final must be at least 0, interval at least 1; found {warmup}, {final}, {interval}")
        check_betas(betas)
        if metric not in ("sensitivity", "magnitude"):
            raise ValueError(f"metric must be 'sensitivity' or 'magnitude', found {metric!r}")
        self.target, self.warmup, self.final, self.interval = target, warmup, final, interval
        self.betas, self.metric = betas, metric

    def start(self, model: nn.Module, *, steps: int) -> None:
        """Find the places that compete.

        Raises:
            Unsupported: the model has no SNELLA adapter that competes.
            ValueError: the phases do not fit in ``steps``, or the target is below the sparsity at the start.
        """
        super().start(model, steps=steps)
        self.places = {name: m for name, m in model.named_modules() if isinstance(m, SNELLAAdapter) and not m.config.dense}
        if not self.places:
            raise Unsupported("BilevelCompetition gives out the entries of SNELLA adapters; tt.attach(model, tt.SNELLA()) first")
        if steps <= self.warmup + self.final:
            raise ValueError(f"{steps} steps leave none between warmup={self.warmup} and final={self.final}")
        capacity = sum(place.capacity for place in self.places.values())
        self.first = sum(round((1 - place.config.sparsity) * place.capacity) for place in self.places.values())
        self.last = round((1 - self.target) * capacity)
        if self.last > self.first:
            raise ValueError(
                f"the target sparsity {self.target} is below the start's, {1 - self.first / capacity:.4g}: the budget would grow"
            )
        factors = {name: (place.a, place.b) for name, place in self.places.items()}
        self.importance = Importance(factors, self.betas, magnitude=self.metric == "magnitude")

    @torch.no_grad()
    def step_end(self) -> None:
        """Take the step's gradients into the scores, and give the budget out where it is due.

        Raises:
            Unsupported: the budget is due, and no step had finite gradients.
        """
        super().step_end()
        self.importance.observe()
        if self.step > self.warmup and (self.step % self.interval == 0 or self.step == self.steps):
            self.allocate(cubic_budget(self.step, self.steps, self.warmup, self.final, self.first, self.last))

    def scores(self) -> list[float]:
        """The scores of the places, in the model's order."""
        found = [self.importance.scores(name) for name in self.places]
        return torch.stack([sum(score.double().mean() for score in each) for each in found]).tolist()

    def allocate(self, budget: int) -> list[int]:
        """Give ``budget`` entries out by the scores so far; returns what each place got."""
        if not self.importance.seen:
            raise Unsupported(
                "the budget is due and no place has had a finite gradient yet; call step_end() after backward and before the "
                "gradients are cleared, or set warmup"
            )
        given = fill(self.scores(), [place.capacity for place in self.places.values()], budget)
        for place, k in zip(self.places.values(), given, strict=True):
            place.kept.fill_(k)
        return given

    def state_dict(self) -> dict[str, Any]:
        kept = {name: int(place.kept) for name, place in self.places.items()}
        return super().state_dict() | self.importance.state_dict() | {"kept": kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a stored state.

        Raises:
            ValueError: it is of other places.
        """
        self.importance.load_state_dict(state)
        super().load_state_dict(state)
        for name, place in self.places.items():
            place.kept.fill_(state["kept"][name])
