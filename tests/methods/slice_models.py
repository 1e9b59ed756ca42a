"""Models and helpers for the tests of S2FT."""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import trimtab as tt

D = torch.float64


def llama(kv_heads: int = 2, *, layers: int = 2, std: float = 0.25, **more) -> LlamaForCausalLM:
    """A Llama with weights large enough that a wrong permutation shows."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=kv_heads,
        vocab_size=64, initializer_range=std, attention_bias=True, **more,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(D).eval()


def adapters(model: nn.Module, name: str = "default") -> dict[str, tt.Reparameterization]:
    return {m.site.path: m for path, m in model.named_modules() if f"trimtab.{name}." in path and hasattr(m, "site")}


def moved(model: nn.Module, name: str = "default", seed: int = 3) -> None:
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in tt.parameters(model, name):
            p.add_(0.1 * torch.randn(p.shape, generator=rng).to(p))


IDS = torch.arange(20).view(2, 10)
