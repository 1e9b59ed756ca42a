"""Inputs as models really give them: no tokens (an idle expert), one axis, strided and expanded tensors, frozen adapters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import trimtab as tt

CONFIGS = [
    tt.LoHa(rank=1), tt.LoHa(rank=4), tt.LoKr(rank=2), tt.LoKr(rank=8), tt.LoKr(rank=20, factor=2), tt.OFT(block_size=4),
    tt.OFT(block_size=4, block_share=True), tt.OFT(block_size=4, neumann=5), tt.BOFT(block_size=4, factors=2),
    tt.FourierFT(coefficients=5), tt.FourierFT(coefficients=200), tt.MiSS(rank=5), tt.Bone(rank=5, dropout=0.3),
]
INPUTS = {
    "no tokens": lambda: torch.randn(0, 32),
    "one axis": lambda: torch.randn(32),
    "transposed": lambda: torch.randn(32, 6).t(),
    "columns": lambda: torch.randn(4, 64)[:, :32],
    "last axis strided": lambda: torch.randn(2, 3, 32, 2)[..., 0],
    "expanded": lambda: torch.randn(1, 32).expand(5, 32),
}


def adapted(config: tt.MethodConfig) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 24))
    tt.attach(model, config, targets="0")
    with torch.no_grad():
        for p in tt.parameters(model):
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("kind", INPUTS)
def test_every_layout(config, kind):
    """The gradient of ``y.sum()`` arrives expanded (strides 0), so that layout is tried for the output too."""
    model = adapted(config)
    W = tt.effective_weight(model, "0").detach()
    x = INPUTS[kind]().requires_grad_()
    y = model(x)
    torch.testing.assert_close(y, x @ W.t() + model[0].bias, atol=2e-5, rtol=1e-4)
    y.sum().backward()
    torch.testing.assert_close(x.grad, W.sum(0).expand(x.shape), atol=1e-4, rtol=1e-4)
    assert all(torch.isfinite(p.grad).all() for p in tt.parameters(model))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_modes(config):
    """Training mode, no_grad, inference mode, and a frozen adapter below layers that learn."""
    model = adapted(config)
    model.train()(torch.randn(3, 32)).sum().backward()
    model.eval()
    with torch.no_grad():
        plain = model(torch.ones(3, 32))
    with torch.inference_mode():
        assert torch.equal(model(torch.ones(3, 32)), plain)
    for p in tt.parameters(model):
        p.requires_grad_(False)
    x = torch.randn(3, 32, requires_grad=True)
    model(x).sum().backward()
    W = tt.effective_weight(model, "0")
    torch.testing.assert_close(x.grad, W.sum(0).expand(3, 32), atol=1e-4, rtol=1e-4)
