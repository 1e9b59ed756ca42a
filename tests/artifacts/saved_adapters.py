"""A small net, and adapters of it on disk."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import trimtab as tt

X = torch.arange(12).reshape(3, 4) % 11


class Layer(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.attn = nn.Module()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.attn.add_module(name, nn.Linear(width, width))
        self.up_proj, self.down_proj = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        a = self.attn
        x = x + a.o_proj(torch.tanh(a.q_proj(x)) * a.k_proj(x) + a.v_proj(x))
        return x + self.down_proj(torch.relu(self.up_proj(self.norm(x))))


class Net(nn.Module):
    """Two blocks with the field's usual names, an embedding and a head."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.layers = nn.ModuleList([Layer(width) for _ in range(2)])
        self.lm_head = nn.Linear(width, 11, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


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
