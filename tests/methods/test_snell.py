"""SNELL: the kernel of distances, competition, and the tiled function (arXiv 2411.01800)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

import trimtab as tt
from trimtab.core.account import LiveBytes, saved_bytes
from trimtab.kernels import kernelized as kernel
from trimtab.kernels.kernelized import Competition, gain, kernel_delta, kernelized, quantile

D = torch.float64
A = torch.tensor([[[1.0, 0], [0, 2]], [[0, 0], [3, 4]]], dtype=D)
B = torch.tensor([[[0.0, 0], [1, 2], [4, 0]], [[0, 3], [3, 0], [0, 0]]], dtype=D)
C = torch.tensor([0.1, -0.1], dtype=D)
X = torch.tensor([[1.0, 1], [2, -1]], dtype=D)
GY = torch.tensor([[1.0, 2, 3], [-1, 0, 1]], dtype=D)
DENSE = Competition("dense")


def K(a: Tensor, b: Tensor, c: Tensor = C) -> Tensor:
    return kernel_delta(DENSE, None, a, b, c).t()


def close(found: Tensor, want: list | Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(found, torch.as_tensor(want, dtype=found.dtype), atol=tolerance, rtol=0)


def adapter_of(model: nn.Module) -> nn.Module:
    return next(m for m in model.modules() if isinstance(m, tt.Reparameterization))


def example(rule: Competition, s: float) -> tuple[Tensor, ...]:
    """Output and gradients of the worked example through the tiled function, over a base of zeros."""
    base = nn.Sequential(nn.Linear(2, 3, bias=False)).to(D).requires_grad_(False)
    base[0].weight.zero_()
    site = _site(base)
    x, a, b = (v.clone().requires_grad_() for v in (X, A, B))
    t = None if rule.rule == "dense" else quantile(s, a, b, C)
    y = kernelized(rule, x, site, t, a, b, C)
    return y, *torch.autograd.grad(y, (x, a, b), GY)


def _site(base: nn.Module):
    tt.attach(base, tt.SNELL(rank=2), targets=["0"], dtype=D)
    return adapter_of(base).site


def test_the_kernel_and_both_thresholds_of_the_worked_example():
    close(K(A, B), [[-0.2, -0.1, 0.3], [-0.1162278, -0.3, -0.0527864]], 1e-7)
    t = quantile(0.5, A, B, C)
    close(t, 0.1581139, 1e-7)
    close(kernel_delta(Competition(), t, A, B, C).t(), [[-0.04, 0, 0.09], [0, -0.09, 0]], 1e-7)
    lower = torch.tensor(0.1162278, dtype=D)
    close(kernel_delta(Competition("paper"), lower, A, B, C).t(), [[-0.0167544, 0, 0.0551317], [0, -0.0551317, 0]], 1e-7)


def test_output_and_gradients_of_the_worked_example():
    y, gx, ga, gb = example(Competition(), 0.5)
    close(y, [[-0.04, -0.09, 0.09], [-0.08, 0.09, 0.18]])
    close(gx, [[0.23, -0.18], [0.13, 0]])
    close(ga.flatten(), [-0.17, 0, -0.06, 0, 0, -0.02, 0, -0.06])
    close(gb.flatten(), [0.02, 0, 0.06, 0, 0.15, 0, 0, 0.02, 0, 0.06, 0, 0])
    ga = example(DENSE, 0.0)[2]
    close(ga.flatten(), [-0.6, -0.2, -0.378885, 0.289443, 0.2, -0.1, -0.309737, -0.423246])


def test_invariances():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, n, 3, generator=g, dtype=D) for n in (5, 7))
    shift = torch.randn(2, 1, 3, generator=g, dtype=D)
    close(K(a + shift, b + shift), K(a, b), 1e-12)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=g, dtype=D))[0]
    close(K(a @ turn, b @ turn), K(a, b), 1e-12)
    close(K(2.5 * a, 2.5 * b), 2.5 * K(a, b), 1e-12)
    close(K(a.flip(0), b.flip(0)), -K(a, b), 1e-12)
    a, b = a.requires_grad_(), b.requires_grad_()
    weights = torch.randn(7, 5, generator=g, dtype=D)
    ga, gb = torch.autograd.grad((kernel_delta(DENSE, None, a, b, C) * weights).sum(), (a, b))
    close(ga.sum(1) + gb.sum(1), torch.zeros(2, 3), 1e-12)


def test_centring_keeps_float32_exact_under_a_common_offset():
    g = torch.Generator().manual_seed(1)
    a, b = (torch.randn(2, n, 4, generator=g) * 0.05 + 1 for n in (64, 48))
    exact = sum(c * torch.cdist(a[p].double(), b[p].double(), compute_mode="donot_use_mm_for_euclid_dist")
                for p, c in enumerate(C.tolist()))  # fmt: skip
    error = (K(a, b, C.float()) - exact).abs().max() / exact.abs().max()
    assert error < 2e-6


def test_the_matrix_is_of_full_rank_and_mostly_of_little():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 768, 4, generator=g, dtype=D) for _ in range(2))
    k = K(a, b)
    energy = torch.linalg.svdvals(k).square()
    assert int(torch.linalg.matrix_rank(k)) == 768
    few = int((energy.cumsum(0) / energy.sum() < 0.99).sum()) + 1
    assert 10 <= few <= 24  # the brief's draw has 16


@pytest.mark.parametrize("shape", [(40, 50), (768, 768), (900, 1100)])
@pytest.mark.parametrize("s", [0.0, 0.3, 0.9, 0.999])
def test_the_quantile_is_that_of_a_sort(shape, s):
    g = torch.Generator().manual_seed(2)
    a, b = (torch.randn(2, n, 2, generator=g) * torch.linspace(0.01, 3, n).view(1, n, 1) for n in shape)
    c, n = C.float(), shape[0] * shape[1]
    t = quantile(s, a, b, c)
    sizes = kernel_delta(DENSE, None, a, b, c).abs().flatten().sort().values
    position = s * (n - 1)
    low, high = sizes[int(position)], sizes[min(int(position) + 1, n - 1)]
    torch.testing.assert_close(t, torch.lerp(low, high, position % 1), rtol=1e-6, atol=0)
    kept = int((kernel_delta(Competition(), t, a, b, c) != 0).sum())
    assert abs(kept - (n - 1 - int(position))) <= 1 + int((sizes == low).sum())


def test_kept_count_of_a_square_layer():
    g = torch.Generator().manual_seed(3)
    a, b = (torch.randn(2, 768, 4, generator=g, dtype=D) for _ in range(2))
    assert int((kernel_delta(Competition(), quantile(0.9, a, b, C), a, b, C) != 0).sum()) == 58_983


def test_more_entries_than_torch_quantile_takes():
    a, b = torch.randn(2, 4096, 1), torch.randn(2, 4200, 1)
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(torch.zeros(4096 * 4200), 0.5)
    t = quantile(0.9, a, b, C.float())
    kept = sum(int((k.abs() > t).sum()) for *_, k in kernel._tiles(a, b, C.float(), ()))
    assert kept == pytest.approx(0.1 * 4096 * 4200, rel=1e-5)


@pytest.mark.parametrize(("rank", "std"), [(8, 1.27e-3), (16, 8.9e-4), (32, 6.3e-4)])
def test_scale_of_the_start(rank, std):
    model = nn.Sequential(nn.Linear(768, 768))
    x = torch.randn(64, 768)
    base = model(x)
    tt.attach(model, tt.SNELL(rank=rank, sparsity=0.5), targets=["0"])
    part = adapter_of(model)
    k = K(part.a.detach(), part.b.detach(), part.c)
    assert k.std().item() == pytest.approx(std, rel=0.05)
    assert (model(x) - base).abs().max() < 1e-3
    dense = nn.Sequential(nn.Linear(768, 768))
    base = dense(x)
    tt.attach(dense, tt.SNELL(rank=rank, sparsity=0.0), targets=["0"])
    assert (dense(x) - base).std() > 0.01


def test_equal_pieces_are_a_trap_for_the_quadratic_rules_alone():
    a, b = A[:1].repeat(2, 1, 1).requires_grad_(), B[:1].repeat(2, 1, 1).requires_grad_()
    for rule, dead in ((DENSE, False), (Competition(), True), (Competition("paper"), True)):
        delta = kernel_delta(rule, torch.zeros((), dtype=D), a, b, C)
        assert not delta.any()
        grads = torch.autograd.grad((delta * torch.arange(6.0, dtype=D).view(3, 2)).sum(), (a, b))
        assert (not any(bool(g.any()) for g in grads)) is dead
    zero = torch.zeros(2, 2, 2, dtype=D).requires_grad_(), torch.zeros(2, 3, 2, dtype=D).requires_grad_()
    grads = torch.autograd.grad(kernel_delta(DENSE, None, *zero, C).sum(), zero)
    assert not any(bool(g.any()) for g in grads)


@pytest.mark.parametrize("rule", ["dense", "square", "paper", "hard", "soft"])
@pytest.mark.parametrize("through", [False, True])
def test_rules_and_their_slopes(rule, through):
    g = torch.Generator().manual_seed(4)
    k = torch.randn(50, generator=g, dtype=D).requires_grad_()
    t = torch.tensor(0.4, dtype=D)
    U = k * gain(rule, k if through else k.detach(), t)
    want = {
        "dense": k, "square": k * k.abs() * (k.abs() > t), "paper": k * (k.abs() - t).clamp_min(0),
        "hard": k * (k.abs() > t), "soft": k.sign() * (k.abs() - t).clamp_min(0),
    }[rule]  # fmt: skip
    close(U, want, 1e-12)
    (slope,) = torch.autograd.grad(U.sum(), k)
    close(Competition(rule, through).slope(k.detach(), t), slope, 1e-12)


def test_tiles_do_not_change_the_result(monkeypatch):
    """One tile, and tiles of three inputs."""
    results = []
    for entries in (1 << 19, 60):
        monkeypatch.setattr(kernel, "_TILE", entries)
        torch.manual_seed(5)
        model = nn.Sequential(nn.Linear(14, 20)).to(D)
        tt.attach(model, tt.SNELL(rank=4, sparsity=0.7), targets=["0"], dtype=D)
        x = torch.randn(3, 5, 14, dtype=D, requires_grad=True)
        y = model(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, *tt.parameters(model)))))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_merge_equals_the_live_adapter_and_unmerge_restores():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40))
    before = model[0]._parameters["weight"].detach().clone()
    tt.attach(model, tt.SNELL(rank=8, sparsity=0.0), targets=["0"])
    x = torch.randn(6, 24)
    live = model(x)
    tt.merge(model, "default")
    torch.testing.assert_close(model(x), live, atol=1e-6, rtol=0)
    tt.unmerge(model, "default")
    assert torch.equal(model[0]._parameters["weight"], before)


def test_counts_of_vit_b():
    for rank, want in ((8, 1_327_104), (16, 2_654_208), (32, 5_308_416)):
        with torch.device("meta"):
            model = ViTModel(ViTConfig(), add_pooling_layer=False)
        tt.attach(model, tt.SNELL(rank=rank))
        assert sum(p.numel() for p in tt.parameters(model)) == want


def test_nothing_but_the_input_is_kept_and_temporaries_are_tiles(monkeypatch):
    monkeypatch.setattr(kernel, "_TILE", 1 << 14)
    model = nn.Sequential(nn.Linear(512, 512)).requires_grad_(False)
    tt.attach(model, tt.SNELL(rank=4, sparsity=0.9), targets=["0"])
    x = torch.randn(8, 512, requires_grad=True)
    with saved_bytes(model, beside=(x,)) as saved:
        y = model(x)
    assert saved.total <= 8  # the threshold
    with LiveBytes() as live:
        y.sum().backward()
    assert live.peak < 512 * 512 * 4  # less than one dense gradient


WRONG = (
    {"rank": 5}, {"rank": 0}, {"rank": 1}, {"sparsity": 1.0}, {"sparsity": -0.1}, {"shrink": "none"}, {"coefficient": 0.0},
)  # fmt: skip


def test_bad_input():
    for wrong in WRONG:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            tt.SNELL(**wrong)
    with pytest.warns(UserWarning, match="one sign"):
        tt.SNELL(rank=4, pieces=1)
    with pytest.raises(ValueError, match="NaN"):
        quantile(0.5, A * float("nan"), B, C)
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(tt.TrimtabError):
        tt.attach(model, tt.SNELL(), targets=["0"])
