"""LoRA+: the factor B learns faster than A.

Groups of the optimizer are split: B (out, r) at ``ratio`` times the group's rate, the places of embeddings at
``embedding_rate``, all else as it was. B starts at zero and A at its full size, so that for wide layers one rate for both
learns features inefficiently. Whatever the learning-rate scheduler does, the ratio stays. Source: arXiv 2402.12354, Sec. 4;
peft has a ratio of 16 as well.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from trimtab.core.errors import Unsupported
from trimtab.schedules.contract import Group, Schedule
from trimtab.schedules.registry import schedule

__all__ = ["LoRAPlus"]


@schedule(paper="arXiv:2402.12354", tests=({"ratio": 4.0},))
@dataclass(eq=False)
class LoRAPlus(Schedule):
    """B learns ``ratio`` times as fast as A; with about half of LoRA's usual learning rate.

    Not for methods whose both factors start away from zero (PiSSA, OLoRA, LoRA-GA): the argument is about a B that starts at zero.

    Args:
        ratio: rate of B over that of A.
        embedding_rate: learning rate of low-rank adapters on embeddings; None: as elsewhere.
    """

    owns: ClassVar[frozenset[str]] = frozenset({"rates"})
    whole_gradients: ClassVar[bool] = False

    ratio: float = 16.0
    embedding_rate: float | None = 1e-6

    def __post_init__(self) -> None:
        if not self.ratio > 0 or (self.embedding_rate is not None and not self.embedding_rate > 0):
            raise ValueError(f"ratio and embedding_rate must be above 0, found {self.ratio!r} and {self.embedding_rate!r}")
        if self.ratio < 1:
            warnings.warn(f"LoRAPlus(ratio={self.ratio}) lets B learn more slowly than A: LoRA+ turned round", stacklevel=3)

    def start(self, model: nn.Module, *, steps: int | None) -> None:
        """Find the factors.

        Raises:
            Unsupported: no adapter that learns has a pair of factors.
        """
        super().start(model, steps=steps)
        self.fast: set[int] = set()
        self.embedded: set[int] = set()
        adapters = self.services.adapters()
        for adapter in adapters:
            pair = [getattr(adapter, name) for name, axis in adapter.rank_axes.items() if axis == 1]
            self.fast |= {id(p) for p in pair if isinstance(p, nn.Parameter)}
            if pair and adapter.site.kind == "embedding" and self.embedding_rate is not None:
                self.embedded |= {id(p) for p in adapter.parameters()}
        if not self.fast:
            methods = ", ".join(sorted({type(a.config).__name__ for a in adapters})) or "nothing"
            raise Unsupported(f"LoRAPlus needs the factors A (r, in) and B (out, r) of a low-rank method; attached: {methods}")

    def groups(self, groups: list[Group]) -> list[Group]:
        """Each group as up to three: the rest, B, embeddings."""
        found = []
        for group in groups:
            parts: dict[str, list[nn.Parameter]] = {"rest": [], "fast": [], "embedded": []}
            for p in group["params"]:
                parts["embedded" if id(p) in self.embedded else "fast" if id(p) in self.fast else "rest"].append(p)
            rates = {"rest": 1.0, "fast": self.ratio, "embedded": (self.embedding_rate or 0) / group["lr"] if group["lr"] else 1.0}
            for name, chosen in parts.items():
                if chosen:
                    scaled = {key: group[key] * rates[name] for key in ("lr", "initial_lr") if key in group}
                    found.append({**group, **(scaled if rates[name] != 1 else {}), "params": chosen})
        return found
