"""``exclude=`` beside ``targets=``, and selections that would leave nothing to learn."""

from __future__ import annotations

import pytest
import torch
from small_net import IDS, net
from torch import nn

import trimtab as tt


def paths(model, method=None, **more) -> set[str]:
    return set(tt.attach(model, method or tt.LoRA(rank=2), dry_run=True, **more).column("path"))


ALL = paths(net())


@pytest.mark.parametrize(
    ("targets", "exclude", "gone"),
    [
        (None, "q_proj", {p for p in ALL if p.endswith("q_proj")}),
        (None, ["mlp", "attn.v"], {p for p in ALL if p.endswith(("v_proj", "up_proj", "down_proj"))}),
        (None, "layers.1", {p for p in ALL if p.startswith("layers.1.")}),
        (None, r"layers\.0\..*_proj", {p for p in ALL if p.startswith("layers.0.")}),
        ("attention", "layers.0.attn", {p for p in ALL if p.startswith("layers.0.attn")}),
        (lambda path, module: isinstance(module, nn.Linear), "lm_head", {"lm_head"}),
        (None, [], set()),
        (None, None, set()),
    ],
)
def test_exclude_is_the_difference_of_two_selections(targets, exclude, gone) -> None:
    whole = paths(net(), targets=targets)
    assert gone <= whole
    assert paths(net(), targets=targets, exclude=exclude) == whole - gone


@pytest.mark.parametrize("method", [tt.SeriesAdapter(), tt.ReFT(), tt.PrefixTuning(tokens=2), tt.NormTuning(), tt.BitFit()])
def test_a_module_is_excluded_with_all_that_is_below_it_for_every_contract(method) -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2, enable_nested_tensor=False)
    whole = paths(model, method)
    left = paths(model, method, exclude="layers.1")
    assert left == {p for p in whole if not p.startswith("layers.1")} != whole


def test_what_is_below_a_container_is_excluded_from_it() -> None:
    left = paths(net(), tt.Unfreeze(), targets="block", exclude="norm | layers.0.attn")
    assert "layers.0.up_proj" in left and "layers.1.attn.q_proj" in left
    assert not any("norm" in p or p.startswith("layers.0.attn") for p in left)


def test_an_excluded_place_does_not_learn() -> None:
    model = net()
    tt.attach(model, tt.LoRA(rank=2), exclude="q_proj")
    optimizer = torch.optim.SGD(tt.parameters(model), lr=0.1)
    model(IDS).square().sum().backward()
    optimizer.step()
    assert not any("q_proj.trimtab" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("exclude", "error", "match"),
    [
        ("lm_head", tt.NoMatch, "'lm_head' matches 1 places, none of which is targeted"),
        ("qq_proj", tt.NoMatch, "'qq_proj' matches no place"),
        (["q_proj", "lm_head"], tt.NoMatch, "'lm_head'"),
        ("linear", tt.NoMatch, "takes away all places"),
        ("", tt.NoMatch, "names no place"),
        (7, tt.Unsupported, "found 7"),
    ],
)
def test_a_clause_that_takes_nothing_or_everything_is_an_error(exclude, error, match) -> None:
    model = net()
    with pytest.raises(error, match=match):
        tt.attach(model, tt.LoRA(rank=2), exclude=exclude)
    assert all(p.requires_grad for p in model.parameters())


def test_rows_of_a_place_that_is_targeted_whole_cannot_be_excluded() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 1, enable_nested_tensor=False)
    with pytest.raises(tt.Unsupported, match=r"'attn.q' names rows of layers.0.self_attn, which is targeted whole"):
        tt.attach(model, tt.LoRA(rank=2), targets="attn.qkv", exclude="attn.q")
    assert set(tt.attach(model, tt.LoRA(rank=2), targets="attn.q | attn.v", exclude="attn.q").column("path")) == {
        "layers.0.self_attn.in_proj_weight[v]"
    }


@pytest.mark.parametrize("targets", [[], (), set(), "", [""], "|", ["", " "], {}, iter(())])
def test_no_target_at_all_is_an_error_and_changes_nothing(targets) -> None:
    model = net()
    with pytest.raises(tt.NoMatch, match="names no place"):
        tt.attach(model, tt.LoRA(rank=2), targets=targets)
    assert all(p.requires_grad for p in model.parameters()) and "_trimtab_state" not in model.__dict__


@pytest.mark.parametrize("targets", [5, b"q_proj", [5], [None], ["q_proj", ("k_proj",)]])
def test_targets_of_another_type_are_refused_in_words(targets) -> None:
    with pytest.raises(tt.Unsupported, match="texts"):
        tt.attach(net(), tt.LoRA(rank=2), targets=targets)


def test_a_place_without_anything_to_learn_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout())
    with pytest.raises(tt.NoMatch, match="nothing to act on at 1"):
        tt.attach(model, tt.Unfreeze(), targets="1")
    with pytest.raises(tt.NoMatch, match="matches none of"):
        tt.attach(model, tt.Unfreeze(), targets=lambda path, module: False)
    with pytest.raises(tt.NoMatch, match="no index given"):
        tt.attach(net(), tt.LoRA(rank=2), layers=[])
