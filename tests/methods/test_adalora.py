"""AdaLoRA's layer: counts, start, the divisor, pruned triplets, the orthogonality penalty."""

from __future__ import annotations

import pytest
import torch
from lowrank_places import adapted, llama_count
from torch import nn
from torch.nn import functional as F

import trimtab as tt
from trimtab.methods.reparameterized.adalora import orthogonality


def test_published_count():
    assert llama_count(tt.AdaLoRA(rank=64)) == 18_353_664


def test_start():
    model, adapter, W = adapted(tt.AdaLoRA(rank=4), out=400, fan_in=300)
    x = torch.randn(5, 300, dtype=torch.float64)
    torch.testing.assert_close(model(x), F.linear(x, W, model[0].bias), rtol=0, atol=0)
    assert torch.count_nonzero(adapter.e) == 0
    assert adapter.p.std().item() == pytest.approx(0.02, rel=0.1)
    assert adapter.q.std().item() == pytest.approx(0.02, rel=0.1)


def test_only_e_learns_at_first_and_by_the_products_of_the_vectors():
    model, adapter, _ = adapted(tt.AdaLoRA(rank=4, alpha=4))
    x, dy = torch.randn(7, 16, dtype=torch.float64), torch.randn(7, 12, dtype=torch.float64)
    model(x).backward(dy)
    assert torch.count_nonzero(adapter.p.grad) == torch.count_nonzero(adapter.q.grad) == 0
    G = dy.t() @ x
    expected = 4 / (4 + 1e-5) * torch.einsum("oi,or,ri->r", G, adapter.p, adapter.q)
    torch.testing.assert_close(adapter.e.grad[:, 0], expected)


def test_a_pruned_triplet_gives_nothing_and_can_return():
    _, adapter, W = adapted(tt.AdaLoRA(rank=4), moved=True)
    full = adapter.weight(W).detach()
    value = adapter.e[1].clone()
    with torch.no_grad():
        adapter.e[1] = 0
    assert torch.linalg.matrix_rank(adapter.weight(W) - W) == 3
    # the divisor stays the rank at the start
    scale = 8 / (4 + 1e-5)
    torch.testing.assert_close(full - adapter.weight(W), scale * value * torch.outer(adapter.p[:, 1], adapter.q[1]))
    with torch.no_grad():
        adapter.e[1] = value
    assert torch.equal(adapter.weight(W), full)


def test_penalty_is_the_mean_over_factors_and_vanishes_for_orthonormal_ones():
    model = nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 10))
    tt.attach(model, tt.AdaLoRA(rank=3, penalty=0.2), targets=r"\d")
    from trimtab.methods.reparameterized.adalora import AdaLoRAAdapter

    found = [m for m in model.modules() if isinstance(m, AdaLoRAAdapter)]
    eye = torch.eye(3)
    total = sum((m.p.t() @ m.p - eye).norm() + (m.q @ m.q.t() - eye).norm() for m in found)
    torch.testing.assert_close(orthogonality(model), 0.2 / 4 * total)
    with torch.no_grad():
        for m in found:
            m.p.copy_(torch.linalg.qr(m.p)[0])
            m.q.copy_(torch.linalg.qr(m.q.t())[0].t())
    assert orthogonality(model) < 1e-6
    with pytest.raises(tt.NoMatch):
        orthogonality(nn.Linear(2, 2))
