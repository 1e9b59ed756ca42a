"""DoRA: counts, start, norms without a dense update, detached norm, bias, kept bytes."""

from __future__ import annotations

import torch
from lowrank_places import adapted, llama_count
from torch import nn
from torch.nn import functional as F

import trimtab as tt
from trimtab.methods.reparameterized.dora import row_norms


def test_published_counts():
    assert llama_count(tt.DoRA(rank=32)) == 9_289_728
    # LLaMA2-7B, r 36, all seven: LoRA's 89,948,160 plus a magnitude an output row
    assert 89_948_160 + 32 * (4 * 4096 + 2 * 11008 + 4096) == 91_308_032


def test_norm_of_rows_equals_the_direct_one():
    g = torch.Generator().manual_seed(0)
    make = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)  # noqa: E731
    W, a, b = make(9, 14), make(3, 14), make(9, 3)
    torch.testing.assert_close(row_norms(W, a, b, 1.7), (W + 1.7 * b @ a).norm(dim=1))
    torch.testing.assert_close(row_norms(-1.7 * b @ a, a, b, 1.7), torch.zeros(9).double(), atol=1e-6, rtol=0)


def test_starts_at_the_base_in_half_precision_too():
    for dtype in (torch.float32, torch.bfloat16):
        model, adapter, W = adapted(tt.DoRA(rank=3), dtype=dtype)
        x = torch.randn(5, 16, dtype=dtype)
        # the bias is added after rounding to the dtype, in a plain linear before
        torch.testing.assert_close(model(x), F.linear(x, W, model[0].bias), atol=2 * torch.finfo(dtype).eps, rtol=0)
        assert torch.equal(adapter.m, row_norms(W, adapter.a, adapter.b, 2.0))


def test_gradients_are_those_of_the_definition_with_a_constant_norm():
    model, adapter, W = adapted(tt.DoRA(rank=3), moved=True)
    a, b, m = (p.detach().clone().requires_grad_() for p in (adapter.a, adapter.b, adapter.m))
    x = torch.randn(7, 16, dtype=torch.float64, requires_grad=True)
    V = W + 2 * b @ a
    y = F.linear(x, m[:, None] * V / V.norm(dim=1, keepdim=True).detach(), model[0].bias)
    ours = torch.autograd.grad(model(x).sin().sum(), (x, adapter.a, adapter.b, adapter.m))
    for mine, plain in zip(ours, torch.autograd.grad(y.sin().sum(), (x, a, b, m)), strict=True):
        torch.testing.assert_close(mine, plain)


def test_gradient_of_the_magnitude_is_G_dot_V_over_the_norm():
    model, adapter, W = adapted(tt.DoRA(rank=3), moved=True)
    x = torch.randn(7, 16, dtype=torch.float64)
    dy = torch.randn(7, 12, dtype=torch.float64)
    model(x).backward(dy)
    V = W + 2 * (adapter.b @ adapter.a).detach()
    torch.testing.assert_close(adapter.m.grad, ((dy.t() @ x) * V).sum(1) / V.norm(dim=1))


def test_bias_is_not_scaled_and_a_magnitude_of_zero_still_learns():
    model, adapter, _ = adapted(tt.DoRA(rank=3), moved=True)
    with torch.no_grad():
        adapter.m.zero_()
    x = torch.randn(4, 16, dtype=torch.float64)
    torch.testing.assert_close(model(x), model[0].bias.expand(4, 12))
    model(x).square().sum().backward()
    assert torch.count_nonzero(adapter.m.grad) == 12


def test_a_row_of_zeros_stays_finite():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6, bias=False))
    nn.init.zeros_(model[0].weight[2])
    tt.attach(model, tt.DoRA(rank=2), targets="0")
    model(torch.randn(3, 8)).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in tt.parameters(model))
    assert torch.isfinite(tt.effective_weight(model, "0")).all()


def test_keeps_the_input_and_one_output():
    model, _, _ = adapted(tt.DoRA(rank=4), out=96, fan_in=64, dtype=torch.float32)
    x = torch.randn(128, 64, requires_grad=True)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    sizes = sorted(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own)
    assert y is not None
    # besides x and V x there are vectors of length out: m / n and 1 / n
    # and x A^T, a sixteenth of x
    assert [s for s in sizes if s > 96 * 4] == [128 * 4 * 4, 128 * 64 * 4, 128 * 96 * 4]
