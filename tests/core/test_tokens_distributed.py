"""Two processes on the CPU (gloo): learned tokens train under DDP and FSDP2 as in one process."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

import trimtab as tt
from token_models import VOCABULARY, bert, llama

METHODS = {
    "prefix": tt.PrefixTuning(tokens=2, std=1.0),
    "prompt": tt.PromptTuning(tokens=2),
    "deep": tt.VPT(tokens=2),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = {"llama": llama, "bert": bert}[name]()
    for adapter, method in METHODS.items():
        tt.attach(model, method, name=adapter, rng=torch.Generator().manual_seed(1))
    return model


def data() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(2))


def train(model: nn.Module, ids: torch.Tensor) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=ids).logits.pow(2).mean().backward()
        optimizer.step()


def work(rank: int, port: int, kind: str, name: str, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    try:
        model = build(name)
        if kind == "ddp":
            model = nn.parallel.DistributedDataParallel(model)
        else:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh("cpu", (2,))
            for block in tt.core.anatomy.of(model).blocks:
                fully_shard(model.get_submodule(block), mesh=mesh)
            fully_shard(model, mesh=mesh)
        train(model, data()[2 * rank : 2 * rank + 2])
        for adapter in METHODS:
            tt.save(model, os.path.join(folder, f"{rank}-{adapter}"), name=adapter)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_two_processes_equal_one(kind: str, name: str, tmp_path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(work, args=(port, kind, name, str(tmp_path)), nprocs=2)
    one = build(name)
    train(one, data())
    for rank in range(2):
        fresh = build(name)
        for adapter in METHODS:
            tt.detach(fresh, adapter)
        for adapter in METHODS:
            tt.load(fresh, tmp_path / f"{rank}-{adapter}", active=True)
        with torch.no_grad():
            torch.testing.assert_close(fresh(data()).logits, one(data()).logits, atol=1e-4, rtol=1e-4)
