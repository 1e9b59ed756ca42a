"""LoRA and rsLoRA: counts, first gradients, scaling, rank, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from lowrank_places import adapted, llama_count
from torch import nn
from torch.nn import functional as F

import trimtab as tt


@pytest.mark.parametrize(("rank", "count"), [(32, 9_175_040), (64, 18_350_080)])
def test_published_counts(rank, count):
    assert llama_count(tt.LoRA(rank=rank)) == count
    assert llama_count(tt.RsLoRA(rank=rank)) == count


def test_count_of_all_seven_projections_of_llama2_7b():
    h, f, r = 4096, 11008, 36
    shapes = [(h, h)] * 4 + [(f, h)] * 2 + [(h, f)]
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(i, o, bias=False) for o, i in shapes))
    tt.attach(model, tt.LoRA(rank=r), targets=r"\d")
    assert 32 * sum(p.numel() for p in tt.parameters(model)) == 89_948_160


def test_first_gradients_are_zero_for_a_and_s_G_At_for_b():
    model, adapter, _ = adapted(tt.LoRA(rank=3, alpha=4.5))
    x, target = torch.randn(20, 16, dtype=torch.float64), torch.randn(20, 12, dtype=torch.float64)
    y = model(x)
    assert torch.equal(y, F.linear(x, model[0].weight, model[0].bias))
    (y - target).square().sum().backward()
    G = (2 * (y - target)).detach().t() @ x  # dL/dW
    assert torch.count_nonzero(adapter.a.grad) == 0
    torch.testing.assert_close(adapter.b.grad, 1.5 * G @ adapter.a.detach().t())


def test_start_is_kaiming_uniform_with_fan_in_one_for_embeddings():
    _, adapter, _ = adapted(tt.LoRA(rank=8), fan_in=2048)
    assert adapter.a.abs().max() <= 1 / math.sqrt(2048)
    assert adapter.a.var().item() == pytest.approx(1 / (3 * 2048), rel=0.05)
    model = nn.Sequential(nn.Embedding(500, 12))
    tt.attach(model, tt.LoRA(rank=8), targets="0")
    looked_up = dict(tt.named_parameters(model))
    a = next(value for key, value in looked_up.items() if key.endswith("a"))
    assert a.var().item() == pytest.approx(1 / 3, rel=0.1)  # as a linear's A x for an x of unit variance


def test_update_has_the_stated_rank_and_factors():
    _, adapter, W = adapted(tt.LoRA(rank=3), moved=True)
    B, A = adapter.factors()
    update = adapter.weight(W) - W
    assert torch.linalg.matrix_rank(update) == 3
    torch.testing.assert_close(B @ A, update)


def test_rslora_scale_is_alpha_over_the_root():
    assert tt.RsLoRA(rank=64, alpha=64).scale == 8
    assert tt.LoRA(rank=64, alpha=64).scale == 1
    x = torch.randn(5, 16, dtype=torch.float64)
    plain = adapted(tt.LoRA(rank=4, alpha=6), moved=True)[0]
    rooted = adapted(tt.RsLoRA(rank=4, alpha=6 / math.sqrt(4)), moved=True)[0]
    torch.testing.assert_close(rooted(x), plain(x))


def test_dropout_acts_while_training_alone_and_keeps_the_mean():
    model, adapter, W = adapted(tt.LoRA(rank=4, dropout=0.5), moved=True)
    x = torch.randn(1, 16, dtype=torch.float64)
    exact = F.linear(x, adapter.weight(W), model[0].bias)
    model.eval()
    torch.testing.assert_close(model(x), exact)
    model.train()
    many = model(x.expand(40_000, 16))
    assert not torch.equal(many[0], many[1])
    error = (many.mean(0) - exact[0]).abs() / (many.std(0) / math.sqrt(40_000))
    assert error.max() < 5


@pytest.mark.parametrize("bad", [{"rank": 0}, {"rank": -1}, {"rank": 2.0}, {"rank": True}, {"alpha": 0}, {"dropout": 1.0}])
@pytest.mark.parametrize("cls", [tt.LoRA, tt.RsLoRA, tt.DoRA])
def test_bad_hyperparameters(cls, bad):
    with pytest.raises(tt.ShapeMismatch):
        cls(**bad)


@pytest.mark.parametrize("cls", [tt.LoRA, tt.RsLoRA, tt.DoRA, tt.PiSSA, tt.OLoRA, tt.AdaLoRA])
def test_a_rank_above_the_matrix_is_refused_with_the_limit(cls):
    with pytest.raises(tt.ShapeMismatch, match="at most 12"):
        adapted(cls(rank=13))
