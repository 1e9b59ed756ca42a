"""SSF: a scale and a shift behind every operation, merged into weights and biases (arXiv 2210.08823)."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTModel

import trimtab as tt
from trimtab.core.account import saved_bytes

D = torch.float64


def set_to(model: nn.Module, gamma: list[float], beta: list[float]) -> None:
    values = {"gamma": gamma, "beta": beta}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.rpartition(".")[2] in values:
                p.copy_(torch.tensor(values[name.rpartition(".")[2]]))


def test_the_worked_example():
    model = nn.Sequential(nn.Linear(2, 2)).to(D)
    with torch.no_grad():
        model[0]._parameters["weight"].copy_(torch.tensor([[1.0, 2], [3, 4]]))
        model[0]._parameters["bias"].copy_(torch.tensor([1.0, -1]))
    tt.attach(model, tt.SSF(), targets=["0"], dtype=D)
    set_to(model, [2.0, 0.5], [0.1, 0.2])
    torch.testing.assert_close(tt.effective_weight(model, "0", tensor="bias"), torch.tensor([2.1, -0.3], dtype=D))
    tt.merge(model, "default")
    torch.testing.assert_close(model[0]._parameters["weight"].detach(), torch.tensor([[2.0, 4], [1.5, 2]], dtype=D))
    torch.testing.assert_close(model[0]._parameters["bias"].detach(), torch.tensor([2.1, -0.3], dtype=D))


def test_counts_of_vit_b():
    """2 (L (D + 3 D + D + D + Dh + D) + 2 D): every operation, the patch embedding and the last norm with them."""
    with torch.device("meta"):
        model = ViTModel(ViTConfig(), add_pooling_layer=False)
    tt.attach(model, tt.SSF(), targets="linear | norm | conv")
    assert sum(p.numel() for p in tt.parameters(model)) == 205_824


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), nn.Linear(6, 4, bias=False), nn.Conv2d(6, 4, 3), nn.LayerNorm(6)])
def test_scale_and_shift_of_every_kind(layer):
    torch.manual_seed(0)
    model = nn.Sequential(layer).to(D)
    x = torch.randn(2, 6, 5, 5, dtype=D) if isinstance(layer, nn.Conv2d) else torch.randn(2, 3, 6, dtype=D)
    channel = 1 if isinstance(layer, nn.Conv2d) else -1
    start = model(x).movedim(channel, -1)
    had_bias = layer.bias is not None
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tt.attach(model, tt.SSF(std=0.3), targets=["0"], dtype=D, rng=torch.Generator().manual_seed(1))
    found = {name.rpartition(".")[2]: p.detach() for name, p in model.named_parameters() if name.startswith("0.trimtab")}
    assert (found["gamma"] - 1).abs().max() > 0.1
    want = (found["gamma"] * start + found["beta"]).movedim(-1, channel)
    torch.testing.assert_close(model(x), want)
    tt.merge(model, "default")
    assert model[0]._parameters["bias"] is not None
    torch.testing.assert_close(model(x), want)
    tt.unmerge(model, "default")
    assert (model[0]._parameters["bias"] is not None) is had_bias
    tt.detach(model, "default")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_an_rms_norm_gets_the_gain_alone():
    model = nn.Sequential(nn.RMSNorm(6)).to(D)
    x = torch.randn(3, 6, dtype=D)
    start = model(x)
    tt.attach(model, tt.SSF(std=0.3), targets=["0"], dtype=D)
    (gamma,) = tt.parameters(model)
    torch.testing.assert_close(model(x), gamma * start)


def test_std_zero_starts_at_the_base_and_bad_input_is_refused():
    model = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4))
    x = torch.randn(3, 6)
    start = model(x)
    tt.attach(model, tt.SSF(std=0.0), targets=["0", "1"])
    assert torch.equal(model(x), start)
    with pytest.raises(ValueError, match="std must be at least 0"):
        tt.SSF(std=-0.1)


def test_only_the_output_before_scaling_is_kept():
    model = nn.Sequential(nn.Linear(64, 96)).requires_grad_(False)
    tt.attach(model, tt.SSF(), targets=["0"])
    x = torch.randn(32, 64, requires_grad=True)
    with saved_bytes(model, beside=(x,)) as saved:
        model(x)
    assert saved.total <= 32 * 96 * 4 + 96 * 4
