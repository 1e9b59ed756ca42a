"""Compacter: the Kronecker sums, the shared factors through attach, save and training, starts, memory, bad input."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import trimtab as tt
from trimtab.core.account import saved_bytes

D = torch.float64


def encoder(depth: int = 2) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True, dtype=D)
    return nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)


def adapters(model: nn.Module, name: str = "default") -> list:
    return model.__dict__["_trimtab_state"].groups[name].adapters


def attached(config: tt.MethodConfig, *, moved: bool = True) -> nn.Module:
    model = encoder()
    tt.attach(model, config, rng=torch.Generator().manual_seed(0))
    if moved:
        torch.manual_seed(1)
        with torch.no_grad():
            for p in tt.parameters(model):
                p.add_(torch.randn_like(p) * 0.3)
    return model


def matrices(a: nn.Module) -> tuple[Tensor, Tensor]:
    """``(d, m)`` and ``(m, d)`` by torch.kron, term by term."""
    down = sum(torch.kron(a.rule[i], a.s[i] @ a.t[i]) for i in range(len(a.rule)))
    up = sum(torch.kron(a.rule[i], a.u[i] @ a.v[i]) for i in range(len(a.rule)))
    return down, up


@pytest.mark.parametrize("config", [tt.Compacter(reduction=4), tt.Compacter(reduction=2, divisions=2, rank=3, act="relu")])
def test_the_definition(config) -> None:
    model = attached(config)
    act = {"gelu_tanh": lambda u: F.gelu(u, approximate="tanh"), "relu": F.relu}[config.act]
    for a in adapters(model):
        down, up = matrices(a)
        assert down.shape == (16, 16 // config.reduction)
        y = torch.randn(2, 3, 16, dtype=D)
        torch.testing.assert_close(a(y, y), y + act(y @ down + a.down_bias) @ up + a.up_bias)


def test_the_start_is_the_base_and_scaled_like_a_linear_layer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256))
    tt.attach(model, tt.Compacter(reduction=4), targets="0")
    down, up = matrices(adapters(model)[0])
    assert not up.any()
    assert down.std().item() == pytest.approx((3 * 256) ** -0.5, rel=0.35)  # the spread of 64 Gaussian factors
    model(torch.randn(3, 256)).square().sum().backward()
    assert bool(adapters(model)[0].v.grad.abs().min() > 0)


def test_the_papers_start_is_near_the_base() -> None:
    model = attached(tt.Compacter(reduction=4, init="paper"), moved=False)
    change = [(a(y, y) - y).norm() / y.norm() for a in adapters(model) for y in [torch.randn(5, 16, dtype=D)]]
    assert 0 < max(change) < 1e-6


def test_all_places_share_one_rule_that_gets_every_places_gradient() -> None:
    model, x = attached(tt.Compacter(reduction=4)), torch.randn(2, 3, 16, dtype=D)
    found = adapters(model)
    assert len(found) == 4 and len({id(a.rule) for a in found}) == 1
    rule = found[0].rule
    assert sum(p is rule for p in tt.parameters(model)) == 1
    model(x).square().sum().backward()
    whole = rule.grad.clone()
    alone = attached(tt.Compacter(reduction=4, shared=False))
    for mine, theirs in zip(adapters(alone), found, strict=True):
        mine.load_state_dict(theirs.state_dict())
    alone(x).square().sum().backward()
    torch.testing.assert_close(whole, sum(a.rule.grad for a in adapters(alone)))


def test_the_table_counts_what_is_shared_once() -> None:
    table = tt.attach(encoder(), tt.Compacter(reduction=4), dry_run=True)
    place = 2 * (16 + 4) + 16 + 4
    assert table.column("parameters") == [place + 64, place, place, place]


def test_sharing_survives_save_and_load_copy_and_pickle(tmp_path) -> None:
    model, x = attached(tt.Compacter(reduction=4)), torch.randn(2, 3, 16, dtype=D)
    tt.save(model, tmp_path / "a")
    loaded = encoder()
    tt.load(loaded, tmp_path / "a", trainable=True)
    for other in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        found = adapters(other)
        assert len({id(a.rule) for a in found}) == 1 and found[0].rule is not adapters(model)[0].rule
        assert len(tt.parameters(other)) == 4 * 6 + 1
        torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
        optimizer = torch.optim.Adam(tt.parameters(other), lr=0.01)
        other(x).square().sum().backward()
        optimizer.step()
        assert len({id(a.rule) for a in found}) == 1 and all(a.rule.grad is not None for a in found)


def test_keeps_the_output_and_the_hidden_activation_alone() -> None:
    y = torch.randn(64, 64, requires_grad=True)
    model = nn.Sequential(nn.Linear(64, 64))
    tt.attach(model, tt.Compacter(reduction=16), targets="0")
    (a,) = adapters(model)
    with saved_bytes(model) as saved:
        a(y, y)
    assert saved.total == 64 * (64 + 4) * 4, "no matrix of Kronecker products"


def test_linear_compacters_merge() -> None:
    model, x = nn.Sequential(nn.Linear(8, 16, dtype=D)), torch.randn(5, 8, dtype=D)
    tt.attach(model, tt.Compacter(reduction=4, act="none", init="paper"), targets="0")
    with torch.no_grad():
        for p in tt.parameters(model):
            p.add_(torch.randn_like(p))
    (a,) = adapters(model)
    down, up = matrices(a)
    W = model[0]._parameters["weight"].detach()
    torch.testing.assert_close(tt.effective_weight(model, "0"), W + up.t() @ down.t() @ W)
    y = model(x)
    tt.merge(model, "default")
    torch.testing.assert_close(model(x), y)


def test_sizes_that_do_not_divide_are_told() -> None:
    with pytest.raises(tt.ShapeMismatch, match=r"16 features, which reduction 8 and 4 divisions do not divide; nearest .* 2, 4"):
        tt.attach(encoder(), tt.Compacter(reduction=8), layers=[0])
    with pytest.raises(tt.ShapeMismatch, match="use divisions that divide 16"):
        tt.attach(encoder(), tt.Compacter(reduction=2, divisions=3), layers=[0])


@pytest.mark.parametrize(
    "values", [{"reduction": 0}, {"divisions": 0}, {"rank": 0}, {"act": "swish"}, {"init": "bert"}, {"placement": "llm"}]
)
def test_bad_hyperparameters(values) -> None:
    with pytest.raises(tt.ShapeMismatch, match=next(iter(values))):
        tt.Compacter(**values)
