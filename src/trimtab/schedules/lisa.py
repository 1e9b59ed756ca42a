"""LISA: every so many steps other layers learn, drawn uniformly; embeddings and head always do.

At step t with ``t % every == 0``, 0 included, ``sampled`` layers are drawn without replacement and learn until the next draw. The
paper trains whole layers, embeddings and head, here ``tt.attach(model, tt.Unfreeze(), targets="block | embedding | head")`` (its
default is the head alone); any method of layers will do. Source: arXiv 2403.17919, Algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from trimtab.schedules.layers import LayerSampling, count_of, draw
from trimtab.schedules.registry import schedule

__all__ = ["LISA"]


@schedule(paper="arXiv:2403.17919", tests=({"sampled": 1, "every": 2},))
@dataclass(eq=False)
class LISA(LayerSampling):
    """A few whole layers learn at a time, others every so many steps: full fine-tuning's reach at a part of its memory.

    Not with small adapters, whose gradients and moments are little: IST draws anew at every step there.

    Args:
        sampled: how many layers learn at a time: a number, or a share of all, rounded down.
        every: steps between two draws.
        state: of the optimizer for layers at rest: ``"drop"``, which the saving needs, on the ``"cpu"``, or ``"keep"`` (the
            authors' code).
    """

    sampled: float | int = 2
    every: int = 20
    state: str = "drop"

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every must be at least 1, found {self.every!r}")

    def start(self, model: nn.Module, *, steps: int | None) -> None:
        """Find the layers; see ``LayerSampling``."""
        super().start(model, steps=steps)
        self.learning = count_of("sampled", self.sampled, len(self.layers))
        if self.learning < len(self.layers):
            self.tell_if_never("draws other layers", self.every)

    def step_begin(self) -> None:
        """Draw where it is due; a resumed run goes on with the layers that it had."""
        if self.chosen is None or self.step % self.every == 0:
            self.choose(draw(torch.ones(len(self.layers)), self.learning, self.rng))
        elif self._on is None:
            self.choose(self.chosen)
