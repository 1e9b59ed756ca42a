"""What schedules share that let some of a model's layers learn at a time: the layers, the draw, and resting ones that cost nothing.

A layer is a block of the model's anatomy; what stands outside of the blocks (embeddings, a head) always learns. A resting layer has
no gradients, keeps no input for them (kernels), and the optimizer passes it by: neither momentum nor weight decay moves it.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core import anatomy
from trimtab.core.errors import Unsupported
from trimtab.schedules.contract import Schedule

__all__ = ["LayerSampling", "draw"]

STATES = ("keep", "cpu", "drop")


def draw(weights: Tensor, count: int, rng: torch.Generator) -> list[int]:
    """``count`` different indices, drawn one after the other in proportion to ``weights`` (n,); ascending."""
    found = torch.multinomial(weights.double().clamp_min(1e-300), count, replacement=False, generator=rng)
    return sorted(found.tolist())


def count_of(what: str, share: float | int, layers: int) -> int:
    """A number of layers, given as such or as a share, which is rounded down.

    Raises:
        ValueError: it is below 1 or above ``layers``.
    """
    count = share if isinstance(share, int) else int(share * layers)
    if not 1 <= count <= layers:
        raise ValueError(f"{what} = {share!r} means {count} of {layers} layers; at least 1 and at most {layers} can be chosen")
    return count


class LayerSampling(Schedule):
    """Base of the schedules that let a few layers learn at a time; a subclass chooses them in ``step_begin``.

    Attributes:
        layers: for each block, in order, the parameters that learn there.
        paths: for each block the paths of its adapted modules.
        chosen: the layers that learn; None before the first choice.
        rng: of the draws.
    """

    owns: ClassVar[frozenset[str]] = frozenset({"trainability"})
    whole_gradients: ClassVar[bool] = False

    state: str = "keep"
    layers: list[list[nn.Parameter]]
    _on: set[int] | None = None  # layers that learn as the model stands; None: all

    def start(self, model: nn.Module, *, steps: int | None) -> None:
        """Find the layers.

        Raises:
            Unsupported: the adapters are not per layer, or layers share parameters. ValueError: a layer has none.
        """
        super().start(model, steps=steps)
        if self.state not in STATES:
            raise ValueError(f"state must be one of {', '.join(STATES)}, found {self.state!r}")
        blocks = anatomy.of(model).blocks
        self.layers = [[] for _ in blocks]
        self.paths: list[list[str]] = [[] for _ in blocks]
        owner: dict[int, int | None] = {}
        name = type(self).__name__
        adapters = self.services.adapters()
        for adapter in adapters:
            site = adapter.site
            for p in adapter.parameters():
                if p.requires_grad and owner.setdefault(id(p), site.block) != site.block:
                    raise Unsupported(f"{name} lets layers rest one by one, and {site.name} shares a parameter with another layer")
                if p.requires_grad and site.block is not None and not any(p is known for known in self.layers[site.block]):
                    self.layers[site.block].append(p)
            if site.block is not None and site.path not in self.paths[site.block]:
                self.paths[site.block].append(site.path)
        if not any(self.layers):
            methods = ", ".join(sorted({type(a.config).__name__ for a in adapters})) or "nothing"
            raise Unsupported(
                f"{name} needs adapters in the model's {len(blocks)} layers, and none of them has one (attached: {methods}); "
                "attach a method of layers, such as tt.LoRA()"
            )
        empty = [blocks[i] for i, found in enumerate(self.layers) if not found]
        if empty:
            raise ValueError(
                f"{name} chooses among all {len(blocks)} layers, and {len(empty)} have no adapter that learns, first {empty[0]}; "
                "attach to all layers"
            )
        self.chosen: list[int] | None = None
        self._on = None
        self._before: list[tuple[nn.Parameter, Tensor]] | None = None
        self.rng = self.services.generator(self)

    def choose(self, layers: list[int]) -> None:
        """Let exactly these layers learn, beside all that is outside of the layers."""
        self.chosen = layers
        for i, parameters in enumerate(self.layers):
            on, was = i in layers, self._on is None or i in self._on
            if on != was:
                self.services.set_trainable(parameters, on, state=self.state)
        first, self._on = self._on is None, set(layers)
        if first:
            self._before = [(p, p.detach().clone()) for i, ps in enumerate(self.layers) if i not in self._on for p in ps]

    def step_end(self) -> None:
        """After the first step, see that the optimizer passed by what rests.

        Raises:
            Unsupported: it did not.
        """
        super().step_end()
        if self._before is not None and not all(torch.equal(p, before) for p, before in self._before):
            raise Unsupported(
                f"{type(self.run.optimizer).__name__} moved parameters that have no gradient; {type(self).__name__} needs an "
                "optimizer that passes them by, as torch's do"
            )
        self._before = None

    def close(self) -> None:
        """All layers learn again."""
        for i, parameters in enumerate(getattr(self, "layers", ())):
            if self._on is not None and i not in self._on:
                self.services.set_trainable(parameters, True, state=self.state)
        self._on = None

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"chosen": self.chosen, "rng": self.rng.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.chosen = state["chosen"]
        self.rng.set_state(state["rng"].cpu())
