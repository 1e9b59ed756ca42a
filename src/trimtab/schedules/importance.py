"""AdaLoRA's importance of single parameters: two moving averages of ``|theta grad|`` and of how much it varies.

After every step ``I = |theta grad|``, ``I_bar <- b1 I_bar + (1 - b1) I`` and then ``U_bar <- b2 U_bar + (1 - b2) |I - I_bar|``;
the score of a parameter is ``I_bar U_bar``. Source: arXiv 2303.10512, Eqs. 8-10, without a bias correction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Importance", "check_betas"]


def check_betas(betas: tuple[float, float]) -> None:
    """Raise ``ValueError`` unless both lie between 0 and 1."""
    if len(betas) != 2 or not all(0 < b < 1 for b in betas):
        raise ValueError(f"the betas must lie between 0 and 1, found {betas!r}")


class Importance:
    """The averages of some places' factors.

    Args:
        factors: place -> its parameters.
        betas: decays of the two averages.
        magnitude: take ``|theta|`` for I.

    Attributes:
        average, spread: place -> ``I_bar`` and ``U_bar`` of each of its parameters.
        seen: how many steps have counted.
    """

    def __init__(self, factors: Mapping[str, Sequence[nn.Parameter]], betas: tuple[float, float], *, magnitude: bool = False):
        self.factors, self.betas, self.magnitude = factors, betas, magnitude
        self.average = {name: [torch.zeros_like(f) for f in found] for name, found in factors.items()}
        self.spread = {name: [torch.zeros_like(f) for f in found] for name, found in factors.items()}
        self.seen = 0

    @torch.no_grad()
    def observe(self) -> None:
        """Take a step's gradients in, of the places that have them; none of a step whose gradients are not finite."""
        names = [n for n, found in self.factors.items() if self.magnitude or all(f.grad is not None for f in found)]
        if not names:
            return
        factors = [f for name in names for f in self.factors[name]]
        new = [f.detach().abs() if self.magnitude else (f * f.grad).abs() for f in factors]
        if not self.magnitude and not bool(torch.stack([n.sum() for n in new]).isfinite().all()):
            return  # an infinite score would never go away
        average = [t for name in names for t in self.average[name]]
        spread = [t for name in names for t in self.spread[name]]
        torch._foreach_lerp_(average, new, 1 - self.betas[0])
        gap = torch._foreach_sub(new, average)
        torch._foreach_abs_(gap)
        torch._foreach_lerp_(spread, gap, 1 - self.betas[1])
        self.seen += 1

    def scores(self, name: str) -> list[Tensor]:
        """``I_bar U_bar`` of each parameter of a place."""
        return [i * u for i, u in zip(self.average[name], self.spread[name], strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """Copies of the averages."""
        copies = lambda found: {name: [t.clone() for t in each] for name, each in found.items()}  # noqa: E731
        return {"average": copies(self.average), "spread": copies(self.spread), "seen": self.seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict()``.

        Raises:
            ValueError: it is of other places.
        """
        if set(state["average"]) != set(self.average):
            raise ValueError(f"the stored schedule is of other places: {sorted(set(state['average']) ^ set(self.average))[:5]}")
        self.seen = state["seen"]
        for own, stored in ((self.average, state["average"]), (self.spread, state["spread"])):
            for name, found in own.items():
                for mine, theirs in zip(found, stored[name], strict=True):
                    mine.copy_(theirs)
