"""The saved-bytes meter against the table of the memory notes: exact equality."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import trimtab as tt
from trimtab.core.account import LiveBytes, count_flops, saved_bytes

N, IN, OUT, R = 128, 256, 384, 8


def inputs(device: str = "cpu") -> torch.Tensor:
    return torch.zeros(N, IN, dtype=torch.bfloat16, device=device, requires_grad=True)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_rows_of_the_table(device: str) -> None:
    layer = nn.Linear(IN, OUT, bias=False, dtype=torch.bfloat16, device=device)
    a, b = (nn.Parameter(torch.zeros(s, dtype=torch.bfloat16, device=device)) for s in ((R, IN), (OUT, R)))
    params = nn.ParameterList([a, b])
    x = inputs(device)
    with saved_bytes(layer) as full:
        layer(x)
    assert full.total == 2 * N * IN
    layer.requires_grad_(False)
    with saved_bytes(layer) as frozen:
        layer(x)
    assert frozen.total == 0
    with saved_bytes(layer, params) as lora:
        layer(x) + F.linear(F.linear(x, a), b)
    assert lora.total == 67_584
    with saved_bytes(layer, params) as shared:
        [layer(x) + F.linear(F.linear(x, a), b) for _ in range(3)]
    assert shared.total == 71_680
    half = nn.Linear(16, OUT, bias=False, dtype=torch.bfloat16, device=device)
    with saved_bytes(half) as view:
        half(x[..., :16])
    assert view.total == 65_536
    index = torch.arange(16, device=device)
    with saved_bytes(half) as gathered:
        half(x.index_select(-1, index))
    assert gathered.total == 4_096 + 8 * 16


@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_our_lora_keeps_the_input_and_a_sliver(dropout: float) -> None:
    model = nn.ModuleDict({name: nn.Linear(IN, OUT, bias=False, dtype=torch.bfloat16) for name in ("q", "k", "v")})
    tt.attach(model, tt.LoRA(rank=R, dropout=dropout), targets=["q", "k", "v"])
    x = inputs()
    with saved_bytes(model) as saved:
        for layer in model.values():
            layer(x)
    sliver = 3 * R if 16 * R <= IN else 0  # each layer's x A^T, where it is at most a sixteenth of x
    assert saved.total == 2 * N * (IN + sliver), saved.by_shape()
    assert sliver <= 0.1 * IN * 3


def test_products_in_place_are_counted() -> None:
    x, w, y = torch.ones(4, 3), torch.ones(3, 5), torch.ones(4, 5)
    with count_flops() as counter:
        y.addmm_(x, w)
    assert counter.get_total_flops() == 2 * 4 * 3 * 5


def test_live_bytes_see_what_is_freed() -> None:
    x = torch.zeros(1000)
    with LiveBytes() as live:
        for _ in range(5):
            x = x + 1
    assert live.peak == 2 * 4000
