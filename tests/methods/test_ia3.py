"""IA3: gains that merge into weights and biases (arXiv 2205.05638)."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import trimtab as tt
from trimtab.core.account import saved_bytes

D = torch.float64


def trained(model: nn.Module) -> None:
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in tt.parameters(model):
            p.add_(0.3 * torch.randn(p.shape, generator=g, dtype=p.dtype))


def test_counts_of_llama_7b():
    """Keys, values and the feed-forward's hidden activations: 32 (4096 + 4096 + 11008)."""
    shape = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    with torch.device("meta"):
        model = LlamaForCausalLM(shape)
    tt.attach(model, tt.IA3())
    assert sum(p.numel() for p in tt.parameters(model)) == 614_400
    down, key = (model.get_submodule(f"model.layers.0.{name}").trimtab for name in ("mlp.down_proj", "self_attn.k_proj"))
    assert next(down.parameters()).shape == (11008,)
    assert next(key.parameters()).shape == (4096,)


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("bias", [True, False])
def test_merged_weight_and_bias_are_the_formula(side, bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7, bias=bias)).to(D)
    W, b = model[0].weight.detach().clone(), model[0].bias.detach().clone() if bias else None
    x = torch.randn(3, 5, dtype=D)
    start = model(x)
    tt.attach(model, tt.IA3(side=side), targets=["0"], dtype=D)
    assert torch.equal(model(x), start)
    trained(model)
    (gain,) = (p.detach().clone() for p in tt.parameters(model))
    want = nn.functional.linear(x * gain, W, b) if side == "input" else gain * nn.functional.linear(x, W, b)
    torch.testing.assert_close(model(x), want)
    tt.merge(model, "default")
    torch.testing.assert_close(model[0].weight, W * gain if side == "input" else gain[:, None] * W)
    if bias:
        torch.testing.assert_close(model[0].bias, b if side == "input" else gain * b)
    else:
        assert side == "input" or model[0].bias is None or not model[0].bias.any()
    torch.testing.assert_close(model(x), want)
    tt.unmerge(model, "default")
    assert torch.equal(model[0]._parameters["weight"], W)
    assert (model[0]._parameters["bias"] is None) is (not bias)


def test_a_gain_before_a_convolution_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    with pytest.raises(tt.Unsupported, match="use side='output'"):
        tt.attach(model, tt.IA3(side="input"), targets=["0"])
    with pytest.raises(ValueError, match="side must be"):
        tt.IA3(side="left")


@pytest.mark.parametrize("side", ["output", "input"])
def test_one_tensor_is_kept(side):
    """The tensor that is multiplied, and the gain."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False)).requires_grad_(False)
    tt.attach(model, tt.IA3(side=side), targets=["0"])
    x = torch.randn(32, 64, requires_grad=True)
    with saved_bytes(model, beside=(x,)) as saved:
        model(x)
    assert saved.total <= (0 if side == "input" else 32 * 64 * 4) + 64 * 4
