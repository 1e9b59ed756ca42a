"""The first stage of Light-PEFT: factors on heads and channels that learn, and statistics of the adapters, on a whole model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.contracts import Adapter
from trimtab.core.cut import Kept
from trimtab.core.errors import Unsupported
from trimtab.kernels.gate import gated
from trimtab.schedules import surgery
from trimtab.schedules.probing import measuring
from trimtab.schedules.spare import ModuleRatios, RankScores
from trimtab.schedules.units import Units

__all__ = ["Estimation"]


class Estimation:
    """What stands on the model while stage 1 lasts.

    Attributes:
        units: the units that may go, in the model's order.
        masks: path of a reader -> one factor a unit, (units,), from one on.
        ratios, scores: statistics of the adapters.
        inputs: what the model was last called with to train.
    """

    def __init__(self, root: nn.Module, units: Sequence[Units], modules: Sequence[Adapter], ranks: Sequence[Adapter]):
        self.root, self.units = root, list(units)
        self.masks: dict[str, nn.Parameter] = {}
        for u in self.units:
            weight = root.get_submodule(u.reader).weight
            dtype = torch.promote_types(weight.dtype, torch.float32)
            self.masks[u.reader] = nn.Parameter(torch.ones(u.count, device=weight.device, dtype=dtype))
        self.ratios, self.scores = ModuleRatios(modules), RankScores(ranks)
        self.inputs: tuple[tuple, dict] | None = None
        self.observing = self.training = False  # whether steps are observed, and whether the present call trains
        self.fixed: Mapping[str, Tensor] | None = None  # in place of the masks; nothing if empty
        self.reached: set[str] = set()
        # plain functions: a copy of the model shares them, and does not copy what they hold
        self.handles = [root.get_submodule(u.reader).register_forward_pre_hook(_gating(self, u)) for u in self.units]
        self.handles += self.ratios.hooks()
        self.handles.append(root.register_forward_pre_hook(_capturing(self), with_kwargs=True))

    def observe(self, *, steps: bool | None = None, call: bool | None = None) -> None:
        """From now on observe steps or not; the present call of the model trains or not."""
        self.observing = self.observing if steps is None else steps
        self.training = self.training if call is None else call
        self.ratios.on = self.observing and self.training

    def close(self) -> None:
        """Take everything off the model."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.inputs = None

    def kept(self, index: Mapping[str, Tensor]) -> Kept:
        """Indices a reader as a cut takes them."""
        found: dict[str, dict[str, tuple[int, Tensor]]] = {}
        for u in self.units:
            found.setdefault(u.kind, {})[u.reader] = (u.count, index[u.reader])
        return found

    def all_but_one(self) -> Kept:
        """A cut of the last unit of each: whether a model can be cut at all does not depend on which go."""
        return self.kept({u.reader: torch.arange(max(1, u.count - 1)) for u in self.units})

    def try_cut(self, kept: Kept) -> None:
        """Confirm on the last inputs that a cut gives what masking gives.

        Raises:
            Unsupported: it does not, or cannot be made or checked.
        """
        args, kwargs = self.inputs
        run = lambda model: model(*args, **kwargs)  # noqa: E731
        hard = {}
        for path, (_, index) in ((p, of) for found in kept.values() for p, of in found.items()):
            hard[path] = torch.zeros_like(self.masks[path]).index_fill_(0, index.to(self.masks[path].device), 1)
        try:
            with measuring(self.root):
                self.fixed = hard
                expected = surgery.floats(run(self.root))
                if not expected:
                    raise Unsupported(f"{type(self.root).__name__} returns no tensor by which a cut of it could be checked")
                self.fixed = {}
                surgery.trial(self.root, kept, run, expected)
        finally:
            self.fixed = None
            self.observe(call=True)

    def state_dict(self) -> dict[str, Any]:
        """Copies of factors and statistics."""
        masks = {path: mask.detach().clone() for path, mask in self.masks.items()}
        scores = {"total": [t.clone() for t in self.scores.total], "steps": self.scores.steps}
        return {"masks": masks, "ratios": self.ratios.total.clone(), "scores": scores, "reached": sorted(self.reached)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a stored state.

        Raises:
            ValueError: it is of other units or adapters.
        """
        if set(state["masks"]) != set(self.masks) or len(state["scores"]["total"]) != len(self.scores.total):
            raise ValueError(f"the stored estimation is of other units: {sorted(set(state['masks']) ^ set(self.masks))[:3]}")
        for path, mask in self.masks.items():
            mask.copy_(state["masks"][path])
        self.ratios.total.copy_(state["ratios"])
        for mine, theirs in zip(self.scores.total, state["scores"]["total"], strict=True):
            mine.copy_(theirs)
        self.scores.steps = state["scores"]["steps"]
        self.reached = set(state["reached"])


def _gating(stage: Estimation, units: Units) -> Callable:
    path, size = units.reader, units.size

    def gate(module: nn.Module, args: tuple) -> tuple | None:
        factor = (stage.masks if stage.fixed is None else stage.fixed).get(path)
        stage.reached.add(path)
        return None if factor is None else (gated(args[0], factor, size), *args[1:])

    return gate


def _capturing(stage: Estimation) -> Callable:
    def capture(root: nn.Module, args: tuple, kwargs: dict) -> None:
        stage.observe(call=root.training and torch.is_grad_enabled())
        if not stage.training:
            return
        first, stage.inputs = stage.inputs is None, (args, kwargs)
        mask = kwargs.get("attention_mask")
        stage.ratios.tokens = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        if first:
            stage.try_cut(stage.all_but_one())

    return capture
