"""Consolidator: grouped linear layers, shuffled or not, as blocks of the weight (arXiv 2305.00603)."""

from __future__ import annotations

import pytest
import torch
from structured_places import Opaque, assert_law, build, count, layer, site
from torch import nn
from torch.nn import functional as F

import trimtab as tt
from trimtab.core.account import saved_bytes

D = torch.float64


def test_worked_example():
    """8 -> 4 with two groups of ones, shuffled: rows 0-1 read inputs {0, 1, 4, 5}, rows 2-3 {2, 3, 6, 7}."""
    place = site(layer(4, 8))
    adapter = build(tt.Consolidator(groups=2, shuffle=True), place, move=0)
    with torch.no_grad():
        adapter.g.fill_(1.0)
    pattern = adapter.weight(torch.zeros(4, 8, dtype=D))
    assert pattern.tolist() == [[1, 1, 0, 0, 1, 1, 0, 0]] * 2 + [[0, 0, 1, 1, 0, 0, 1, 1]] * 2


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_it_is_a_grouped_convolution_beside_the_base(groups, shuffle):
    """The paper's layer: shuffle channels (g, in / g) -> (in / g, g), then a 1x1 convolution with g groups."""
    place = site(layer(12, 18))
    adapter = build(tt.Consolidator(groups=groups, shuffle=shuffle), place)
    x = torch.randn(5, 18, dtype=D)
    s = x.view(5, groups, -1).transpose(1, 2).flatten(1) if shuffle else x
    branch = F.conv1d(s[:, :, None], adapter.g[:, :, None], groups=groups)[:, :, 0]
    torch.testing.assert_close(adapter(x, place), place(x) + branch)


@pytest.mark.parametrize("opaque", [False, True])
@pytest.mark.parametrize("config", [tt.Consolidator(groups=4), tt.Consolidator(groups=2, shuffle=True), tt.Consolidator(groups=1)])
def test_law(config, opaque):
    place = site(layer(8, 12))
    assert_law(build(config, place), Opaque(place) if opaque else place)


def test_merges_within_the_papers_error():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(48, 24)), torch.randn(20, 48)
    tt.attach(model, tt.Consolidator(groups=12, shuffle=True), targets="0")
    adapted, base = model(x), model[0]._parameters["weight"].detach().clone()
    tt.merge(model, "default")
    assert (model(x) - adapted).abs().max() < 5e-6
    assert int((model[0]._parameters["weight"] != base).sum()) == 24 * 4
    tt.unmerge(model, "default")
    assert torch.equal(model[0]._parameters["weight"], base)


def test_starts_near_the_base():
    adapter = build(tt.Consolidator(groups=2), site(layer(40, 40)), move=0)
    assert 0.0009 < adapter.g.abs().max() <= 0.001
    assert adapter.g.mean().abs() < 1e-4


def test_count_of_vit_b():
    block = (((768, 768), 4), ((3072, 768), 1), ((768, 3072), 1))
    assert 12 * count(tt.Consolidator(), block) == 221_184


def test_saves_the_input_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 96))
    tt.attach(model, tt.Consolidator(groups=48), targets="0")
    x = torch.randn(300, 96, requires_grad=True)
    with saved_bytes(model) as saved:
        y = model(x)
    assert saved.total == x.numel() * 4
    y.sum().backward()


def test_bad_input():
    for bad in (0, 2.0, True):
        with pytest.raises(tt.ShapeMismatch, match="groups"):
            tt.Consolidator(groups=bad)
    with pytest.raises(tt.ShapeMismatch, match=r"groups=4 does not divide the 10 outputs of fc; nearest divisors: 2 and 5"):
        build(tt.Consolidator(groups=4), site(layer(10, 8)))
    with pytest.raises(tt.ShapeMismatch, match="9 inputs"):
        build(tt.Consolidator(groups=2), site(layer(8, 9)))
