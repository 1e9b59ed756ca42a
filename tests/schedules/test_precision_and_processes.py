"""Schedules with a gradient scaler, and in two processes."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.multiprocessing as mp
from small_blocks import adamw, batch, loss, net, same, scheduled, steps

import trimtab as tt


class Seen(tt.Schedule):
    """Counts moments, and keeps the gradients that it is shown."""

    def __init__(self) -> None:
        self.stepped, self.skipped, self.gradients = 0, 0, []

    def backward_end(self) -> None:
        self.gradients.append([p.grad.clone() for p in tt.parameters(self.model)])

    def step_end(self) -> None:
        super().step_end()
        self.stepped += 1

    def step_skipped(self) -> None:
        super().step_skipped()
        self.skipped += 1


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("ours", [True, False])
def test_a_gradient_scaler(fused: bool, ours: bool):
    """Gradients are shown unscaled; a step whose gradients are infinite is skipped, and nothing counts it."""
    plain, scaled = net(), net()
    reference, seen = Seen(), Seen()
    optimizer = torch.optim.AdamW(tt.parameters(plain), lr=1e-2, fused=fused)
    with scheduled(plain, optimizer, reference) as s:
        steps(plain, optimizer, s, [0, 2])
    optimizer = torch.optim.AdamW(tt.parameters(scaled), lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with scheduled(scaled, optimizer, seen, scaler=scaler if ours else None) as s:
        for step, factor in ((0, 1.0), (1, float("inf")), (2, 1.0)):
            before = [p.detach().clone() for p in tt.parameters(scaled)]
            scaler.scale(loss(scaled, batch(step)) * factor).backward()
            if not ours:
                scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
            s.step()
            optimizer.zero_grad()
            assert (factor == 1.0) != all(torch.equal(a, b) for a, b in zip(tt.parameters(scaled), before, strict=True))
    assert (seen.stepped, seen.skipped, seen.step) == ((2, 1, 3) if ours or not fused else (3, 0, 3))
    if ours or not fused:
        for a, b in zip(reference.gradients, seen.gradients, strict=True):
            for x, y in zip(a, b, strict=True):
                torch.testing.assert_close(x, y)


def test_scores_of_a_skipped_step_do_not_count():
    model = net(tt.AdaLoRA(rank=3), moved=True, head=False)
    optimizer = adamw(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with scheduled(model, optimizer, tt.BudgetSchedule(target=2), steps=10, scaler=scaler) as s:
        budget = s.schedules[0]
        scaler.scale(loss(model, batch(0)) * float("inf")).backward()
        s.step()
        assert budget.importance.seen == 0 and budget.step == 1
        scaler.scale(loss(model, batch(0))).backward()
        s.step()
        assert budget.importance.seen == 1 and budget.step == 2


def work(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    try:
        model = train(rank)
        torch.save({key: value for key, value in model.state_dict().items() if "trimtab" in key}, f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def train(rank: int | None) -> torch.nn.Module:
    """Six steps; in process ``rank`` on its half of every batch, or in one process on whole batches.

    Without the penalty: DDP's ranks are cut at the end of the run, and until then they count in its norm.
    """
    model = net(tt.AdaLoRA(rank=3, penalty=0.0), moved=True)
    called = model if rank is None else torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.SGD(tt.parameters(model), lr=0.1)  # Adam's first steps follow the signs of rounding errors
    given = tt.IST(updated=2, interval=2), tt.BudgetSchedule(target=2, final=2), tt.CheckpointAveraging(by="step", every=1, last=3)
    with scheduled(called, optimizer, *given, steps=6) as s:
        for step in range(6):
            ids, labels = batch(step)
            part = slice(None) if rank is None else slice(4 * rank, 4 * rank + 4)
            loss(called, (ids[part], labels[part])).backward()
            s.step()
    return model


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """Layers that rest, scores from the probes and from gradients, ranks that are cut, an average."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(work, args=(port, str(tmp_path)), nprocs=2)
    one = train(None).state_dict()
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for key, value in both[0].items():
        assert torch.equal(value, both[1][key])
        torch.testing.assert_close(value, one[key], atol=1e-4, rtol=1e-3)


def test_ddp_must_expect_parameters_at_rest():
    model = net()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    try:
        ddp = torch.nn.parallel.DistributedDataParallel(model)
        with pytest.raises(tt.Unsupported, match="find_unused_parameters=True"):
            scheduled(ddp, adamw(model), tt.IST())
        with scheduled(ddp, adamw(model), tt.LoRAPlus()) as s:
            steps(ddp, s.optimizer, s, range(2))
            with pytest.raises(tt.Unsupported, match="inside DDP"):
                s.slice_rank(s.adapters()[0], torch.tensor([0]))
    finally:
        torch.distributed.destroy_process_group()
    assert not same(model, net())
