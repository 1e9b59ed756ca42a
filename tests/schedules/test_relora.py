"""ReLoRA: restarts leave the output, ranks add up, the base comes back (arXiv 2307.05695)."""

from __future__ import annotations

import pytest
import torch
from small_blocks import adamw, batch, loss, net, scheduled, steps
from torch import nn

import trimtab as tt
from trimtab.schedules import optim
from trimtab.schedules.relora import jagged_cosine


def stored(module: nn.Module) -> torch.Tensor:
    """The base's own weight; ``module.weight`` reads adapted."""
    return module._parameters["weight"]


def test_the_jagged_cosine():
    found = [jagged_cosine(t, steps=1000, warmup=100, every=250, rewarm=50) for t in (0, 50, 100, 249, 250, 275, 300, 500)]
    assert found == pytest.approx([0, 0.5, 1, 0.9405, 0, 0.4474, 0.8947, 0], abs=1e-4)


def test_a_restart_leaves_the_output_and_the_gradient_of_a_is_zero():
    model = net(dtype=torch.float64)
    optimizer = adamw(model)
    with scheduled(model, optimizer, tt.ReLoRA(every=100, rewarm=0)) as s:
        steps(model, optimizer, s, range(3))
        x, weights = batch(99)[0], [stored(m).clone() for m in model.modules() if isinstance(m, nn.Linear)]
        before = model(x)
        s.schedules[0].restart()
        torch.testing.assert_close(model(x), before)
        assert any(not torch.equal(a, stored(m)) for a, m in zip(weights, (m for m in model.modules() if isinstance(m, nn.Linear)),
                                                                 strict=True))  # fmt: skip
        adapter = s.adapters()[0]
        assert adapter.a.any() and not adapter.b.any()
        loss(model, batch(3)).backward()
        assert not adapter.a.grad.any() and adapter.b.grad.any()
        optimizer.zero_grad()
        with torch.no_grad():
            adapter.a.zero_()
        loss(model, batch(3)).backward()
        assert not adapter.a.grad.any() and not adapter.b.grad.any()  # the release's start: nothing learns
        optimizer.zero_grad()


def test_ranks_add_up_and_the_base_comes_back():
    model = net(tt.LoRA(rank=2), dtype=torch.float64)
    base = {key: value.clone() for key, value in model.state_dict().items() if "trimtab" not in key}
    optimizer = adamw(model)
    with scheduled(model, optimizer, tt.ReLoRA(every=2, rewarm=1)) as s:
        steps(model, optimizer, s, range(6))
        assert len(s.schedules[0].history) == 2  # before steps 3 and 5, counted from 0
        x = batch(99)[0]
        before = model(x)
        with s.weights():
            torch.testing.assert_close(model(x), before)
            assert all(torch.equal(model.state_dict()[key], value) for key, value in base.items())
        assert torch.equal(model(x), before)
    torch.testing.assert_close(model(x), before)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in base.items())
    adapter = s.adapters()[0]
    assert adapter.a.shape == (6, 8) and adapter.b.shape == (8, 6) and adapter.resized
    assert torch.linalg.matrix_rank(adapter.b @ adapter.a) == 6
    steps(model, torch.optim.SGD(tt.parameters(model), lr=0.1), None, [0])  # an ordinary adapter, which trains on


def test_what_is_delivered_is_saved_and_loaded(tmp_path):
    model = net(tt.RsLoRA(rank=2), head=False)
    optimizer = adamw(model)
    with scheduled(model, optimizer, tt.ReLoRA(every=3, rewarm=0)) as s:
        steps(model, optimizer, s, range(8))
    want, x = model(batch(99)[0]), batch(99)[0]
    tt.save(model, tmp_path / "a")
    tt.save(model, tmp_path / "peft", format="peft")
    for folder in ("a", "peft"):
        tt.detach(model, "default")
        tt.load(model, tmp_path / folder)
        torch.testing.assert_close(model(x), want)


def test_fused_rows_are_merged_one_after_the_other():
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_heads = 1
            self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x):
            q, k, v = self.qkv(x).chunk(3, -1)
            return self.proj(torch.softmax(q @ k.mT, -1) @ v)

    torch.manual_seed(0)
    model, x = nn.Sequential(Fused()), torch.randn(2, 3, 8)
    tt.attach(model, tt.LoRA(rank=2), targets="attn.q | attn.v")
    weight = stored(model[0].qkv).clone()
    optimizer = torch.optim.SGD(tt.parameters(model), lr=0.01)
    with tt.scheduled(model, optimizer, tt.ReLoRA(every=2, rewarm=0)) as s:
        for _ in range(5):
            before = model(x)
            before.square().sum().backward()
            s.step()
        s.begin()
        out = model(x)
        assert not torch.equal(stored(model[0].qkv), weight)
        with s.weights():
            torch.testing.assert_close(model(x), out)
            assert torch.equal(stored(model[0].qkv), weight)
    torch.testing.assert_close(model(x), out)
    assert torch.equal(stored(model[0].qkv), weight)


def test_an_error_leaves_the_base_as_it_was():
    model = net()
    base = {key: value.clone() for key, value in model.state_dict().items() if "trimtab" not in key}
    optimizer = adamw(model)
    with pytest.raises(KeyError), scheduled(model, optimizer, tt.ReLoRA(every=2, rewarm=0)) as s:
        steps(model, optimizer, s, range(4))
        raise KeyError
    assert all(torch.equal(model.state_dict()[key], value) for key, value in base.items())


def test_the_rate_rises_again():
    model = net()
    optimizer, seen = torch.optim.SGD(tt.parameters(model), lr=1.0), []
    with scheduled(model, optimizer, tt.ReLoRA(every=4, rewarm=2)) as s:
        optimizer.register_step_pre_hook(lambda o, *_: seen.append(o.param_groups[0]["lr"]))
        steps(model, optimizer, s, range(10))
        assert optimizer.param_groups[0]["lr"] == 1.0
    assert seen == [1, 1, 1, 1, 0, 0.5, 1, 1, 0, 0.5]


@pytest.mark.parametrize("by", ["random", "magnitude"])
def test_moments_are_pruned(by):
    p, rest = nn.Parameter(torch.randn(100, 100)), nn.Parameter(torch.randn(3))
    optimizer = torch.optim.AdamW([p, rest])
    p.grad, rest.grad = torch.randn(100, 100), torch.randn(3)
    optimizer.step()
    before = {key: value.clone() for key, value in optimizer.state[p].items()}
    optim.reset_state(optimizer, [p], prune=0.9, by=by, rng=torch.Generator().manual_seed(0))
    for key in ("exp_avg", "exp_avg_sq"):
        left = optimizer.state[p][key] != 0
        assert left.float().mean().item() == pytest.approx(0.1, abs=0.02)
        if by == "magnitude":
            assert before[key][left].abs().min() >= before[key][~left].abs().max()
    assert optimizer.state[p]["step"] == 1 and optimizer.state[rest]["exp_avg"].all()
    optim.reset_state(optimizer, [p])
    assert not optimizer.state[p]["exp_avg"].any()


def test_bad_input():
    for wrong in ({"every": 0}, {"every": 5, "rewarm": 5}, {"prune": 2.0}, {"by": "size"}):
        with pytest.raises(ValueError, match="every" if "every" in wrong else "prune"):
            tt.ReLoRA(**wrong)
    for method in (tt.DoRA(rank=2), tt.PiSSA(rank=2), tt.IA3()):
        model = net(method)
        with pytest.raises(tt.Unsupported, match="added to W"):
            scheduled(model, adamw(model), tt.ReLoRA())
    model = nn.ModuleDict({"embed": nn.Embedding(9, 8), "head": nn.Linear(8, 9, bias=False)})
    model["head"].weight = model["embed"].weight
    tt.attach(model, tt.LoRA(rank=2), targets=["head"])
    with pytest.raises(tt.Unsupported, match="tied"):
        tt.scheduled(model, adamw(model), tt.ReLoRA())
