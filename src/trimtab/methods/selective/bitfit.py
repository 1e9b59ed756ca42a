"""BitFit: the biases learn, everything else stays frozen.

``b' = value``, started at ``b``; a layer ``y = W x + b`` then differs from the base by a constant vector. Source: arXiv
2106.10199, Sec. 3. Trainable: one number an output of each adapted layer, and one a channel of each norm with a bias.
"""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.core.contracts import MethodConfig, Selection
from trimtab.core.registry import method

__all__ = ["BitFit", "BitFitAdapter"]


@dataclass(frozen=True)
class BitFit(MethodConfig):
    """Only biases learn; about 0.1 % of a BERT, nothing in a model without biases.

    The paper's smaller variant (query and intermediate biases alone) is ``targets="attn.q | mlp.up"``. Not for models
    whose layers have no bias, as most recent language models: there NormTuning or LoRA is the choice.
    """


@method(BitFit, paper="arXiv:2106.10199 Sec. 3")
class BitFitAdapter(Selection):
    """The bias of a linear layer or a norm, as a value of its own."""

    targets = "linear | norm"
    tensors = ("bias", "in_proj_bias")
    kinds = frozenset({"vector"})
