"""A small net, and adapters of it on disk."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import trimtab as tt
from core.small_net import Net

X = torch.arange(12).reshape(3, 4) % 11


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().eval()


def shake(model: nn.Module, seed: int, size: float = 0.2) -> None:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tt.parameters(model):
            parameter.add_(size * torch.randn(parameter.shape, generator=g))


def adapter(folder: Path, method: tt.MethodConfig, seed: int, targets: str | None = "attn.q | mlp.down", *, model=None) -> Path:
    """A trained-looking adapter, saved; its name is the folder's."""
    model = net() if model is None else model
    rng = torch.Generator().manual_seed(seed)
    tt.attach(model, method, targets=targets, rng=rng, name=folder.name)
    shake(model, seed)
    return tt.save(model, folder, name=folder.name)


def weights(folders: list[Path], paths: list[str], *, make=net) -> list[list[Tensor]]:
    """What each adapter alone makes of the weight at each path, (out, in)."""
    found = []
    for folder in folders:
        model = make()
        name = tt.load(model, folder)
        acting = model.__dict__["_trimtab_state"].hosts
        found.append([tt.effective_weight(model, p, name) if p in acting else model.get_submodule(p).weight for p in paths])
    return found


def dense_sum(folders: list[Path], factors: list[float], path: str, *, make=net) -> Tensor:
    """``sum_i w_i (W_i - W)`` at one place, from dense weights in float64."""
    W = make().get_submodule(path).weight.detach().double()
    return sum(w * (each[0].double() - W) for w, each in zip(factors, weights(folders, [path], make=make), strict=True))


def merged_update(folder: Path, path: str, *, make=net) -> Tensor:
    """``W' - W`` of a saved adapter, float64."""
    return dense_sum([folder], [1.0], path, make=make)
