"""Small models for learned tokens, one a kind of stack, and the matrix of token methods and models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from contract_cases import Fused
from torch import Tensor, nn

import trimtab as tt
from token_models import VOCABULARY, bart, bert, bloom, gpt2, llama, modernbert, t5, vit
from trimtab.core import registry
from trimtab.core.errors import TrimtabError

BATCH, TOKENS = 3, 6


def packed() -> nn.Module:
    """torch's own encoder, over nn.MultiheadAttention."""
    layer = nn.TransformerEncoderLayer(12, 2, 16, 0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, nn.LayerNorm(12), enable_nested_tensor=False)


def _ids(seed: int) -> dict[str, Tensor]:
    """Token ids with padding: left in row 0, none in the others."""
    ids = torch.randint(3, VOCABULARY, (BATCH, TOKENS), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _pairs(seed: int) -> dict[str, Tensor]:
    return {**_ids(seed), "decoder_input_ids": _ids(seed + 100)["input_ids"][:, :4]}


def _pixels(seed: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(BATCH, 3, 8, 8, generator=torch.Generator().manual_seed(seed))}


def _vectors(seed: int) -> Tensor:
    return torch.randn(BATCH, TOKENS, 12, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Home:
    """A model and its inputs by a seed; ``hugging``: whether it is one of transformers'."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Tensor] | Tensor]
    hugging: bool = True


HOMES = (
    Home("llama", llama, _ids),
    Home("gpt2", gpt2, _ids),
    Home("bloom", bloom, _ids),
    Home("t5", t5, _pairs),
    Home("bart", bart, _pairs),
    Home("bert", bert, _ids),
    Home("modernbert", modernbert, _ids),
    Home("vit", vit, _pixels),
    Home("fused", Fused, _vectors, False),
    Home("packed", packed, _vectors, False),
)
GENERATING = ("llama", "gpt2", "bloom", "t5", "bart")


@dataclass(frozen=True)
class TokenCase:
    """One token method, as a variant, in one model."""

    config: tt.MethodConfig
    home: Home

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        torch.manual_seed(0)
        return self.home.build().to(dtype).eval()

    def attached(self, *, name: str = "default", seed: int = 2, model: nn.Module | None = None, **more) -> nn.Module:
        """A model with the method, a random step away from its start."""
        model = self.model() if model is None else model
        rng = torch.Generator().manual_seed(seed)
        tt.attach(model, self.config, name=name, rng=rng, **more)
        with torch.no_grad():
            for p in tt.parameters(model, name):
                p.add_(torch.randn(p.shape, generator=rng).to(p) * 0.3)
        return model

    def run(self, model: nn.Module, seed: int = 1, dtype: torch.dtype = torch.float32, **more) -> Tensor:
        """Logits or last hidden states."""
        given = self.home.inputs(seed)
        if isinstance(given, Tensor):
            return model(given.to(dtype))
        given = {key: value.to(dtype) if value.is_floating_point() else value for key, value in given.items()}
        y = model(**given, **more)
        return y.logits if "logits" in y else y.last_hidden_state


def token_cases(*homes: str) -> list:
    """Every variant of every registered token method in the named models (all of them if none is named)."""
    found = []
    for entry in registry.entries():
        if not issubclass(entry.adapter, tt.TokenAdapter) or not entry.adapter.__module__.startswith("trimtab."):
            continue
        for variant in entry.tests or ({},):
            for home in HOMES:
                case = TokenCase(entry.config(**variant), home)
                label = ",".join(f"{k}={v}" for k, v in variant.items())
                if (not homes or home.name in homes) and _fits(case):
                    found.append(pytest.param(case, id=f"{entry.name}({label})-{home.name}"))
    return found


def _fits(case: TokenCase) -> bool:
    """Whether the method says that it applies there: a dry run, which must refuse with one of trimtab's own errors."""
    try:
        tt.attach(case.model(), case.config, dry_run=True)
    except TrimtabError:
        return False
    return True
