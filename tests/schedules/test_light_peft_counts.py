"""Light-PEFT: how many units, modules and ranks a share takes, ours and the authors'."""

from __future__ import annotations

import math

import pytest
import torch
from cut_models import build

import trimtab as tt
from trimtab.core.state import state_of
from trimtab.schedules.light_peft import LightPEFT


@pytest.mark.parametrize("official", [False, True])
def test_counts_as_the_authors_take_them(official):
    """Of n a share p takes ``floor(p (n - 1)) + 1`` with the authors' quantile, by hand: the strict comparison itself."""
    model = build("llama, a key for two queries").float().train()
    tt.attach(model, tt.LoRA(rank=4), targets="attention | mlp", rng=torch.Generator().manual_seed(1))
    amounts = {"heads": 0.4, "channels": 0.25, "modules": 0.3, "ranks": 0.6}
    schedule = LightPEFT(2, **amounts, official=official)
    sizes = {"heads": 4, "channels": 26, "modules": 14, "ranks": 7}
    for name, n in sizes.items():
        values = torch.arange(1.0, n + 1, dtype=torch.float64)
        theirs = int((values <= torch.quantile(values, amounts[name])).sum())
        assert schedule._gone(name, n) == (theirs if official else math.floor(amounts[name] * n + 0.5)), name
    before = len(state_of(model).groups["default"].adapters)
    optimizer = torch.optim.AdamW(tt.parameters(model), lr=1e-2)
    ids = torch.randint(0, 64, (4, 8), generator=torch.Generator().manual_seed(0))
    with tt.scheduled(model, optimizer, schedule, steps=6) as s:
        for _ in range(6):
            model(input_ids=ids, labels=ids).loss.backward()
            s.step()
            optimizer.zero_grad()
    lost = {True: math.floor(0.3 * (before - 1)) + 1, False: math.floor(0.3 * before + 0.5)}[official]
    assert before - len(state_of(model).groups["default"].adapters) >= lost
