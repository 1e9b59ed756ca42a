"""Two small checkpoints on disk, and an adapter that was moved away from its start."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import trimtab as tt
from core.small_net import Net, net


def write_pair(folder: Path, tuned: dict[str, Tensor], base: dict[str, Tensor] | None = None) -> tuple[Path, Path]:
    """``tuned.safetensors`` and ``base.safetensors`` (zeros if left out)."""
    folder.mkdir(parents=True, exist_ok=True)
    base = {key: torch.zeros_like(value) for key, value in tuned.items()} if base is None else base
    for name, tensors in (("tuned", tuned), ("base", base)):
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / f"{name}.safetensors")
    return folder / "tuned.safetensors", folder / "base.safetensors"


def move(model: torch.nn.Module, seed: int, size: float = 0.1, name: str = "default") -> None:
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in tt.parameters(model, name):
            value.add_(size * torch.randn(value.shape, generator=rng))


def adapter(folder: Path, method: tt.MethodConfig | None = None, *, seed: int = 3, moved: int = 4, size: float = 0.1) -> Path:
    """An adapter of ``net()`` on attention and feed-forward, away from its start."""
    model: Net = net()
    tt.attach(model, method or tt.LoRA(rank=2), rng=torch.Generator().manual_seed(seed))
    move(model, moved, size)
    return tt.save(model, folder)
