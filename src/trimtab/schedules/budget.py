"""AdaLoRA's budget: triplets of all places compete for a number of ranks that shrinks while training.

With ``b0`` ranks at the start and ``bT = target * places`` at the end, T steps in all, ``warmup`` ti and ``final`` tf: ``b(t) =
b0`` to step ti, ``floor(bT + (b0 - bT) (1 - (t - ti) / (T - tf - ti))^3)`` to step T - tf, and bT behind it. After every step
the importance of all parameters is taken in (schedules/importance.py); a triplet's score is that of its E and the means over
its row of Q and its column of P. Every ``interval`` steps the ``b0 - b(t)`` triplets of the lowest scores get E = 0. They keep
their gradients and may come back, until at step T - tf the choice is final. The penalty that keeps P and Q near orthonormal is
added as an extra loss. Source: arXiv 2303.10512, Algorithm 1 and Eqs. 4-10.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.errors import Unsupported
from trimtab.methods.reparameterized.adalora import AdaLoRA, AdaLoRAAdapter, orthogonality
from trimtab.schedules import optim
from trimtab.schedules.bilevel import cubic_budget
from trimtab.schedules.contract import Schedule
from trimtab.schedules.importance import Importance, check_betas
from trimtab.schedules.registry import schedule

__all__ = ["BudgetSchedule"]


@schedule(
    paper="arXiv:2303.10512",
    tests=({"target": 1, "final": 2}, {"target": 1, "warmup": 1, "interval": 2, "shrink": False}),
)
@dataclass(eq=False)
class BudgetSchedule(Schedule):
    """The schedule of AdaLoRA: ranks go where they matter, from the adapter's rank everywhere to ``target`` on average.

    Not for runs of a few hundred steps: scores need time, and pruned triplets more of it. Add no orthogonality penalty to the loss:
    this does it, by the config's ``penalty``.

    Args:
        target: ranks of a place at the end, on average over the places.
        warmup: steps before the budget shrinks.
        final: last steps, in which the choice of triplets is fixed.
        interval: choose every so many steps, and at step T - final.
        betas: decays of the two moving averages.
        shrink: cut the pruned triplets off, with the optimizer's state: in the final phase, and in what is delivered. Else
            they stay, as zeros.
    """

    owns: ClassVar[frozenset[str]] = frozenset({"rank"})
    needs_steps: ClassVar[bool] = True

    target: int = 8
    warmup: int = 0
    final: int = 0
    interval: int = 1
    betas: tuple[float, float] = (0.85, 0.85)
    shrink: bool = True

    def __post_init__(self) -> None:
        if self.target < 1 or self.warmup < 0 or self.final < 0 or self.interval < 1:
            raise ValueError(
                "target and interval must be at least 1, warmup and final at least 0; found "
                f"{self.target!r}, {self.interval!r}, {self.warmup!r}, {self.final!r}"
            )
        check_betas(self.betas)

    def start(self, model: nn.Module, *, steps: int | None) -> None:
        """Find the triplets.

        Raises:
            Unsupported: the model has no AdaLoRA adapter that learns, or one on a bank of experts. ValueError: the phases do not
                fit in ``steps``, or ``target`` is above the rank at the start.
        """
        super().start(model, steps=steps)
        named = [a for a in self.services.adapters() if isinstance(a.config, AdaLoRA)]
        bank = next((a for a in named if not isinstance(a, AdaLoRAAdapter)), None)
        if not named or bank is not None:
            why = "found none that learns" if bank is None else f"{bank.site.name} is a bank of experts, stacked in one tensor"
            raise Unsupported(f"BudgetSchedule gives out the ranks of AdaLoRA adapters, tt.attach(model, tt.AdaLoRA()); {why}")
        if self.warmup + self.final >= steps:
            raise ValueError(f"{steps} steps leave none between warmup={self.warmup} and final={self.final}")
        self.first, self.last = sum(a.config.rank for a in named), self.target * len(named)
        if self.last > self.first:
            raise ValueError(
                f"target={self.target} is above the adapters' rank at the start, {self.first / len(named):g} on average, and the "
                "budget would grow: attach tt.AdaLoRA with a higher rank"
            )
        self.places: dict[str, AdaLoRAAdapter] = {f"{a.site.path}.{a.site.slot}": a for a in named}
        self.importance = Importance({name: (a.e, a.q, a.p) for name, a in self.places.items()}, self.betas)
        #: place -> whether each triplet was chosen at step T - final; None before
        self.kept: dict[str, Tensor] | None = None
        self.cut = False

    @property
    def turning_point(self) -> int:
        """The step at which the choice is final: T - final."""
        return self.steps - self.final

    def budget(self, step: int) -> int:
        """Ranks of all places together at ``step``."""
        return cubic_budget(step, self.steps, self.warmup, self.final, self.first, self.last)

    def extra_loss(self) -> Tensor | None:
        """The orthogonality penalty."""
        return orthogonality(self.model) if any(a.config.penalty for a in self.places.values()) else None

    def step_begin(self) -> None:
        """In the final phase, cut off what is not kept."""
        if self.kept is not None and self.shrink and not self.cut and not self.services.ddp:
            self._cut()

    def _cut(self) -> None:
        for name, place in self.places.items():
            self.services.slice_rank(place, self.kept[name].nonzero()[:, 0])
        self.cut = True

    @torch.no_grad()
    def step_end(self) -> None:
        """Take the step into the scores, and choose where it is due."""
        super().step_end()
        if self.step < self.turning_point:
            self.importance.observe()
        if self.step == self.turning_point or (self.warmup < self.step < self.turning_point and self.step % self.interval == 0):
            kept = self.choose(self.budget(self.step))
            self.kept = kept if self.step == self.turning_point else None
        if self.kept is not None and not self.cut:
            self._mask(self.kept)

    def triplet_scores(self) -> dict[str, Tensor]:
        """The scores of every place's triplets, (r,)."""
        found = {}
        for name in self.places:
            e, q, p = self.importance.scores(name)
            found[name] = e[:, 0] + q.mean(1) + p.mean(0)
        return found

    def choose(self, budget: int) -> dict[str, Tensor]:
        """Zero E of all but the ``budget`` best triplets; returns which are left, (r,) of each place."""
        scores = self.triplet_scores()
        order = torch.cat(list(scores.values())).argsort(stable=True)
        left = torch.ones(len(order), dtype=torch.bool, device=order.device)
        left[order[: len(order) - budget]] = False
        kept = dict(zip(scores, left.split([len(s) for s in scores.values()]), strict=True))
        self._mask(kept)
        return kept

    def _mask(self, kept: dict[str, Tensor]) -> None:
        for name, mask in kept.items():
            self.places[name].e.mul_(mask[:, None].to(self.places[name].e))

    @contextmanager
    def weights(self) -> Iterator[None]:
        """Without the triplets whose E is zero, which the budget has taken."""
        if not self.shrink or self.cut or self.step <= self.warmup:
            yield
            return
        own = {p: p.data for place in self.places.values() for p in (place.p, place.e, place.q)}
        for place in self.places.values():
            left = place.e.data[:, 0].nonzero()[:, 0]
            for name, dim in type(place).rank_axes.items():
                parameter = getattr(place, name)
                optim.exchange(parameter, parameter.data.index_select(dim, left))
        try:
            yield
        finally:
            for parameter, data in own.items():
                optim.exchange(parameter, data)

    def finish(self) -> None:
        """Cut off what is not kept, if a final phase has not."""
        if self.kept is not None and self.shrink and not self.cut:
            self._cut()

    def state_dict(self) -> dict[str, Any]:
        averages = None if self.kept is not None else self.importance.state_dict()
        return super().state_dict() | {"importance": averages, "kept": self.kept, "cut": self.cut}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if state["importance"] is not None:
            self.importance.load_state_dict(state["importance"])
        kept = state["kept"]
        self.kept = None if kept is None else {name: mask.to(self.places[name].e.device) for name, mask in kept.items()}
        self.cut = state["cut"]
