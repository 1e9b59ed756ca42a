"""Visual prompt tuning: learned tokens beside an image's patches, at the input of every block or of the first.

Deep: ``[P_i; x]`` with P_i (p, width) at the input of block i; what the block makes of P_i is thrown away. So of the block's work
on P_i only the keys and values matter: they come from one run of the block on P_i alone, and every query of every image sees them.
Shallow: P (p, width) enters at the first block and goes through all. The tokens stand in front of the sequence, not between the
class token and the patches: to blocks whose attention has no order that is the same. Source: arXiv 2203.12119, Eq. 4-8.

Start: U(-b, b), ``b = sqrt(6 / (patch + width))`` with ``patch`` the numbers in a patch, as the authors' code has it (0.0625 for
ViT-B/16, where both are 768). Trainable: ``p width``, deep times the blocks. Saved for backward: deep, p rows of keys and values a
batch entry and block; shallow, p more tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Generator, Tensor
from torch.nn import functional as F

from trimtab.core.contracts import MethodConfig, Span, TokenAdapter
from trimtab.core.registry import method
from trimtab.core.site import Site

__all__ = ["VPT", "VPTAdapter"]


@dataclass(frozen=True)
class VPT(MethodConfig):
    """Learned tokens that a vision transformer's attention sees beside the patches.

    Not for dense prediction at high resolution (it cannot change what is computed of a patch, only add to it), not for backbones
    without attention over a sequence (ConvNeXt), nor where adapters must merge.

    Args:
        tokens: p, their number at each block.
        deep: fresh tokens at every block; False: at the first alone.
        dropout: probability of dropping an entry of the tokens.
        patch: numbers in a patch (channels times height times width), for the start; None: the width.
    """

    search = {"tokens": (1, 5, 10, 50, 100, 200), "deep": (False, True)}
    learning_rate = Span(1e-3, 1e-1, log=True)

    tokens: int = 10
    deep: bool = True
    dropout: float = 0.0
    patch: int | None = None

    def __post_init__(self) -> None:
        self.require_count("tokens")
        self.require_count("patch", optional=True)
        self.require_probability("dropout", self.dropout)


@method(VPT, paper="arXiv:2203.12119 Eq. 4-8", tests=({"tokens": 3}, {"tokens": 3, "deep": False}))
class VPTAdapter(TokenAdapter):
    """``p`` (p, width)."""

    def __init__(self, config: VPT, site: Site, *, rng: Generator):
        super().__init__(config, site)
        width = site.in_features
        bound = math.sqrt(6 / ((config.patch or width) + width))
        self.p = self.uniform(config.tokens, width, bound=bound, rng=rng)

    @classmethod
    def entry(cls, config: VPT) -> str:
        return "block" if config.deep else "model"

    def tokens(self) -> Tensor:
        return F.dropout(self.p, self.config.dropout, self.training)
