"""Small models of several families, LoRA on their linear layers, and the model with units masked, which cuts are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F

import trimtab as tt
from trimtab.core.cut import Kept
from trimtab.schedules.surgery import floats
from trimtab.schedules.units import KINDS, find_units

D = torch.float64
IDS = torch.arange(20).view(2, 10) + 3
PIXELS = torch.randn(2, 3, 16, 16, dtype=D, generator=torch.Generator().manual_seed(9))
_BASE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.25}
_TEXT = _BASE | {"vocab_size": 64, "max_position_embeddings": 40, "intermediate_size": 64}
_IMAGE = _BASE | {"intermediate_size": 64, "image_size": 16, "patch_size": 4}


def _llama(heads: int, kv: int) -> nn.Module:
    more = {"num_attention_heads": heads, "num_key_value_heads": kv, "intermediate_size": 48}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**_TEXT | more, attention_bias=True, mlp_bias=True))


class Fused(nn.Module):
    """Attention over one fused projection whose rows are those of q, k and v in turn, as in timm."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([FusedBlock() for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class FusedAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 4, 8
        self.qkv, self.proj = nn.Linear(24, 96), nn.Linear(32, 24)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, -1))


class FusedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attn = nn.LayerNorm(24), nn.LayerNorm(24), FusedAttention()
        self.mlp = nn.ModuleDict({"w12": nn.Linear(24, 80), "w3_down": nn.Linear(40, 24)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        gate, up = self.mlp["w12"](self.norm2(x)).chunk(2, -1)
        return x + self.mlp["w3_down"](F.silu(gate) * up)


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "llama, a key for two queries": lambda: _llama(8, 4),
    "llama, one key": lambda: _llama(4, 1),
    "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**_TEXT)),
    "roberta": lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**_TEXT)),
    "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**_IMAGE)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, initializer_range=0.25)),
    "gpt-neox, rows by head": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_TEXT)),
    "fused by hand": Fused,
}  # fmt: skip


def build(family: str) -> nn.Module:
    """The model, float64, in evaluation mode."""
    torch.manual_seed(0)
    return FAMILIES[family]().to(D).eval()


def run(model: nn.Module) -> list[Tensor]:
    """All outputs on fixed data."""
    with torch.no_grad():
        if isinstance(model, Fused):
            return floats(model(torch.randn(2, 5, 24, dtype=D, generator=torch.Generator().manual_seed(9))))
        return floats(model(**({"pixel_values": PIXELS} if "vit" in type(model).__name__.lower() else {"input_ids": IDS})))


def adapted(family: str, method: tt.MethodConfig | None = None, **more: Any) -> nn.Module:
    """The model with ``method`` on its attention and feed-forward, off its start."""
    model = build(family)
    rng = torch.Generator().manual_seed(1)
    tt.attach(model, method or tt.LoRA(rank=2), **({"targets": "attention | mlp", "rng": rng} | more))
    moved(model)
    return model


@torch.no_grad()
def moved(model: nn.Module, seed: int = 2) -> None:
    rng = torch.Generator().manual_seed(seed)
    for p in tt.parameters(model):
        p.add_(0.1 * torch.randn(p.shape, generator=rng).to(p))


def some(model: nn.Module, kinds: Iterable[str] = KINDS, *, first: Callable[[int], list[int]] | None = None) -> Kept:
    """All units but every third, or of each layer those that ``first`` says of its number."""
    chosen = first or (lambda count: [i for i in range(count) if i % 3 != 1])
    return {kind: {u.reader: (u.count, torch.tensor(chosen(u.count))) for u in find_units(model, kind)} for kind in kinds}


def hard(kept: Kept) -> dict[str, Tensor]:
    """Factors of 0 and 1."""
    return {path: torch.zeros(n, dtype=D).index_fill(0, index, 1) for found in kept.values() for path, (n, index) in found.items()}


@contextmanager
def masked(model: nn.Module, factors: dict[str, Tensor]) -> Iterator[None]:
    """Inside, the inputs of every reader are multiplied by its units' factors."""
    handles = []
    for path, factor in factors.items():
        module = model.get_submodule(path)
        inputs = module.in_features if hasattr(module, "in_features") else module.nx
        wide = factor.repeat_interleave(inputs // len(factor))
        handles.append(module.register_forward_pre_hook(lambda m, args, wide=wide: (args[0] * wide, *args[1:])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def furthest(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest difference."""
    return max((a - b).abs().max().item() for a, b in zip(found, wanted, strict=True))
