"""NormTuning: the weights and biases of the normalisation layers learn.

``g' = value, b' = value``, started at the base's, in ``y = g * normalise(x) + b``. Source: arXiv 2312.11420 (LayerNorm
tuning of language models), Sec. 3; arXiv 2003.00152 for BatchNorm. Trainable: one or two numbers a channel of each norm.
"""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.core.contracts import MethodConfig, Selection
from trimtab.core.registry import method

__all__ = ["NormTuning", "NormTuningAdapter"]


@dataclass(frozen=True)
class NormTuning(MethodConfig):
    """Only the norms' gains and biases learn: a few thousand numbers a block.

    A good complement to LoRA, or a cheap domain shift on its own. Not for tasks that need new features: it cannot mix
    channels. Running statistics of BatchNorm are buffers and no part of it.
    """


@method(NormTuning, paper="arXiv:2312.11420 Sec. 3")
class NormTuningAdapter(Selection):
    """The weight or the bias of a norm, as a value of its own."""

    targets = "norm"
    tensors = ("weight", "bias")
    kinds = frozenset({"vector"})
