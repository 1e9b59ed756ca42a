"""IST against its arithmetic, exact draws, separate probes and a plain loop (arXiv 2410.11772)."""

from __future__ import annotations

import math
import warnings
from itertools import permutations

import pytest
import torch
from small_blocks import PROBES, WIDTH, Net, adamw, batch, loss, net, same, scheduled, steps
from torch import nn

import trimtab as tt
from trimtab.core.account import saved_bytes
from trimtab.core.activation import scaled
from trimtab.schedules import optim
from trimtab.schedules.ist import updated_scores
from trimtab.schedules.layers import draw


def zeros(n: int) -> torch.Tensor:
    return torch.zeros(n, dtype=torch.float64)


def test_the_update_s_arithmetic():
    losses = torch.tensor([1.0, 1.2, 0.9], dtype=torch.float64)
    first = updated_scores(zeros(4), [[0, 1], [0, 2], [2, 3]], losses, 10)
    torch.testing.assert_close(first, torch.tensor([-0.120055, 0.023329, -0.023329, 0.120055]).double(), atol=1e-6, rtol=0)
    weights = torch.sigmoid(-first)
    torch.testing.assert_close(weights, torch.tensor([0.529978, 0.494168, 0.505832, 0.470022]).double(), atol=1e-6, rtol=0)
    second = updated_scores(first, [[0, 1], [0, 2], [0, 3]], losses, 10)
    torch.testing.assert_close(second, torch.tensor([-0.120055, 0.046655, -0.166694, 0.239678]).double(), atol=1e-6, rtol=0)
    assert second[0] == pytest.approx(float(first[0]), abs=1e-15)  # in all sets: the rewards sum to zero


def test_a_layer_whose_suppression_hurts_is_trained_more():
    scores = updated_scores(zeros(3), [[0], [1], [2]], torch.tensor([2.0, 1.0, 1.0]), 10)
    ist = tt.IST()
    ist.redundancy = scores
    assert scores.argmin() == 0 and ist.importance.argmax() == 0 and torch.sigmoid(ist.importance)[0] > 0.5


def test_a_toy_landscape_s_order_is_found():
    costs = torch.tensor([3, 2, 1, 0.5, 0.2, 0.1, 0.05, 0], dtype=torch.float64)
    rng, scores = torch.Generator().manual_seed(0), zeros(8)
    for _ in range(500):
        sets: list[list[int]] = []
        while len(sets) < 3:
            new = draw(torch.sigmoid(scores), 4, rng)
            sets += [new] if new not in sets else []
        noise = 0.01 * torch.randn(3, generator=rng, dtype=torch.float64)
        scores = updated_scores(scores, sets, 1 + 0.1 * torch.stack([costs[s].sum() for s in sets]) + noise, 10)
    weights = torch.sigmoid(-scores)
    assert bool((weights[:4] > 0.6).all()) and bool((weights[4:] < 0.2).all())
    assert weights[:4].argsort(descending=True).tolist()[-1] == 3


def test_draws_are_sequential_without_replacement():
    weights = torch.sigmoid(-torch.tensor([2.0, 0, 0, -2.0], dtype=torch.float64))
    exact = zeros(4)
    for a, b in permutations(range(4), 2):
        p = weights[a] / weights.sum() * weights[b] / (weights.sum() - weights[a])
        exact[a] += p
        exact[b] += p
    torch.testing.assert_close(exact, torch.tensor([0.14624, 0.54593, 0.54593, 0.76191]).double(), atol=1e-5, rtol=0)
    rng, counts, n = torch.Generator().manual_seed(0), zeros(4), 20_000
    for _ in range(n):
        found = draw(weights, 2, rng)
        assert len(set(found)) == 2
        counts[found] += 1
    torch.testing.assert_close(counts / n, exact, atol=4 * 0.5 / math.sqrt(n), rtol=0)


@pytest.mark.parametrize(("layers", "chosen", "mean"), [(32, 8, 2.67), (24, 6, 2.57), (40, 10, 2.73)])
def test_the_lowest_layer_that_learns(layers, chosen, mean):
    rng = torch.Generator().manual_seed(0)
    found = [draw(torch.ones(layers), chosen, rng)[0] for _ in range(4000)]
    assert sum(found) / 4000 == pytest.approx(mean, abs=0.12)
    assert (layers + 1) / (chosen + 1) - 1 == pytest.approx(mean, abs=0.01)


def test_an_adapter_that_does_nothing_yet_moves_no_score():
    model = net()
    with scheduled(model, adamw(model), tt.IST(interval=2)) as s:
        ist = s.schedules[0]
        for _ in range(5):
            ist.update()
        assert torch.equal(ist.redundancy, zeros(4)) and torch.equal(ist.importance, -zeros(4))


def test_probing_leaves_no_trace():
    model = net(moved=True)
    model.blocks[1].eval()
    model.blocks[0].train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    with scheduled(model, adamw(model), tt.IST()) as s:
        torch.manual_seed(3)
        randomness = torch.get_rng_state()
        s.schedules[0].update()
        assert torch.equal(torch.get_rng_state(), randomness)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert all(m.scale is None for m in model.modules() if hasattr(m, "damped"))
    assert s.schedules[0].redundancy.any()


@pytest.mark.parametrize("method", [tt.LoRA(rank=2), tt.DoRA(rank=2), tt.IA3(), tt.OFT(block_size=4)], ids=lambda m: str(m)[:4])
def test_one_batched_probe_equals_separate_ones(method):
    found = []
    for batched in (False, True):
        model = net(method, moved=True, dtype=torch.float64)
        with scheduled(model, adamw(model), tt.IST(batched=batched)) as s:
            found.append(s.schedules[0]._losses([[0, 1], [1, 3], [2, 3]]))
    torch.testing.assert_close(*found)
    first = {path: 0.25 for path in model._trimtab_state.hosts if path.startswith(("blocks.0", "blocks.1"))}
    with torch.no_grad(), scaled(model.eval(), first):
        torch.testing.assert_close(found[0][0], loss(model, PROBES[0]).float())
    assert found[0].std() > 1e-5


def test_a_loss_without_rows_cannot_be_batched():
    model = net(moved=True)
    scalar = lambda m, b: m(b[0]) if isinstance(m, nn.Module) else m(b[0].sum())  # noqa: E731
    with scheduled(model, adamw(model), tt.IST(batched=True), loss=scalar) as s, pytest.raises((tt.Unsupported, StopIteration)):
        s.schedules[0].update()


def test_layers_at_rest_stay_to_the_bit():
    """With momentum built up and weight decay on."""
    model = net()
    optimizer = adamw(model)
    with scheduled(model, optimizer, tt.IST(uniform=True)) as s:
        steps(model, optimizer, s, range(8))
        held = [p for group in optimizer.param_groups for p in group["params"]]
        before = {id(p): p.detach().clone() for p in held}
        steps(model, optimizer, s, [8])
        moved = {id(p) for p in held if not torch.equal(p, before[id(p)])}
        (chosen,) = s.schedules[0].chosen
        assert moved == {id(p) for p in s.schedules[0].layers[chosen]} | {id(p) for p in tt.parameters(model, "head")}
    assert all(p.requires_grad for p in held)


def test_why_gradients_must_be_none():
    """Momentum moves a parameter whose gradient is zero, and not one whose gradient is none."""
    found = []
    for gradient in (None, torch.zeros(1)):
        p = nn.Parameter(torch.ones(1))
        optimizer = torch.optim.AdamW([p], lr=0.1, weight_decay=0.1)
        p.grad = torch.ones(1)
        optimizer.step()
        p.grad = gradient
        optimizer.step()
        found.append(p.item())
    assert found == pytest.approx([0.8900, 0.8141], abs=1e-3)


def test_all_layers_without_probes_is_plain_training():
    plain, whole = net(), net()
    optimizers = adamw(plain), adamw(whole)
    steps(plain, optimizers[0], None, range(5))
    with scheduled(whole, optimizers[1], tt.IST(updated=1.0, uniform=True)) as s:
        steps(whole, optimizers[1], s, range(5))
    assert same(plain, whole)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_one_choice_a_step(accumulation):
    model = net()
    optimizer, chosen = adamw(model), []
    with scheduled(model, optimizer, tt.IST(updated=2, interval=2)) as s:
        ist = s.schedules[0]
        for step in range(6):
            steps(model, optimizer, s, [step], accumulation=accumulation)
            chosen.append(ist.chosen)
    again = torch.Generator().manual_seed(0)
    assert len({tuple(c) for c in chosen}) > 1 and chosen[0] == draw(torch.full((4,), 0.5), 2, again)


def test_what_is_kept_for_backward():
    """Nothing below the lowest layer that learns; nothing for the adapters of those at rest above it."""
    kept = {}
    model = net(tt.LoRA(rank=2), head=False)
    x = batch(0, rows=64)
    for learn in ([0, 1, 2, 3], [0], [1], [3]):
        for i, block in enumerate(model.blocks):
            for name, p in block.named_parameters():
                p.requires_grad_(i in learn and "trimtab" in name)
        with saved_bytes(model) as saved:
            loss(model, x)
        kept[tuple(learn)] = saved.total
    # an adapter's own: h of q, k, v, the inputs of fc1 and fc2; o's is kept by attention anyway. At rest six stand-ins of 4 bytes
    assert kept[0, 1, 2, 3] - kept[0,] == 3 * (64 * 5 * 4 * (1 + 1 + 2) * WIDTH - 6 * 4)
    assert kept[1,] - kept[3,] == 2 * (kept[0,] - kept[1,]) > 0


@pytest.mark.parametrize("state", ["keep", "cpu", "drop"])
def test_the_optimizer_s_state(state):
    model = net(head=False)
    optimizer = adamw(model)
    with scheduled(model, optimizer, tt.IST(uniform=True, state=state)) as s:
        steps(model, optimizer, s, range(12))
        have = {i for i, ps in enumerate(s.schedules[0].layers) if any(p in optimizer.state for p in ps)}
        assert have == (set(s.schedules[0].chosen) if state == "drop" else {0, 1, 2, 3})


def test_moments_move_with_their_parameters():
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([p, q])
    p.grad = q.grad = torch.ones(3)
    optimizer.step()
    optim.move_state(optimizer, [p], "meta")
    assert optimizer.state[p]["exp_avg"].is_meta and not optimizer.state[q]["exp_avg"].is_meta
    assert not optimizer.state[p]["step"].is_meta


def test_a_loss_that_is_not_finite_is_left_out():
    model = net(moved=True)
    with scheduled(model, adamw(model), tt.IST(), loss=lambda m, b: loss(m, b) * float("nan")) as s:
        with pytest.warns(UserWarning, match="leaves its scores as they are"):
            s.schedules[0].update()
        assert not s.schedules[0].redundancy.any()


def test_gradient_checkpointing_changes_nothing():
    found = []
    for checkpointing in (False, True):
        model = net(blocks=4)
        if checkpointing:
            for block in model.blocks:
                block.forward = lambda x, f=block.forward: torch.utils.checkpoint.checkpoint(f, x, use_reentrant=False)
        optimizer = adamw(model)
        with scheduled(model, optimizer, tt.IST(updated=2, interval=2)) as s:
            steps(model, optimizer, s, range(5))
        found.append(model)
    for a, b in zip(found[0].parameters(), found[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_bad_input():
    for wrong, message in (({"factor": 1.0}, "factor"), ({"factor": -0.1}, "factor"), ({"interval": 0}, "interval"),
                           ({"candidates": 1}, "candidates"), ({"rate": 0.0}, "rate")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            tt.IST(**wrong)

    def start(ist: tt.IST, model: nn.Module | None = None, **more) -> None:
        model = model or net()
        scheduled(model, adamw(model), ist, **more)

    for ist, message in (
        (tt.IST(updated=5), "updated = 5 means 5 of 4 layers"),
        (tt.IST(updated=0.1), "updated = 0.1 means 0 of 4 layers"),
        (tt.IST(suppressed=4), "1 sets of 4 of 4 layers, fewer than candidates = 3"),
        (tt.IST(state="away"), "state must be one of keep, cpu, drop"),
    ):
        with pytest.raises(ValueError, match=message):
            start(ist)
    with pytest.raises(ValueError, match="uniform=True"):
        start(tt.IST(), loss=None, batches=None)
    with pytest.raises(ValueError, match="2 have no adapter that learns, first blocks.2"):
        start(tt.IST(), net(layers=[0, 1]))
    model = Net()
    tt.attach(model, tt.LoRA(rank=2), targets=["head"])
    with pytest.raises(tt.Unsupported, match="none of them has one"):
        start(tt.IST(), model)
    model = net()
    few = torch.optim.AdamW(model.head.trimtab.parameters())
    with pytest.raises(RuntimeError, match="lacks parameters of"):
        scheduled(model, few, tt.IST())
    with pytest.raises(RuntimeError, match="drive it by tt.scheduled"):
        tt.IST().start(net(), steps=3)


def test_an_optimizer_that_moves_what_has_no_gradient_is_refused():
    class Eager(torch.optim.SGD):
        def step(self, closure=None):
            with torch.no_grad():
                for group in self.param_groups:
                    for p in group["params"]:
                        p.mul_(0.9)

    model = net()
    optimizer = Eager(tt.parameters(model), lr=0.1)
    with pytest.raises(RuntimeError, match="Eager moved parameters that have no gradient"), warnings.catch_warnings():
        with scheduled(model, optimizer, tt.IST(uniform=True)) as s:
            steps(model, optimizer, s, [0])
