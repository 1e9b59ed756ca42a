"""Nets of which a step does not use everything, in the ways that real models have: by name, what is left out."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

W = 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(W, W) for _ in range(4))
        self.norm = nn.LayerNorm(W)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        scores = (self.q_proj(h) @ self.k_proj(h).transpose(-1, -2)).softmax(-1)
        return x + self.o_proj(scores @ self.v_proj(h))


class Partial(nn.Module):
    """Three blocks, a tower for a second input, a pooler, an index, experts; ``flaw`` says what goes wrong in the forward."""

    def __init__(self, flaw: str = ""):
        super().__init__()
        self.flaw = flaw
        self.layers = nn.ModuleList([Block() for _ in range(3)])
        self.tower = nn.ModuleList([Block() for _ in range(2)])
        self.index = nn.Linear(W, W)
        self.experts = nn.ModuleList([nn.Linear(W, W) for _ in range(2)])
        self.unused = nn.Linear(W, W)
        self.pooler = nn.Linear(W, W)
        self.head = nn.Linear(W, 3)

    def forward(self, x: Tensor, other: Tensor | None = None, drop: int = -1) -> dict[str, Tensor]:
        if other is not None:
            first = self.tower[0](other)
            self.tower[1](first)  # as LLaVA's last vision block, of which nobody reads the output
            x = x + first
        order = self.index(x).sum(-1).topk(2, dim=-1).indices  # integers carry no gradient
        x = x + torch.zeros_like(x).scatter(1, order[..., None].expand(-1, -1, W), 1.0)
        for i, layer in enumerate(self.layers):
            if i == drop:
                continue
            if self.flaw == "checkpoint":
                x = checkpoint(layer, x, use_reentrant=True)
            else:
                x = layer(x)
            if self.flaw == "detached inside" and i == 1:
                x = x.detach()
        x = x + self.experts[0](x)
        return {"logits": self.head(x), "pooled": torch.tanh(self.pooler(x[:, 0]))}


def partial(flaw: str = "") -> Partial:
    torch.manual_seed(0)
    return Partial(flaw)


X = torch.randn(2, 4, W, generator=torch.Generator().manual_seed(1))
