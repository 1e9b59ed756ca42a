"""PiSSA, OLoRA and LoRA-GA: what they take out of W, what is left, and conversion to a plain LoRA."""

from __future__ import annotations

import math

import pytest
import torch
from lowrank_places import adapted, llama_count
from torch import nn
from torch.nn import functional as F

import trimtab as tt
from trimtab.kernels.spectral import top_svd


def loss(model: nn.Module) -> torch.Tensor:
    g = torch.Generator().manual_seed(3)
    x = torch.randn(32, 16, generator=g, dtype=torch.float64)
    return model(x.to(model[0].weight.dtype)).square().mean()


def moved_out(adapter) -> torch.Tensor:
    """``s B0 A0``."""
    return adapter.config.scale * adapter.b0 @ adapter.a0


CONFIGS = [tt.PiSSA(rank=3), tt.PiSSA(rank=3, alpha=7.5), tt.OLoRA(rank=3), tt.OLoRA(rank=3, alpha=5.0), tt.LoRAGA(rank=3)]


def make(config, **more):
    if isinstance(config, tt.LoRAGA):
        more["loss"] = loss
    return adapted(config, **more)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_starts_at_the_base_with_factors_that_are_not_zero(config):
    model, adapter, W = make(config)
    x = torch.randn(5, 16, dtype=torch.float64)
    assert torch.equal(adapter.weight(W), W)
    torch.testing.assert_close(model(x), F.linear(x, W, model[0].bias))
    assert torch.equal(model[0].weight, W)
    assert moved_out(adapter).norm() > 0.05


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_converts_to_a_plain_lora_of_twice_the_rank(config):
    _, adapter, W = make(config, moved=True)
    B, A = adapter.factors()
    assert (B.shape, A.shape) == ((12, 6), (6, 16))
    torch.testing.assert_close(W + B @ A, adapter.weight(W))
    torch.testing.assert_close(W + B @ A, W - moved_out(adapter) + config.scale * adapter.b @ adapter.a)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_saved_adapter_holds_its_start(config, tmp_path):
    model, adapter, W = make(config, moved=True)
    tt.save(model, tmp_path)
    fresh = nn.Sequential(nn.Linear(16, 12, dtype=torch.float64))
    fresh.load_state_dict({"0.weight": W, "0.bias": model[0].bias})
    tt.load(fresh, tmp_path)
    x = torch.randn(5, 16, dtype=torch.float64)
    assert torch.equal(fresh(x), model(x))


@pytest.mark.parametrize("cls", [tt.PiSSA, tt.OLoRA])
def test_counts_are_loras(cls):
    assert llama_count(cls(rank=32)) == 9_175_040


def test_pissa_leaves_the_rest_of_the_spectrum_and_is_balanced():
    for alpha in (None, 1.5):
        _, adapter, W = adapted(tt.PiSSA(rank=4, alpha=alpha))
        S = torch.linalg.svdvals(W)
        residual = torch.linalg.svdvals(W - moved_out(adapter))
        torch.testing.assert_close(residual[:8], S[4:], atol=1e-10, rtol=1e-8)
        assert residual[8:].max() < 1e-10
        torch.testing.assert_close(adapter.b.t() @ adapter.b, adapter.a @ adapter.a.t(), atol=1e-10, rtol=0)


def test_pissa_randomised_is_close_and_repeatable():
    exact = moved_out(adapted(tt.PiSSA(rank=2), out=64, fan_in=80)[1])
    near = moved_out(adapted(tt.PiSSA(rank=2, iterations=16), out=64, fan_in=80)[1])
    assert torch.equal(near, moved_out(adapted(tt.PiSSA(rank=2, iterations=16), out=64, fan_in=80)[1]))
    assert not torch.equal(near, exact)
    assert near.norm() == pytest.approx(exact.norm().item(), rel=0.02)


def test_olora_owns_the_first_columns():
    _, adapter, W = adapted(tt.OLoRA(rank=4))
    torch.testing.assert_close(adapter.b.t() @ adapter.b, torch.eye(4, dtype=torch.float64))
    assert torch.equal(adapter.a[:, :4], adapter.a[:, :4].triu())
    assert (W - moved_out(adapter))[:, :4].abs().max() < 1e-14
    Q, R = torch.linalg.qr(W)
    torch.testing.assert_close(adapter.b.detach(), Q[:, :4])
    torch.testing.assert_close(adapter.a.detach(), R[:4])


def test_half_precision_weights_are_decomposed_in_float32():
    _, adapter, W = adapted(tt.PiSSA(rank=2), dtype=torch.bfloat16)
    U, S, Vh = torch.linalg.svd(W.float(), full_matrices=False)
    assert adapter.a.dtype == torch.float32
    torch.testing.assert_close(moved_out(adapter), U[:, :2] * S[:2] @ Vh[:2], atol=1e-5, rtol=1e-4)


def gradient(model, W, bias) -> torch.Tensor:
    W = W.clone().requires_grad_()
    g = torch.Generator().manual_seed(3)
    x = torch.randn(32, 16, generator=g, dtype=torch.float64)
    return torch.autograd.grad(F.linear(x, W, bias).square().mean(), W)[0]


def test_loraga_first_step_is_the_best_approximation_of_the_gradient():
    model, adapter, W = adapted(tt.LoRAGA(rank=3, size="unit"), loss=loss)
    G = gradient(model, W, model[0].bias.detach())
    s = adapter.config.scale
    step = s**2 * (adapter.b @ adapter.b.t() @ G + G @ adapter.a.t() @ adapter.a)
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    torch.testing.assert_close(step.detach(), s**2 * U[:, :6] * S[:6] @ Vh[:6], atol=1e-5, rtol=1e-4)
    before = adapter.weight(W).detach()
    loss(model).backward()
    with torch.no_grad():
        for p in adapter.parameters():
            p -= 1e-6 * p.grad
    torch.testing.assert_close((before - adapter.weight(W)) / 1e-6, step, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    ("direction", "for_a", "for_b"),
    [("ArB2r", [0, 1], [2, 3]), ("A2rBr", [2, 3], [0, 1]), ("ArBr", [1, 3], [0, 2])],
)
def test_loraga_directions_sizes_and_peft_form(direction, for_a, for_b):
    start = lambda **kw: adapted(tt.LoRAGA(rank=2, direction=direction, **kw), loss=loss)  # noqa: E731
    model, unit, W = start(size="unit")
    U, S, Vh = torch.linalg.svd(gradient(model, W, model[0].bias.detach()), full_matrices=False)
    torch.testing.assert_close((unit.a @ Vh[for_a].t()).abs(), torch.eye(2).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close((unit.b.t() @ U[:, for_b]).abs(), torch.eye(2).double(), atol=1e-6, rtol=0)
    c, s = 12**0.25 / math.sqrt(16), 16 / math.sqrt(2)
    torch.testing.assert_close(start()[1].a, c * unit.a)
    torch.testing.assert_close(start()[1].b, c * unit.b)
    torch.testing.assert_close(start(size="gd_scale")[1].b, unit.b / s)
    mean_root = (torch.linalg.svdvals(W)[:2] / s).sqrt().mean()
    torch.testing.assert_close(start(size="weight_svd")[1].a, mean_root * unit.a)
    peft = start(form="peft")[1]
    torch.testing.assert_close(peft.a, unit.a)
    torch.testing.assert_close(peft.b, c * unit.b * S[for_b], atol=1e-8, rtol=1e-5)


def test_loraga_random_takes_different_vectors_for_a_and_b():
    model, adapter, W = adapted(tt.LoRAGA(rank=2, direction="random", size="unit"), loss=loss)
    U, _, Vh = torch.linalg.svd(gradient(model, W, model[0].bias.detach()), full_matrices=False)
    for_a = (adapter.a @ Vh[:4].t()).abs().argmax(1).tolist()
    for_b = (adapter.b.t() @ U[:, :4]).abs().argmax(1).tolist()
    assert sorted(for_a + for_b) == [0, 1, 2, 3]


def test_loraga_needs_a_loss_and_twice_the_rank():
    with pytest.raises(tt.TrimtabError, match="loss"):
        adapted(tt.LoRAGA(rank=2))
    with pytest.raises(tt.ShapeMismatch, match="at most 6"):
        adapted(tt.LoRAGA(rank=7), loss=loss)
    for bad in ({"direction": "ArBR"}, {"size": "none"}, {"form": "other"}, {"gamma": 0}, {"alpha": 0}):
        with pytest.raises(tt.ShapeMismatch):
            tt.LoRAGA(**bad)


def test_randomised_svd_finds_the_leading_triplets():
    g = torch.Generator().manual_seed(0)
    M = torch.randn(60, 8, generator=g, dtype=torch.float64) @ torch.randn(8, 90, generator=g, dtype=torch.float64)
    M += 1e-3 * torch.randn(60, 90, generator=g, dtype=torch.float64)
    U, S, Vh = top_svd(M, 6, iterations=4, rng=g)
    exact = top_svd(M, 6)
    torch.testing.assert_close(S, exact[1])
    torch.testing.assert_close(U * S @ Vh, exact[0] * exact[1] @ exact[2], atol=1e-6, rtol=1e-5)
