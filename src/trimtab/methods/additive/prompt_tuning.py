"""Prompt tuning: a few learned tokens in front of the model's input.

``[P; x]`` with P (p, width) in place of the embeddings ``x`` (t, width). The outputs at the learned tokens are taken out again.

In a causal model P does not depend on x: its keys and values in every block come from one run of P alone, which serves all rows
and all tokens that follow. With rotary positions P stands at -p to -1, so that the sequence keeps its own positions and the
differences are those of a sequence with P written in front of it. A model with a table of positions gives P its first p rows,
and the sequence keeps its own. In an encoder P looks at x: it is in the sequence inside the blocks, without a position. Where
tokens see each other by other ways than keys and values (recurrences, convolutions), P is in the sequence itself, and in its cache.
Which of them gives ``[P; x]`` is tried when P is attached; a model in which none does is refused (``trimtab.core.laws``).

Source: arXiv 2104.08691, Sec. 2. Trainable: ``p width``. Saved for backward: in a causal model the run of P alone and p rows of
keys and values a batch entry and block; else p more tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from trimtab.core.contracts import MethodConfig, Span, TokenAdapter
from trimtab.core.errors import ShapeMismatch
from trimtab.core.registry import method
from trimtab.core.site import Site

__all__ = ["PromptTuning", "PromptTuningAdapter"]


@dataclass(frozen=True)
class PromptTuning(MethodConfig):
    """Learned tokens in front of the input: the smallest adapter of all, good with models of several billion parameters.

    Not for small models (below about a billion parameters it trails every other method, and needs large learning rates), nor
    where adapters must merge.

    Args:
        tokens: p, their number.
        init: ``"vocabulary"``, the embeddings of tokens drawn from the vocabulary; ``"normal"``, N(0, std^2).
        ids: the token ids to start from, in order and repeated to ``tokens``, such as those of a task's description.
        std: standard deviation of the normal start.
    """

    search = {"tokens": (5, 10, 20, 50, 100), "init": ("normal", "vocabulary")}
    learning_rate = Span(1e-3, 1.0, log=True)

    tokens: int = 20
    init: str = "vocabulary"
    ids: tuple[int, ...] | None = None
    std: float = 0.5

    def __post_init__(self) -> None:
        self.require_count("tokens")
        self.require_choice("init", ("vocabulary", "normal"))
        self.require(self.std > 0, f"std must be above 0, found {self.std!r}: equal tokens would stay equal")
        valid = self.ids is None or (len(self.ids) > 0 and all(isinstance(i, int) and i >= 0 for i in self.ids))
        self.require(valid, f"ids must be token ids of at least 0, one or more, found {self.ids!r}")
        self.require(self.ids is None or self.init == "vocabulary", "ids are entries of the vocabulary; leave init at 'vocabulary'")


@method(PromptTuning, paper="arXiv:2104.08691 Sec. 2", tests=({"tokens": 3, "init": "normal"},))
class PromptTuningAdapter(TokenAdapter):
    """``p`` (p, width)."""

    def __init__(self, config: PromptTuning, site: Site, *, rng: Generator):
        super().__init__(config, site)
        shape = config.tokens, site.in_features
        if config.init == "normal" or site.is_meta or site.vocabulary is None:
            self.p = self.normal(*shape, std=config.std, rng=rng)
        else:
            self.p = self._from_vocabulary(config, site, rng)

    def _from_vocabulary(self, config: PromptTuning, site: Site, rng: Generator) -> nn.Parameter:
        embed, entries = site.vocabulary
        if config.ids is None:
            ids = torch.randint(entries, (config.tokens,), generator=rng)
        else:
            ids = torch.tensor(config.ids).repeat(-(-config.tokens // len(config.ids)))[: config.tokens]
        with torch.no_grad():
            return self.parameter(embed(ids.to(site.device)))

    @classmethod
    def check(cls, config: PromptTuning, site: Site) -> None:
        if config.init == "vocabulary" and site.vocabulary is None:
            raise ShapeMismatch(f"{site.path} follows no table of tokens of its width to start from; use init='normal'")
        if config.ids is not None and max(config.ids) >= site.vocabulary[1]:
            raise ShapeMismatch(f"{config}: the vocabulary has the ids 0 to {site.vocabulary[1] - 1}, found {max(config.ids)}")

    @classmethod
    def entry(cls, config: PromptTuning) -> str:
        return "model"

    def tokens(self) -> Tensor:
        return self.p
