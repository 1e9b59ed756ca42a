"""Schedules beside plain loops over the same steps: which layers IST draws, and when AdaLoRA takes which ranks."""

from __future__ import annotations

import math
from typing import Any

import torch
from small_blocks import adamw, net, scheduled, steps

import trimtab as tt
from trimtab.methods.reparameterized.adalora import AdaLoRAAdapter


def test_ist_lets_the_important_layers_learn_not_the_redundant_ones():
    """Weights are ``sigmoid(-I)``: at ``I = (9, 9, -9, -9)`` two layers are all but sure."""
    model = net()
    drawn = []
    with scheduled(model, adamw(model), tt.IST(updated=2, suppressed=1, candidates=2, interval=10**6), steps=10**6 + 1) as s:
        ist = s.schedules[0]
        assert len(ist.layers) == 4
        ist.redundancy = torch.tensor([9.0, 9.0, -9.0, -9.0], dtype=torch.float64)
        for _ in range(20):
            ist.step_begin()
            drawn.append(ist.chosen)
            learns = [i for i, layer in enumerate(ist.layers) if all(p.requires_grad for p in layer)]
            assert learns == ist.chosen
    assert drawn == [[2, 3]] * 20


def test_ist_suppresses_the_redundant_layers_when_it_probes():
    model = net()
    with scheduled(model, adamw(model), tt.IST(updated=2, suppressed=2, candidates=2), steps=100) as s:
        s.schedules[0].redundancy = torch.tensor([9.0, 9.0, -9.0, -9.0], dtype=torch.float64)
        firsts = [s.schedules[0]._candidates()[0] for _ in range(20)]
    assert firsts == [[0, 1]] * 20


def test_ist_s_scores_move_by_the_losses_of_its_probes():
    """Layer 0's suppression costs most, so its redundancy falls and it learns more often."""
    model = net()
    with scheduled(model, adamw(model), tt.IST(updated=1, suppressed=1, candidates=4), steps=100) as s:
        ist = s.schedules[0]
        ist._losses = lambda sets: torch.tensor([3.0 if 0 in each else 1.0 for each in sets])
        ist.update()
        scores = ist.redundancy
    # by hand: r = exp(-L) - mean, and I = 10 r / 4 for the layer that each set suppresses
    gains = [math.exp(-3.0), *[math.exp(-1.0)] * 3]
    expected = [2.5 * (g - sum(gains) / 4) for g in gains]
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=1e-6)
    assert int(ist.importance.argmax()) == 0


class Before(tt.Schedule):
    """Notes factors and gradients of AdaLoRA's places after the optimizer's step, before the budget is given out."""

    def step_end(self) -> None:
        super().step_end()
        found = [m for m in self.model.modules() if isinstance(m, AdaLoRAAdapter)]
        self.seen: list[Any] = [[(f.detach().clone(), f.grad.clone()) for f in (m.e, m.q, m.p)] for m in found]


def test_adalora_takes_ranks_at_the_very_step_by_averages_of_all_steps_so_far():
    """Algorithm 1, written out with floats: the masks of every step, none a step late."""
    total, warmup, final, beta, rank, target = 9, 2, 2, 0.85, 4, 2
    model = net(tt.AdaLoRA(rank=rank, penalty=0.0), moved=True, head=False)
    places = [m for m in model.modules() if isinstance(m, AdaLoRAAdapter)]
    optimizer, before = adamw(model, 0.05), Before()
    schedule = tt.BudgetSchedule(target=target, warmup=warmup, final=final, shrink=False)
    most, least = rank * len(places), target * len(places)
    budgets = [most] * warmup
    budgets += [math.floor(least + (most - least) * (1 - (t - warmup) / (total - final - warmup)) ** 3) for t in (3, 4, 5, 6, 7)]
    budgets += [least] * final
    assert budgets[2] < most and budgets[6] == least
    average: list[Any] = [[torch.zeros_like(f) for f in (m.e, m.q, m.p)] for m in places]
    spread: list[Any] = [[torch.zeros_like(f) for f in (m.e, m.q, m.p)] for m in places]
    with scheduled(model, optimizer, before, schedule, steps=total) as s:
        for step in range(1, total + 1):
            steps(model, optimizer, s, [step - 1])
            if step < total - final:
                for i, place in enumerate(before.seen):
                    for j, (factor, gradient) in enumerate(place):
                        new = (factor * gradient).abs()
                        average[i][j] = beta * average[i][j] + (1 - beta) * new
                        spread[i][j] = beta * spread[i][j] + (1 - beta) * (new - average[i][j]).abs()
            if warmup < step <= total - final:
                scores = []
                for means, spreads in zip(average, spread, strict=True):
                    e, q, p = (a * u for a, u in zip(means, spreads, strict=True))
                    scores += [float(e[r, 0] + q[r].sum() / q.shape[1] + p[:, r].sum() / p.shape[0]) for r in range(rank)]
                best = sorted(range(most), key=lambda k: scores[k], reverse=True)[: budgets[step - 1]]
                expected = torch.tensor([k in best for k in range(most)])
            elif step <= warmup:
                expected = torch.ones(most, dtype=torch.bool)
            found = torch.cat([m.e[:, 0] != 0 for m in places])
            assert torch.equal(found, expected), step
            assert int(found.sum()) == budgets[step - 1]
            assert schedule.importance.seen == min(step, total - final - 1), step  # the step of the final choice is not taken in


def test_light_peft_s_ratios_are_means_over_tokens_and_its_scores_over_entries_and_steps():
    from trimtab.schedules.spare import ModuleRatios, RankScores

    model = net(tt.LoRA(rank=2), moved=True)
    adapters = [m for m in model.modules() if type(m).__name__ == "LoRAAdapter"][:2]
    ratios, scores = ModuleRatios(adapters), RankScores(adapters)
    for delta, base in (([3.0, 1.0], [2.0, 2.0]), ([1.0, 1.0], [4.0, 4.0])):
        ratios.add(adapters[0], torch.tensor(delta), torch.tensor(base))
        ratios.take()
    assert ratios.means().tolist() == [(1.5 + 0.5 + 0.25 + 0.25) / 4, 0.0]
    for factor in (1.0, 3.0):
        for adapter in adapters:
            adapter.a.grad, adapter.b.grad = torch.full_like(adapter.a, factor), torch.zeros_like(adapter.b)
        scores.take()
    by_hand = [[2.0 * abs(sum(row) / len(row)) for row in adapter.a.tolist()] for adapter in adapters]  # the mean of 1 and 3
    for found, expected in zip(scores.means(), by_hand, strict=True):
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-7)
