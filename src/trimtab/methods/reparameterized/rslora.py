"""rsLoRA: LoRA whose scale does not shrink the gradients as the rank grows.

``W' = W + (alpha / sqrt(r)) B A``, all else as LoRA: ``A`` (r, in), ``B`` (out, r), ``r (in + out)`` trainable. With
``alpha / r`` the moments of activations and gradients vanish with r; with the square root they stay O(1).
Source: arXiv 2312.03732, Theorem 3.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from trimtab.core.registry import method
from trimtab.methods.reparameterized.lora import LoRA, LowRank

__all__ = ["RsLoRA", "RsLoRAAdapter"]


@dataclass(frozen=True)
class RsLoRA(LoRA):
    """LoRA with the scale ``alpha / sqrt(rank)``; for ranks of 32 and more.

    Not for small ranks: there it is LoRA under another scale.

    Args:
        rank: r, at most ``min(in, out)``.
        alpha: scale numerator; None means 8, which at rank 16 gives LoRA's default scale of 2.
        dropout: probability of zeroing an entry of the adapter branch's input while training.
    """

    @property
    def scale(self) -> float:
        """The factor in front of ``B A``."""
        return (8.0 if self.alpha is None else self.alpha) / math.sqrt(self.rank)


@method(RsLoRA, paper="arXiv:2312.03732 Thm. 3.2", tests=({"rank": 2}, {"rank": 3, "alpha": 1.5}))
class RsLoRAAdapter(LowRank):
    """``LowRank`` with the scale ``alpha / sqrt(r)``."""
