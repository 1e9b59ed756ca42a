"""Unfreeze: parameters of the targeted modules learn as they are, as in plain fine-tuning, but beside the base.

``W' = value``, started at ``W``: the base keeps its own tensor, the adapter holds a copy that learns, so that it can be
switched, saved alone, merged and taken off as any other adapter. Trainable: all parameters of the targets.
"""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.core.contracts import MethodConfig, Selection, Span
from trimtab.core.registry import method

__all__ = ["Unfreeze", "UnfreezeAdapter"]


@dataclass(frozen=True)
class Unfreeze(MethodConfig):
    """Every parameter at and below the targeted modules learns; default the head.

    For a new classifier head beside another method, or for full fine-tuning of some blocks. Not for large matrices, since
    it stores a full copy of what it unfreezes: there LoRA is the choice.

    Args:
        beneath: whether it stands below another method of the same name at the same place, whose base it then is.
    """

    learning_rate = Span(1e-5, 1e-3, log=True)

    beneath: bool = False


@method(Unfreeze, paper="plain fine-tuning")
class UnfreezeAdapter(Selection):
    """One parameter of a targeted module, as a value of its own."""

    targets = "head"
    tensors = None

    @classmethod
    def layer(cls, config: Unfreeze) -> str:
        return "base" if config.beneath else ""
