"""IST: at every step a random quarter of the layers learns, drawn by what probes say of their importance.

One score a layer, ``I``, zero at the start. High means redundant, as in the authors' code; ``importance`` is its negative, the
paper's sign. Every ``interval`` steps, at step t > 0, ``N_c`` different sets ``S_k`` of layers are drawn with weights
``sigmoid(I)``; the response of the adapters in ``S_k`` is scaled, ``y = base + factor (y_peft - base)`` for every method, and
``L_k`` is the loss on one batch. With ``r_k = exp(-L_k) - mean_j exp(-L_j)`` and ``p = sigmoid(I)``, taken once,
``I_i += rate r_k p_i (1 - p_i)`` for every k and every layer i in ``S_k``. At every step the layers that learn are drawn without
replacement with weights ``sigmoid(-I)``. Source: arXiv 2410.11772; where paper and code differ, the code.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.activation import scaled
from trimtab.core.errors import Unsupported
from trimtab.schedules.layers import LayerSampling, count_of, draw
from trimtab.schedules.registry import schedule

__all__ = ["IST", "updated_scores"]

REDRAWS = 100  # of a set of layers that was drawn already; after that all layers are equally likely


def updated_scores(scores: Tensor, sets: Sequence[Sequence[int]], losses: Tensor, rate: float) -> Tensor:
    """The scores ``I`` (layers,) after probing: ``losses`` (sets,), one for each suppressed set of layers."""
    gain = torch.exp(-losses.to(scores))
    reward = gain - gain.mean()
    p = torch.sigmoid(scores)
    new = scores.clone()
    for r, suppressed in zip(reward, sets, strict=True):
        index = torch.tensor(suppressed)
        new[index] += rate * r * (p * (1 - p))[index]
    return new


@schedule(
    paper="arXiv:2410.11772",
    tests=({"updated": 1, "suppressed": 1, "candidates": 2, "interval": 2}, {"updated": 1, "uniform": True, "state": "drop"}),
)
@dataclass(eq=False)
class IST(LayerSampling):
    """A quarter of the layers learns at a time, drawn by importance: less memory for gradients, moments and activations.

    Not for models of a few layers, nor where time counts more than memory: the probes cost what the shorter backward saves.
    Each layer learns in ``updated`` of the steps, so give it the steps or the learning rate for that.

    Args:
        updated: layers that learn at a step: a number, or a share of all, rounded down.
        suppressed: layers whose response a probe scales down, likewise.
        candidates: sets of layers an update of the scores compares.
        factor: of a suppressed response, at least 0 and below 1.
        rate: step of the scores.
        interval: steps between two updates of the scores.
        uniform: no scores and no probes, all layers equally likely: the ablation RST.
        state: of the optimizer for layers at rest: ``"keep"`` (the paper), on the ``"cpu"``, or ``"drop"``, which saves it
            and starts it anew when the layer learns again.
        batched: all sets in one forward pass of the repeated batch, with a factor a row; needs a loss made from outputs of
            one row an example.
    """

    updated: float | int = 0.25
    suppressed: float | int = 0.5
    candidates: int = 3
    factor: float = 0.25
    rate: float = 10.0
    interval: int = 10
    uniform: bool = False
    state: str = "keep"
    batched: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.factor < 1:
            raise ValueError(f"factor must be at least 0 and below 1, found {self.factor!r}")
        if self.interval < 1 or self.candidates < 2 or not self.rate > 0:
            raise ValueError(
                "interval must be at least 1, candidates at least 2 and rate above 0; found "
                f"{self.interval!r}, {self.candidates!r}, {self.rate!r}"
            )

    def start(self, model: nn.Module, *, steps: int | None) -> None:
        """Find the layers.

        Raises:
            ValueError: a number of layers that the model has not, too few sets of them to compare, or nothing to probe on.
            Unsupported: see ``LayerSampling``.
        """
        super().start(model, steps=steps)
        total = len(self.layers)
        self.learning = count_of("updated", self.updated, total)
        self.redundancy, self.probed = torch.zeros(total, dtype=torch.float64), 0
        if self.uniform:
            return
        self.suppressing = count_of("suppressed", self.suppressed, total)
        possible = math.comb(total, self.suppressing)
        if possible < self.candidates:
            raise ValueError(
                f"there are {possible} sets of {self.suppressing} of {total} layers, fewer than candidates = {self.candidates}; "
                "lower candidates or change suppressed, or take uniform=True"
            )
        if self.services.probes is None:
            raise ValueError("IST probes the model: give tt.scheduled loss= and batches=, or take tt.IST(uniform=True)")
        self.tell_if_never("updates its scores", self.interval)

    @property
    def importance(self) -> Tensor:
        """The paper's score, (layers,): high means that suppressing the layer's adapters raises the loss."""
        return -self.redundancy

    def step_begin(self) -> None:
        """Update the scores where it is due, and draw the layers that learn."""
        if not self.uniform and self.step and self.step % self.interval == 0:
            self.update()
        self.choose(draw(torch.sigmoid(self.importance), self.learning, self.rng))

    def update(self) -> None:
        """Probe ``candidates`` sets of layers, and move the scores by what their suppression costs."""
        sets = self._candidates()
        losses = self.services.mean(self._losses(sets)).cpu()
        self.probed += 1
        if not bool(torch.isfinite(losses).all()):
            warnings.warn(f"IST leaves its scores as they are: the probes' losses are {losses.tolist()}", stacklevel=2)
            return
        self.redundancy = updated_scores(self.redundancy, sets, losses, self.rate)

    def _candidates(self) -> list[list[int]]:
        """Different sets of layers, weighted by redundancy."""
        found: list[list[int]] = []
        weights, tries = torch.sigmoid(self.redundancy), 0
        while len(found) < self.candidates:
            new = draw(weights if tries < REDRAWS else torch.ones_like(weights), self.suppressing, self.rng)
            tries += 1
            if new not in found:
                found.append(new)
        return found

    def _losses(self, sets: Sequence[Sequence[int]]) -> Tensor:
        """The loss with each set suppressed, shape ``(sets,)``."""
        run, model = self.services, self.model
        if not self.batched:
            found = []
            for suppressed in sets:
                with scaled(model, {path: self.factor for i in suppressed for path in self.paths[i]}):
                    found.append(run.probes.measure(model, self.probed))
            return torch.stack(found)
        factors = {}
        for i, paths in enumerate(self.paths):
            rows = torch.tensor([self.factor if i in suppressed else 1.0 for suppressed in sets])
            factors.update(dict.fromkeys(paths, rows))
        try:
            with scaled(model, factors):
                return run.probes.measure_copies(model, self.probed, len(sets))
        except Unsupported as error:
            raise Unsupported(f"IST cannot probe all sets at once here: {error}; take batched=False") from error

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"redundancy": self.redundancy.clone(), "probed": self.probed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.redundancy, self.probed = state["redundancy"].clone(), state["probed"]
