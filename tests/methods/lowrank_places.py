"""One linear layer with an adapter, and the layers whose parameter counts are published."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import trimtab as tt


def adapted(
    config: tt.MethodConfig,
    *,
    out: int = 12,
    fan_in: int = 16,
    dtype: torch.dtype = torch.float64,
    moved: bool = False,
    seed: int = 0,
    bias: bool = True,
    **more: object,
) -> tuple[nn.Sequential, nn.Module, Tensor]:
    """``(model, adapter, W)``: one Linear under ``config``; ``moved``: every parameter a random step away from its start."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(fan_in, out, bias=bias, dtype=dtype))
    W = model[0].weight.detach().clone()
    tt.attach(model, config, targets="0", rng=torch.Generator().manual_seed(seed), **more)
    adapter = next(m for m in model.modules() if isinstance(m, tt.Reparameterization))
    if moved:
        with torch.no_grad():
            for p in adapter.parameters():
                p.add_(0.3 * torch.randn_like(p))
    return model, adapter, W


def llama_count(config: tt.MethodConfig) -> int:
    """Trainable numbers on q_proj and v_proj of Llama-3.2-3B (28 layers; 3072 -> 3072 and 3072 -> 1024), from shapes alone."""
    with torch.device("meta"):
        blocks = [
            nn.ModuleDict({"q_proj": nn.Linear(3072, 3072, bias=False), "v_proj": nn.Linear(3072, 1024, bias=False)})
            for _ in range(28)
        ]
    model = nn.ModuleList(blocks)
    tt.attach(model, config, targets=["q_proj", "v_proj"])
    return sum(p.numel() for p in tt.parameters(model))
