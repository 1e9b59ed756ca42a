"""ReLoRA: a low-rank adapter is merged into the base again and again, so that its updates add up to a high rank.

Every N steps ``W <- W + s B A``; A starts anew (Kaiming-uniform), B at zero, the moments of both are pruned, and the learning
rate rises again over ``rewarm`` steps; the merge comes one step after the rate has dropped to zero, at ``t % N == 1``. The base
is written while the run lasts and put back to the bit at its end: what is delivered is the adapter whose factors are all merged
ones beside the last, ``[B_0 ... B_k]`` (out, (k + 1) r) and ``[A_0; ...; A_k]``, an ordinary adapter of the method on the
untouched base. Source: arXiv 2307.05695, Algorithm 1; order and pruning as in its code, but for its wrapper's start of A at
zero, from which nothing learns before the first restart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.errors import Unsupported
from trimtab.core.host import adapted_chain
from trimtab.core.site import is_quantised
from trimtab.core.state import parameter_users
from trimtab.methods.reparameterized.lora import LowRank, start_bound
from trimtab.schedules import optim
from trimtab.schedules.contract import Schedule
from trimtab.schedules.registry import schedule

__all__ = ["ReLoRA", "jagged_cosine"]

Pair = tuple[Tensor, Tensor]


def jagged_cosine(step: int, *, steps: int, warmup: int, every: int, rewarm: int, floor: float = 0.1) -> float:
    """The paper's learning rate, as a factor: a cosine to ``floor`` that drops to 0 every ``every`` steps and rises again.

    For ``torch.optim.lr_scheduler.LambdaLR``, with ``tt.ReLoRA(rewarm=0)``; the rise aims at the cosine of its end.
    """

    def cosine(at: int) -> float:
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, (at - warmup) / max(1, steps - warmup))))

    if step < warmup:
        return step / warmup
    into = step % every
    if step >= every and into < rewarm:
        return into / rewarm * cosine(step - into + rewarm)
    return cosine(step)


@schedule(paper="arXiv:2307.05695", tests=({"every": 2, "rewarm": 1}, {"every": 2, "rewarm": 0, "prune": 1.0}))
@dataclass(eq=False)
class ReLoRA(Schedule):
    """LoRA that restarts: what it has learnt moves into the base, and a fresh pair of factors goes on.

    Not for short runs, and not where the adapter must stay small: what is delivered has the ranks of all restarts. An adapter saved
    in between is the last pair of factors, beside a base that is written: load it with ``check_base=False``.

    Args:
        every: N, steps between two restarts.
        rewarm: steps over which the learning rate rises after a restart; 0 if the loop's scheduler does it (``jagged_cosine``).
        prune: share of the optimizer's moments of the factors that a restart sets to zero.
        by: ``"random"`` or ``"magnitude"``: which ones.
    """

    owns: ClassVar[frozenset[str]] = frozenset({"weights", "delivery"})

    every: int = 1000
    rewarm: int = 100
    prune: float = 0.999
    by: str = "random"

    def __post_init__(self) -> None:
        if self.every < 1 or not 0 <= self.rewarm < self.every:
            raise ValueError(f"every must be at least 1 and rewarm below it, found {self.every!r} and {self.rewarm!r}")
        if not 0 <= self.prune <= 1 or self.by not in ("random", "magnitude"):
            raise ValueError(f"prune must lie in [0, 1] and by be random or magnitude, found {self.prune!r} and {self.by!r}")

    def start(self, model: nn.Module, *, steps: int | None) -> None:
        """Find the pairs of factors.

        Raises:
            Unsupported: there are none that are added to W, or their W is quantised or tied.
        """
        super().start(model, steps=steps)
        adapters = self.services.adapters()
        self.places: dict[str, LowRank] = {
            f"{a.site.path}.{a.site.slot}": a
            for a in adapters
            if isinstance(a, LowRank) and a.additive and set(a.rank_axes) == {"a", "b"}
        }
        if not self.places:
            methods = ", ".join(sorted({type(a.config).__name__ for a in adapters})) or "nothing"
            raise Unsupported(f"ReLoRA merges and restarts pairs of factors that are added to W, as LoRA's; attached: {methods}")
        users = parameter_users(model)
        for place in self.places.values():
            stored = place.site.parameter()
            if is_quantised(stored) or len(users[id(stored)]) > 1:
                what = "quantised" if is_quantised(stored) else "tied to another layer's"
                raise Unsupported(f"ReLoRA writes into the base while it runs, and the weight of {place.site.name} is {what}")
        self.tell_if_never("restarts", self.every)
        self.history: list[dict[str, Pair]] = []
        self.originals: dict[str, Tensor] = {}
        self.rng = self.services.generator(self)

    def rate_factor(self) -> float:
        """The rise after a restart."""
        into = self.step % self.every
        return into / self.rewarm if self.rewarm and self.step >= self.every and into < self.rewarm else 1.0

    def step_begin(self) -> None:
        """Restart, where it is due."""
        since = self.step - (1 if self.rewarm else 0)
        if since and since % self.every == 0:
            self.restart()

    @torch.no_grad()
    def restart(self) -> None:
        """Merge, begin A and B anew, and prune their moments; the model's output stays."""
        pairs = {name: (place.b.detach().clone(), place.a.detach().clone()) for name, place in self.places.items()}
        self._merge(pairs)
        self.history.append(pairs)
        for place in self.places.values():
            bound = start_bound(place.site)
            place.a.copy_(torch.rand(place.a.shape, generator=self.rng).mul_(2 * bound).sub_(bound))
            place.b.zero_()
        learnt = [p for place in self.places.values() for p in (place.a, place.b)]
        optim.reset_state(self.services.optimizer, learnt, prune=self.prune, by=self.by, rng=self.rng)

    @torch.no_grad()
    def _merge(self, pairs: dict[str, Pair]) -> None:
        """Write ``W + s B A`` into the base, with the adapters' tensors as ``pairs`` say; the originals are kept."""
        for name, (b, a) in pairs.items():
            place = self.places[name]
            site, own = place.site, (place.b.data, place.a.data)
            place.b.data, place.a.data = b, a
            stored = site.parameter()
            self.originals.setdefault(name, stored.detach().clone())
            wide = torch.promote_types(stored.dtype, torch.float32)
            merged = site.unmatrix(adapted_chain(site, [[place]], dtype=wide))
            stored.data.copy_(merged.reshape(stored.shape))
            place.b.data, place.a.data = own

    @contextmanager
    def weights(self) -> Iterator[None]:
        """On the base as it was, the adapters with all their factors; then the merged base and the last factors again."""
        if not self.history:
            yield
            return
        merged = {name: place.site.parameter().detach().clone() for name, place in self.places.items()}
        own = {name: (place.b.data, place.a.data) for name, place in self.places.items()}
        self._join()
        try:
            yield
        finally:
            for name, place in self.places.items():
                place.site.parameter().data.copy_(merged[name])
                for factor, data in zip((place.b, place.a), own[name], strict=True):
                    optim.exchange(factor, data)

    def _join(self) -> None:
        # in the other order: of several places in one tensor, the first one's original is the oldest
        for name in reversed(self.originals):
            self.places[name].site.parameter().data.copy_(self.originals[name])
        for name, place in self.places.items():
            pairs = [*(merged[name] for merged in self.history), (place.b.data, place.a.data)]
            optim.exchange(place.b, torch.cat([b for b, _ in pairs], dim=1))
            optim.exchange(place.a, torch.cat([a for _, a in pairs]))

    def close(self) -> None:
        """The base as it was, and all factors in the adapters."""
        if getattr(self, "history", None):
            for place in self.places.values():
                place.a.grad = place.b.grad = None
            self._join()
            self.history, self.originals = [], {}

    def finish(self) -> None:
        """As ``close``."""
        self.close()

    def state_dict(self) -> dict[str, Any]:
        history = [{name: list(pair) for name, pair in pairs.items()} for pairs in self.history]
        return super().state_dict() | {"history": history, "rng": self.rng.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Merge again, one restart after the other, which rounds as it did."""
        super().load_state_dict(state)
        self.rng.set_state(state["rng"].cpu())
        for pairs in state["history"]:
            device = {name: self.places[name].a.device for name in pairs}
            found = {name: (b.to(device[name]), a.to(device[name])) for name, (b, a) in pairs.items()}
            self._merge(found)
            self.history.append(found)

