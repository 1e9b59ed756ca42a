"""VeRA: counts, shared projections, first gradients, kept bytes, dropout."""

from __future__ import annotations

import math

import torch
from lowrank_places import adapted, llama_count
from torch import nn
from torch.nn import functional as F

import trimtab as tt
from trimtab.core.contracts import Adapter
from trimtab.kernels import projections
from trimtab.kernels.dropout import keep_mask, keep_rate


def test_published_count():
    assert llama_count(tt.VeRA(rank=256)) == 129_024


def test_equal_widths_share_storage_and_narrow_ones_are_slices():
    model = nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 8))
    tt.attach(model, tt.VeRA(rank=6, seed=3), targets=r"\d")
    first, second, third, last = (m for m in model.modules() if isinstance(m, Adapter))
    assert second.A.data_ptr() == third.A.data_ptr() and second.B.data_ptr() == third.B.data_ptr()
    assert first.A.untyped_storage().data_ptr() == last.A.untyped_storage().data_ptr()
    assert torch.equal(first.A[:, :12], last.A) and torch.equal(first.B[:8], last.B)
    rng = torch.Generator().manual_seed(3)
    A = (2 * torch.rand(6, 16, generator=rng) - 1) * math.sqrt(6 / 16)
    B = (2 * torch.rand(12, 6, generator=rng) - 1)
    assert torch.equal(first.A, A) and torch.equal(first.B, B)


def test_shared_projections_are_saved_once_and_stay_shared(tmp_path):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    tt.attach(model, tt.VeRA(rank=32), targets=r"\d")
    tt.save(model, tmp_path)
    stored = sum(f.stat().st_size for f in tmp_path.rglob("*.safetensors"))
    assert stored < 1.5 * 4 * 2 * 64 * 32
    fresh = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    fresh.load_state_dict({k: v for k, v in model.state_dict().items() if "trimtab" not in k})
    tt.load(fresh, tmp_path)
    assert len({m.A.data_ptr() for m in fresh.modules() if isinstance(m, Adapter)}) == 1


def test_start_and_first_gradients():
    model, adapter, W = adapted(tt.VeRA(rank=5))
    x, dy = torch.randn(7, 16, dtype=torch.float64), torch.randn(7, 12, dtype=torch.float64)
    y = model(x)
    torch.testing.assert_close(y, F.linear(x, W, model[0].bias), rtol=0, atol=0)
    assert torch.equal(adapter.d, torch.full((5,), 0.1, dtype=torch.float64))
    y.backward(dy)
    assert torch.count_nonzero(adapter.d.grad) == 0
    torch.testing.assert_close(adapter.e.grad, (dy * (0.1 * x @ adapter.A.t() @ adapter.B.t())).sum(0))


def test_gradients_with_dropout_are_those_of_the_composition(monkeypatch):
    monkeypatch.setattr(projections, "draw_seed", lambda: 5)
    model, adapter, W = adapted(tt.VeRA(rank=5, dropout=0.3), moved=True)
    x = torch.randn(2, 9, 16, dtype=torch.float64, requires_grad=True)
    mask = keep_mask(5, 0.3, x.view(-1, 16)).view_as(x) / keep_rate(0.3)
    h = (x * mask) @ adapter.A.t()
    plain = F.linear(x, W, model[0].bias) + (h * adapter.d) @ adapter.B.t() * adapter.e
    y = model(x)
    torch.testing.assert_close(y, plain)
    leaves = (x, adapter.d, adapter.e)
    for ours, other in zip(
        torch.autograd.grad(y.sin().sum(), leaves), torch.autograd.grad(plain.sin().sum(), leaves), strict=True
    ):
        torch.testing.assert_close(ours, other)


def test_keeps_the_projected_input_alone():
    model, adapter, _ = adapted(tt.VeRA(rank=8, dropout=0.1), out=96, fan_in=64, dtype=torch.float32)
    x = torch.randn(128, 64, requires_grad=True)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        y = model(x)
    assert y is not None
    assert sum(t.nbytes for t in kept.values() if t.untyped_storage().data_ptr() not in own) == 128 * 8 * 4
