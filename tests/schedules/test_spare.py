"""Light-PEFT's numbers: counts, what is left, ratios of modules, scores of ranks."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from cut_models import D, Fused
from torch import Tensor, nn
from torch.nn import functional as F

import trimtab as tt
from trimtab.core.state import state_of
from trimtab.schedules.spare import ModuleRatios, RankScores, keep_best, keep_best_of_all, prune_count, rank_scores


def adapters(model: nn.Module) -> list:
    return state_of(model).groups["default"].adapters


def test_counts():
    """Oracle 8: the authors' strict comparison with a quantile, as whole numbers."""
    assert [prune_count(r, 16, official=True) for r in (0.25, 1 / 3, 0.333333333, 0.4, 0.5)] == [4, 6, 6, 7, 8]
    assert 144 - prune_count(0.75, 144, official=True) == 36
    assert 288 - prune_count(0.5, 288, official=True) == 144
    assert prune_count(1 / 3, 98_304, official=True) == prune_count(1 / 3, 98_304) == 32_768
    assert [prune_count(r, 16) for r in (0.25, 1 / 3, 0.4, 0.5)] == [4, 5, 6, 8]  # the nearest whole number
    assert [prune_count(0.5, n) for n in (1, 3, 5)] == [1, 2, 3]  # halves go up
    assert prune_count(1 / 3, 12) == 4 and prune_count(7, 12) == 7
    assert prune_count(0.0, 12) == prune_count(0.0, 12, official=True) == 0


def test_the_official_count_is_that_of_a_quantile():
    for n in (5, 16, 144):
        scores = torch.randperm(n, generator=torch.Generator().manual_seed(n)).double()
        for share in (0.1, 0.25, 0.5, 0.9):
            assert int((scores <= scores.quantile(share)).sum()) == prune_count(share, n, official=True)


def test_what_is_left_of_one_place():
    scores = torch.tensor([0.3, 0.1, 0.2, 0.1, 0.9])
    assert keep_best(scores, 2).tolist() == [0, 2, 4]
    assert keep_best(scores, 1).tolist() == [0, 1, 2, 4]  # of two equal ones the later goes
    assert keep_best(torch.ones(4), 2).tolist() == [0, 1]
    assert keep_best(scores, 99).tolist() == [4]  # never all
    assert keep_best(-scores, 1).tolist() == [0, 1, 2, 3]  # signed values are compared
    with pytest.raises(ValueError, match="NaN or infinite"):
        keep_best(torch.tensor([1.0, float("nan")]), 1)


def test_what_is_left_of_several_places():
    scores = [torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.9, 0.8, 0.7, 0.6])]
    assert [i.tolist() for i in keep_best_of_all(scores, 2)] == [[2], [0, 1, 2, 3]]
    assert [i.tolist() for i in keep_best_of_all(scores, 3)] == [[2], [0, 1, 2]]  # each keeps one, and the count is met
    assert [i.tolist() for i in keep_best_of_all(scores, 99)] == [[2], [0]]
    assert [i.tolist() for i in keep_best_of_all([torch.ones(3), torch.ones(3)], 3)] == [[0, 1], [0]]
    draw = random.Random(0)
    for _ in range(100):
        found = [torch.tensor([draw.choice([0.0, draw.random()]) for _ in range(draw.randint(1, 9))]) for _ in range(4)]
        total = sum(map(len, found))
        for gone in range(total + 1):
            left = keep_best_of_all(found, gone)
            assert sum(map(len, left)) == max(4, total - gone) and all(len(i) for i in left)
        aligned = keep_best_of_all(found, total // 2, align=4)
        assert all(len(i) % 4 == 0 or len(i) == len(s) for i, s in zip(aligned, found, strict=True))


# -- modules


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def model(method: tt.MethodConfig | None = None, **more) -> Model:
    torch.manual_seed(0)
    net = Model().to(D).train()
    tt.attach(net, method or tt.LoRA(rank=3), targets=["first", "second"], rng=torch.Generator().manual_seed(1), **more)
    with torch.no_grad():
        for p in tt.parameters(net):
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)).to(p))
    return net


def ratios(net: nn.Module, batches: list[tuple[Tensor, Tensor | None]]) -> Tensor:
    found = ModuleRatios(adapters(net))
    handles, found.on = found.hooks(), True
    for x, tokens in batches:
        found.tokens = tokens
        net(x)
    found.take()
    for handle in handles:
        handle.remove()
    return found.means()


@pytest.mark.parametrize("method", [tt.LoRA(rank=3), tt.LoRA(rank=3, dropout=0.4), tt.DoRA(rank=3), tt.LoHa(rank=2)], ids=str)
def test_a_modules_ratio(method: tt.MethodConfig):
    """||delta|| / ||base|| with the base's bias, without dropout, whatever the method."""
    net, x = model(method), torch.randn(4, 5, 6, dtype=D)
    found = ratios(net, [(x, None)])
    net.eval()
    hidden = torch.tanh(net.first(x))
    for value, path, z in zip(found, ("first", "second"), (x, hidden), strict=True):
        layer = net.get_submodule(path)
        base = F.linear(z, *layer._parameters.values())
        delta = z @ (tt.effective_weight(net, path) - layer._parameters["weight"]).t()
        if method.__class__ is tt.LoRA and method.dropout and path == "second":
            continue  # its input was dropped on the way, at random
        torch.testing.assert_close(value, (delta.norm(dim=-1) / base.norm(dim=-1)).mean(), rtol=1e-9, atol=0)


def test_parts_of_a_fused_layer():
    net = Fused().to(D).train()
    tt.attach(net, tt.LoRA(rank=2), targets="attn.q | attn.v", layers=[0], rng=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for p in tt.parameters(net):
            p.add_(0.3)
    x = torch.randn(2, 5, 24, dtype=D)
    found = ratios(net, [(x, None)])
    block = net.blocks[0]
    x, qkv = block.norm1(x), block.attn.qkv
    y = F.linear(x, *qkv._parameters.values())
    delta = x @ (tt.effective_weight(net, "blocks.0.attn.qkv") - qkv._parameters["weight"]).t()
    for value, rows in zip(found, (slice(0, 32), slice(64, 96)), strict=True):
        torch.testing.assert_close(value, (delta[..., rows].norm(dim=-1) / y[..., rows].norm(dim=-1)).mean())


def test_micro_batches_and_padding_change_nothing():
    """Oracle 11: sums and counts, not means of means."""
    net, x = model().eval(), torch.randn(32, 5, 6, dtype=D)
    tokens = torch.ones(32, 5, dtype=torch.long)
    for i in range(32):
        tokens[i, 1 + i % 5 :] = 0
    whole = ratios(net, [(x, tokens)])
    split = ratios(net, list(zip(x.split(8), tokens.split(8), strict=True)))
    torch.testing.assert_close(whole, split, rtol=1e-15, atol=0)
    means = torch.stack([ratios(net, [pair]) for pair in zip(x.split(8), tokens.split(8), strict=True)]).mean(0)
    assert (means - whole).abs().max() > 1e-5
    noise = torch.where(tokens[..., None] == 0, torch.randn(32, 5, 6, dtype=D) * 9, x)
    torch.testing.assert_close(ratios(net, [(noise, tokens)]), whole, rtol=1e-15, atol=0)


def test_a_ratio_that_is_not_finite_counts_as_nothing():
    net = model()
    with torch.no_grad():
        net.first.weight.zero_()
        net.first.bias.zero_()
    found = ratios(net, [(torch.randn(3, 6, dtype=D), None)])
    assert found[0] == 0 < found[1]


# -- ranks


@dataclass(frozen=True)
class Bottleneck(tt.MethodConfig):
    """y + up act(down y), without biases."""

    act: str = "relu"


@tt.method(Bottleneck, paper="a test")
class BottleneckAdapter(tt.ActivationAdapter):
    rank_axes = {"down": 0, "up": 1}
    targets = "first"

    def __init__(self, config, site, *, rng):
        super().__init__(config, site)
        self.down, self.up = self.normal(3, site.shape[0], std=0.5, rng=rng), self.normal(site.shape[0], 3, std=0.5, rng=rng)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + getattr(torch, self.config.act)(y @ self.down.t()) @ self.up.t()


def gradients(method: tt.MethodConfig) -> nn.Module:
    torch.manual_seed(0)
    net = Model().to(D).train()
    tt.attach(net, method, targets=["first"], rng=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for p in tt.parameters(net):
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)).to(p))
    net(torch.randn(20, 6, dtype=D)).sin().sum().backward()
    return adapters(net)[0]


SYMMETRIC = [(tt.LoRA(rank=3), True), (Bottleneck("relu"), True), (Bottleneck("tanh"), False)]


@pytest.mark.parametrize("method, symmetric", SYMMETRIC, ids=str)
def test_scores_of_ranks(method: tt.MethodConfig, symmetric: bool):
    """Oracle 5: both factors' terms are equal for LoRA and for a bottleneck with ReLU, not for one with tanh."""
    adapter = gradients(method)
    names = {axis: name for name, axis in type(adapter).rank_axes.items()}
    A, B = getattr(adapter, names[0]), getattr(adapter, names[1])
    rows, columns = (A * A.grad).sum(1), (B * B.grad).sum(0)
    assert bool(torch.allclose(rows, columns, rtol=1e-12, atol=1e-14)) is symmetric
    found = rank_scores(adapter)
    torch.testing.assert_close(found, rows.abs() / A.shape[1] + columns.abs() / B.shape[0])
    if symmetric:
        torch.testing.assert_close(found, columns.abs() * (1 / A.shape[1] + 1 / B.shape[0]))


def test_an_adapter_on_outputs_is_measured_beside_its_input():
    torch.manual_seed(0)
    net = Model().to(D).train()
    tt.attach(net, Bottleneck(), targets=["first"], rng=torch.Generator().manual_seed(1))
    x = torch.randn(4, 5, 6, dtype=D)
    (found,) = ratios(net, [(x, None)])
    with tt.disabled(net):
        y = net.first(x)
    torch.testing.assert_close(found, ((net.first(x) - y).norm(dim=-1) / y.norm(dim=-1)).mean())


def test_scores_are_taken_of_whole_gradients():
    """Accumulated over micro-batches first; a mean over steps."""
    net, x = model().eval(), torch.randn(32, 6, dtype=D)
    found = []
    for parts in (1, 4):
        scores = RankScores(adapters(net))
        for _ in range(2):
            net.zero_grad()
            for part in x.chunk(parts):
                net(part).sin().sum().backward()
            scores.take()
        found.append(scores.means())
    for one, four in zip(*found, strict=True):
        torch.testing.assert_close(one, four)
        assert len(one) == 3 and bool((one > 0).all())
