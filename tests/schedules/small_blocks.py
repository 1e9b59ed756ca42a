"""A small model of blocks for the tests of schedules, its data, and a plain loop with and without schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import trimtab as tt

WIDTH = 8


class Block(nn.Module):
    """A norm, attention of one head, and a feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in ("q_proj", "k_proj", "v_proj", "o_proj")})
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (self.attn[name](h)[:, None] for name in ("q_proj", "k_proj", "v_proj"))
        x = x + self.attn["o_proj"](F.scaled_dot_product_attention(q, k, v)[:, 0])
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Net(nn.Module):
    """Embedding, blocks, head."""

    def __init__(self, blocks: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(blocks)])
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, ids: Tensor) -> Tensor:
        """(n, tokens) to (n, 3)."""
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def net(method: tt.MethodConfig | None = None, *, blocks: int = 4, dtype: torch.dtype = torch.float32, head: bool = True,
        moved: bool = False, **more: Any) -> Net:  # fmt: skip
    """The model with ``method`` (LoRA of rank 2 if None) in its blocks, and a head that learns; ``moved`` off its start."""
    torch.manual_seed(0)
    model = Net(blocks).to(dtype)
    rng = torch.Generator().manual_seed(1)
    method = method or tt.LoRA(rank=2)
    if method.adapter_class.wants(method):
        more["loss"] = lambda m: loss(m, batch(0))
    tt.attach(model, method, rng=rng, **({"layers": range(blocks)} | more))
    if moved:
        with torch.no_grad():
            for p in tt.parameters(model):
                p.add_(0.3 * torch.randn(p.shape, generator=rng).to(p))
    if head:
        tt.attach(model, tt.Unfreeze(), targets=["head"], name="head", rng=rng)
    return model


def batch(step: int, rows: int = 8) -> tuple[Tensor, Tensor]:
    """(ids, labels): the label is the first id's remainder by 3."""
    ids = torch.randint(0, 20, (rows, 5), generator=torch.Generator().manual_seed(step))
    return ids, ids[:, 0] % 3


def loss(model: Callable[[Tensor], Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy."""
    return F.cross_entropy(model(batch[0]), batch[1])


PROBES = [batch(1000 + i, 6) for i in range(3)]


def adamw(model: nn.Module, rate: float = 1e-2) -> torch.optim.AdamW:
    return torch.optim.AdamW(tt.parameters(model), lr=rate, weight_decay=0.1)


def scheduled(model: nn.Module, optimizer: torch.optim.Optimizer, *given: tt.Schedule, **more: Any):
    return tt.scheduled(model, optimizer, *given, **({"loss": loss, "batches": PROBES} | more))


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, s: Any, numbers: Iterable[int], *, accumulation: int = 1) -> None:
    """Steps on the batches ``numbers``; ``s`` is a run, or None for a plain loop."""
    model.train()
    for number in numbers:
        ids, labels = batch(number)
        for part in zip(ids.chunk(accumulation), labels.chunk(accumulation), strict=True):
            value = loss(model, part) / accumulation
            value.backward()
        if s is None:
            optimizer.step()
            optimizer.zero_grad()
        else:
            s.step(value * accumulation)


def same(a: nn.Module, b: nn.Module) -> bool:
    """Whether two models have the same bits."""
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
