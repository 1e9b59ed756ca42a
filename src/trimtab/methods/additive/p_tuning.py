"""P-tuning: the tokens in front of the input are made by a small network from learned embeddings.

``P = MLP(LSTM(E))`` with E (p, width), a bidirectional LSTM of ``layers`` layers and h channels a direction, and an MLP from 2h
over 2h to the width with a ReLU between; or, without the LSTM, ``P = MLP(E)``, from the width over h and h to the width with two.
The tokens then act as in prompt tuning. Source: arXiv 2103.10385, Sec. 3.2. The network is needed for training alone;
``trimtab.artifacts.fold`` replaces it by P.

Trainable: ``p width`` and the network, the MLP ``2 width h + h^2 + 2 h + width``. Saved for backward: as prompt tuning.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from trimtab.core.contracts import MethodConfig, Span, TokenAdapter
from trimtab.core.registry import method
from trimtab.core.site import Site
from trimtab.methods.additive.prompt_tuning import PromptTuning

__all__ = ["PTuning", "PTuningAdapter"]


@dataclass(frozen=True)
class PTuning(MethodConfig):
    """Learned tokens in front of the input, tied to each other by a network while they train.

    Not for adapters that must be small before they are folded: the network has far more parameters than its tokens.

    Args:
        tokens: p, their number.
        encoder: ``"mlp"`` or ``"lstm"``; the LSTM cannot be compiled by torch.compile.
        hidden: h, the network's width; None: the model's.
        layers: of the LSTM.
        dropout: probability of dropping a channel between the LSTM's layers.
    """

    search = {"tokens": (5, 10, 20, 50, 100), "encoder": ("lstm", "mlp")}
    learning_rate = Span(1e-4, 1e-1, log=True)

    tokens: int = 20
    encoder: str = "mlp"
    hidden: int | None = None
    layers: int = 2
    dropout: float = 0.0

    def __post_init__(self) -> None:
        self.require_count("tokens", "layers")
        self.require_count("hidden", optional=True)
        self.require_choice("encoder", ("mlp", "lstm"))
        self.require_probability("dropout", self.dropout)
        self.require(self.dropout == 0 or (self.encoder == "lstm" and self.layers > 1), "dropout acts between an LSTM's layers")


@method(
    PTuning, paper="arXiv:2103.10385 Sec. 3.2",
    tests=({"tokens": 3, "hidden": 8}, {"tokens": 2, "encoder": "lstm", "hidden": 6}),
)  # fmt: skip
class PTuningAdapter(TokenAdapter):
    """``e`` (p, width), ``mlp`` and, with that encoder, ``lstm``."""

    def __init__(self, config: PTuning, site: Site, *, rng: Generator):
        super().__init__(config, site)
        width = site.in_features
        h = config.hidden or width
        self.e = self.normal(config.tokens, width, std=1.0, rng=rng)
        self.lstm = None
        if config.encoder == "lstm":
            more = {"dropout": config.dropout, "bidirectional": True, "batch_first": True, "device": "meta"}
            self.lstm = self._started(nn.LSTM(width, h, config.layers, **more), h, rng)
        sizes = (width, h, h, width) if self.lstm is None else (2 * h, 2 * h, width)
        self.mlp = nn.Sequential()
        for number, (fan_in, out) in enumerate(zip(sizes, sizes[1:], strict=False)):
            self.mlp.add_module(str(number), self._started(nn.Linear(fan_in, out, device="meta"), fan_in, rng))

    def _started(self, module: nn.Module, fan: int, rng: Generator) -> nn.Module:
        """``module`` with U(-1/sqrt(fan), 1/sqrt(fan)) everywhere, torch's own start of these modules, drawn from ``rng``."""
        for name, value in list(module.named_parameters()):
            setattr(module, name, self.uniform(*value.shape, bound=1 / math.sqrt(fan), rng=rng))
        return module

    @classmethod
    def entry(cls, config: PTuning) -> str:
        return "model"

    def tokens(self) -> Tensor:
        # in its own dtype: it runs on p tokens, and not every device has an LSTM in half precision
        with torch.autocast(self.e.device.type, enabled=False):
            x = self.e if self.lstm is None else self.lstm(self.e[None])[0][0]
            for number, layer in enumerate(self.mlp):
                x = layer(x if number == 0 else F.relu(x))
            return x

    def folded(self) -> tuple[PromptTuning, dict[str, Tensor]]:
        return PromptTuning(tokens=self.config.tokens, init="normal"), {"p": self.tokens()}
