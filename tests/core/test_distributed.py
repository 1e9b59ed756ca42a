"""Two processes on the CPU (gloo): DDP and FSDP2 train as one process does, and a save has no empty tensor."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

import trimtab as tt


def build() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    tt.attach(model, tt.LoRA(rank=2), targets=["0", "2"], rng=torch.Generator().manual_seed(1))
    return model


def data() -> torch.Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(2))


def train(model: nn.Module, x: torch.Tensor) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        (model(x) - 1).pow(2).mean().backward()
        optimizer.step()


def work(rank: int, port: int, kind: str, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    try:
        model = build()
        if kind == "ddp":
            model = nn.parallel.DistributedDataParallel(model)
        else:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh("cpu", (2,))
            for child in (model[0], model[2]):
                fully_shard(child, mesh=mesh)
            fully_shard(model, mesh=mesh)
        train(model, data()[2 * rank : 2 * rank + 2])
        tt.save(model, os.path.join(folder, str(rank)))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_equal_one(kind: str, tmp_path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(work, args=(port, kind, str(tmp_path)), nprocs=2)
    one = build()
    train(one, data())
    for rank in range(2):
        fresh = build()
        tt.detach(fresh, "default")
        tt.load(fresh, tmp_path / str(rank))
        with torch.no_grad():
            assert torch.allclose(fresh(data()), one(data()), atol=1e-5)
