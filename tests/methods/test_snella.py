"""SNELLA: distances and a softmax over the outputs (arXiv 2510.24037). The budget: tests/schedules/test_bilevel.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

import trimtab as tt
from trimtab.core.account import saved_bytes
from trimtab.kernels.kernelized import Competition, kernel_delta, kernelized, quantile

D = torch.float64
A = torch.tensor([[[1.0, 0], [0, 2]], [[0, 0], [3, 4]]], dtype=D)
B = torch.tensor([[[0.0, 0], [1, 2], [4, 0]], [[0, 3], [3, 0], [0, 0]]], dtype=D)
C = torch.tensor([0.1, -0.1], dtype=D)
X = torch.tensor([[1.0, 1], [2, -1]], dtype=D)
GY = torch.tensor([[1.0, 2, 3], [-1, 0, 1]], dtype=D)
DENSE = Competition("dense")


def scalars(*values: float) -> list[Tensor]:
    return [torch.tensor(v, dtype=D) for v in values]


def close(found: Tensor, want: list | Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(found, torch.as_tensor(want, dtype=found.dtype), atol=tolerance, rtol=0)


def adapter_of(model: nn.Module) -> nn.Module:
    return next(m for m in model.modules() if isinstance(m, tt.Reparameterization))


def example(rule: Competition) -> tuple[Tensor, ...]:
    """y, gx, and the gradients of alpha, gamma and beta, over a base of zeros."""
    base = nn.Sequential(nn.Linear(2, 3, bias=False)).to(D).requires_grad_(False)
    base[0].weight.zero_()
    tt.attach(base, tt.SNELLA(rank=2), targets=["0"], dtype=D)
    mix = [m.requires_grad_() for m in scalars(1, 1, 0)]
    x = X.clone().requires_grad_()
    t = None if rule.rule == "dense" else quantile(0.5, A, B, C, *mix)
    y = kernelized(rule, x, adapter_of(base).site, t, A, B, C, *mix)
    return y, *torch.autograd.grad(y, (x, *mix), GY)


def test_the_worked_example():
    mix = scalars(1, 1, 0)
    K = kernel_delta(DENSE, None, A, B, C, *mix).t()
    close(K, [[0.0663902, 0.1944067, 0.7392031], [0.2288828, -0.0128248, 0.3149278]])
    softmax = K - kernel_delta(DENSE, None, A, B, C).t()
    close(softmax, [[0.2664, 0.2944, 0.4392], [0.3451, 0.2872, 0.3677]], 1e-4)
    close(softmax.sum(1), [1.0, 1.0], 1e-12)
    t = quantile(0.5, A, B, C, *mix)
    close(t, 0.2116447)
    close(kernel_delta(Competition(), t, A, B, C, *mix).t(), [[0, 0, 0.5464213], [0.0523873, 0, 0.0991795]])
    y, gx, g_alpha, g_gamma, g_beta = example(Competition())
    close(y, [[0.0523873, 0, 0.6456008], [-0.0523873, 0, 0.9936630]])
    close(gx, [[1.639264, 0.349926], [0.546421, 0.046792]])
    close(torch.stack((g_alpha, g_gamma, g_beta)), [2.012888, -0.433546, 4.783637])
    close(torch.stack(example(DENSE)[2:]), [4.518439, -0.529692, 12])


def test_sums_limits_and_gradients():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, n, 3, generator=g, dtype=D) for n in (5, 7))
    distance = kernel_delta(DENSE, None, a, b, C)
    K = kernel_delta(DENSE, None, a, b, C, *scalars(0.7, 1.3, 0.2))
    close(K.sum() - distance.sum(), torch.tensor(0.7 * 5 + 0.2 * 35, dtype=D), 1e-10)
    none = scalars(0, 1, 0)
    t = quantile(0.4, a, b, C)
    assert torch.equal(quantile(0.4, a, b, C, *none), t)
    assert torch.equal(kernel_delta(Competition(), t, a, b, C, *none), kernel_delta(Competition(), t, a, b, C))
    gamma = torch.tensor(1.3, dtype=D).requires_grad_()
    per_input = torch.randn(1, 5, generator=g, dtype=D)  # equal entries along the outputs
    K = kernel_delta(DENSE, None, a, b, C, torch.tensor(0.7, dtype=D), gamma, torch.tensor(0.0, dtype=D))
    close(torch.autograd.grad((K * per_input).sum(), gamma)[0], 0.0, 1e-12)


def test_counts_of_vit_b():
    with torch.device("meta"):
        model = ViTModel(ViTConfig(), add_pooling_layer=False)
    tt.attach(model, tt.SNELLA(rank=32))
    assert sum(p.numel() for p in tt.parameters(model)) == 5_308_632


def test_scale_of_the_start():
    x = torch.randn(64, 768)
    for dense in (False, True):
        model = nn.Sequential(nn.Linear(768, 768))
        base = model(x)
        tt.attach(model, tt.SNELLA(rank=32, dense=dense), targets=["0"])
        part = adapter_of(model)
        K = kernel_delta(DENSE, None, *part.parts()[1:]).detach()
        assert K.mean().item() == pytest.approx(1.30e-3, rel=0.1)
        assert K.std().item() == pytest.approx(6.3e-4, rel=0.05)
        assert (K > 0).float().mean() > 0.95  # the softmax makes signs unequal
        assert (model(x) - base).std().item() == pytest.approx(3.8e-2 if dense else 7.2e-5, rel=0.15)


def test_gamma_stays_positive_whatever_the_step():
    model = nn.Sequential(nn.Linear(12, 16)).requires_grad_(False)
    tt.attach(model, tt.SNELLA(rank=4, dense=True), targets=["0"])
    part = adapter_of(model)
    assert part.mix()[1].item() == pytest.approx(1.0)
    with torch.no_grad():
        part.g.sub_(5)
    assert 0 < part.mix()[1] < 0.1
    y = model(torch.randn(3, 12))
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert torch.isfinite(part.g.grad).all()


def test_nothing_but_the_input_is_kept():
    model = nn.Sequential(nn.Linear(256, 256)).requires_grad_(False)
    tt.attach(model, tt.SNELLA(rank=4, sparsity=0.9), targets=["0"])
    x = torch.randn(8, 256, requires_grad=True)
    with saved_bytes(model, beside=(x,)) as saved:
        model(x)
    assert saved.total <= 64  # the threshold and the scalars


def test_bad_input():
    for wrong in ({"rank": 3}, {"rank": 0}, {"sparsity": 1.0}, {"coefficient": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            tt.SNELLA(**wrong)
