"""A small hand-written net with the field's usual names."""

from __future__ import annotations

import torch
from torch import nn

import trimtab as tt


class Layer(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.attn = nn.Module()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.attn.add_module(name, nn.Linear(width, width))
        self.up_proj, self.down_proj = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.attn
        x = x + a.o_proj(torch.tanh(a.q_proj(x)) * a.k_proj(x) + a.v_proj(x))
        return x + self.down_proj(torch.relu(self.up_proj(self.norm(x))))


class Net(nn.Module):
    """A small hand-written net with the field's usual names."""

    def __init__(self, width: int = 16, depth: int = 2, tied: bool = False):
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.layers = nn.ModuleList([Layer(width) for _ in range(depth)])
        self.lm_head = nn.Linear(width, 11, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


IDS = torch.arange(12).reshape(3, 4) % 11


def net(seed: int = 0, **more) -> Net:
    torch.manual_seed(seed)
    return Net(**more)


def shake(model: nn.Module, name: str = "default") -> None:
    with torch.no_grad():
        for p in tt.parameters(model, name):
            p.add_(torch.randn_like(p) * 0.1)
