"""Adapters of a cut base on a base that is cut again, and on the whole one: the same function, to rounding."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from cut_models import FAMILIES, IDS, adapted, build, furthest, moved, run, some

import trimtab as tt
from trimtab.core.checkpoint import read_manifest
from trimtab.core.cut import cut_of
from trimtab.methods.additive.unit_mask import UnitMaskAdapter
from trimtab.schedules import restoration, surgery

TOLERANCE = 2e-14


def small(family: str, method: tt.MethodConfig | None = None, **more):
    """A cut model whose adapter has been trained since, and what it gives."""
    model = adapted(family, method, **more)
    surgery.cut(model, some(model))
    moved(model, seed=5)
    return model, run(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_both_modes_and_restoring_in_place_are_exact(family: str, tmp_path: Path):
    """Oracles 1 and 2: index mode, mask mode, a view, and the very base put back under the adapter."""
    model, wanted = small(family)
    tt.save(model, tmp_path / "a")
    for mode in ("index", "mask"):
        other = build(family)
        assert restoration.load(other, tmp_path / "a", mode=mode) == "default"
        assert furthest(run(other), wanted) < TOLERANCE
        whole = sum(p.numel() for n, p in other.named_parameters() if "trimtab" not in n)
        assert (whole < sum(p.numel() for p in build(family).parameters())) is (mode == "index")
    base = build(family)
    assert furthest(run(restoration.view(base, tmp_path / "a")), wanted) < TOLERANCE
    before = {name: p for name, p in build(family).named_parameters()}
    restoration.restore(model)
    assert furthest(run(model), wanted) < TOLERANCE
    after = {name: p for name, p in model.named_parameters() if "trimtab" not in name}
    assert before.keys() == after.keys() and all(torch.equal(p, before[name]) for name, p in after.items())


def test_zero_padding_without_masks_is_another_function(tmp_path: Path):
    """Oracle 2: mode (c) of the brief differs, so that the tests above tell the modes apart."""
    model, wanted = small("llama, a key for two queries")
    tt.save(model, tmp_path / "a")
    restoration.load(whole := build("llama, a key for two queries"), tmp_path / "a", mode="mask")
    for module in whole.modules():
        if isinstance(module, UnitMaskAdapter):
            module.m.fill_(1)
    assert furthest(run(whole), wanted) > 1


@pytest.mark.parametrize("method", [tt.DoRA(rank=2), tt.PiSSA(rank=2), tt.IA3(side="input"), tt.SSF(), tt.UnitMask()], ids=str)
def test_other_methods_too(method: tt.MethodConfig, tmp_path: Path):
    """DoRA's norms are those of what is left; UnitMask stands beside the constant mask."""
    model, wanted = small("bert", method, targets="attn.o | mlp.down" if isinstance(method, tt.UnitMask) else "attention | mlp")
    tt.save(model, tmp_path / "a")
    for mode in ("index", "mask"):
        restoration.load(other := build("bert"), tmp_path / "a", mode=mode)
        assert furthest(run(other), wanted) < TOLERANCE


def test_two_tasks_on_one_base_switch_and_route(tmp_path: Path):
    """Mask mode: different units are left for each."""
    family, wanted = "llama, a key for two queries", {}
    for number, name in enumerate(("one", "two")):
        model = adapted(family, name=name)
        surgery.cut(model, some(model, first=lambda n, number=number: [i for i in range(n) if i % 3 != number]))
        moved(model, seed=7 + number)
        tt.save(model, tmp_path / name)
        wanted[name] = run(model)
    base = build(family)
    plain = run(base)
    for name in wanted:
        restoration.load(base, tmp_path / name, mode="mask")
    for name in wanted:
        tt.activate(base, name)
        assert furthest(run(base), wanted[name]) < TOLERANCE
    with tt.routed(base, ["two", None]), torch.no_grad():
        rows = base(input_ids=IDS).logits
    assert (rows[0] - wanted["two"][0][0]).abs().max() < TOLERANCE and (rows[1] - plain[0][1]).abs().max() < TOLERANCE
    tt.activate(base)
    assert furthest(run(base), plain) == 0
    tt.merge(base, "one")  # the masked units become zeros in a model of the same shape
    assert furthest(run(base), wanted["one"]) < TOLERANCE
    tt.unmerge(base, "one")
    tt.save(base, tmp_path / "again", name="one")  # from now on an ordinary adapter
    tt.load(fresh := build(family), tmp_path / "again")
    assert furthest(run(fresh), wanted["one"]) < TOLERANCE
    for path in (base.model.layers[0].self_attn.o_proj, base.model.layers[1].mlp.down_proj):
        name = next(n for n, m in base.named_modules() if m is path)
        dense = tt.effective_weight(base, name, name="one")
        gone = dense.abs().sum(0) == 0
        assert 0 < int(gone.sum()) < len(gone)


def test_two_views_share_what_is_not_cut(tmp_path: Path):
    family = "vit"
    for name, first in (("one", 0), ("two", 1)):
        model = adapted(family, name=name)
        surgery.cut(model, some(model, first=lambda n, first=first: list(range(first, n, 2))))
        tt.save(model, tmp_path / name)
        torch.save(run(model), tmp_path / f"{name}.pt")
    base = build(family)
    views = [restoration.view(base, tmp_path / name) for name in ("one", "two")]
    for view, name in zip(views, ("one", "two"), strict=True):
        assert furthest(run(view), torch.load(tmp_path / f"{name}.pt")) < TOLERANCE
        assert view.vit.embeddings.cls_token is base.vit.embeddings.cls_token
    assert furthest(run(base), run(build(family))) == 0 and cut_of(base) is None
    sizes = [sum(p.numel() for n, p in m.named_parameters() if "trimtab" not in n) for m in (views[0], base)]
    assert sizes[0] < 0.6 * sizes[1]


def test_what_may_not_be_loaded_where(tmp_path: Path):
    model, _ = small("bert")
    tt.save(model, tmp_path / "small")
    whole = adapted("bert")
    tt.save(whole, tmp_path / "whole")
    assert "cut" in read_manifest(tmp_path / "small") and "cut" not in read_manifest(tmp_path / "whole")
    with pytest.raises(tt.CheckpointMismatch, match=r'units were cut out; .*mode="index"'):
        tt.load(build("bert"), tmp_path / "small")
    with pytest.raises(tt.CheckpointMismatch, match="made for the whole base"):
        tt.load(model, tmp_path / "whole", name="other")
    other = adapted("bert")
    surgery.cut(other, some(other, first=lambda n: [0]))
    with pytest.raises(tt.CheckpointMismatch, match="others than from this model"):
        tt.load(other, tmp_path / "small", name="other")
    with pytest.raises(tt.Unsupported, match="other adapters are on it"):
        restoration.load(whole, tmp_path / "small")
    with pytest.raises(tt.Unsupported, match="mask mode needs it whole"):
        restoration.load(model, tmp_path / "small", mode="mask", name="other")
    with pytest.raises(tt.Unsupported, match="which the format 'peft' cannot say"):
        tt.save(model, tmp_path / "p", format="peft")
    with pytest.raises(tt.Unsupported, match="nothing was cut"):
        restoration.restore(whole)
    with pytest.raises(ValueError, match='"index" or "mask"'):
        restoration.load(build("bert"), tmp_path / "small", mode="pad")
    tt.load(model, tmp_path / "small", name="twin")  # a base that is cut the same takes it
    restoration.load(build("bert"), tmp_path / "whole")  # and a whole adapter is loaded as ever
    assert restoration.load(whole, tmp_path / "small", mode="mask", name="beside", active=False) == "beside"


@pytest.mark.parametrize("mode", ["index", "mask"])
def test_another_base_is_noticed_and_nothing_is_changed(mode: str, tmp_path: Path):
    model, _ = small("bert")
    tt.save(model, tmp_path / "a")
    torch.manual_seed(1)
    other = copy.deepcopy(build("bert"))
    with torch.no_grad():
        for p in other.parameters():
            p.copy_(torch.randn_like(p))
    before = dict(other.named_parameters())
    with pytest.raises(tt.CheckpointMismatch, match="another base"):
        restoration.load(other, tmp_path / "a", mode=mode)
    assert dict(other.named_parameters()) == before and cut_of(other) is None
    restoration.load(other, tmp_path / "a", mode=mode, check_base=False)


def test_originals_go_where_they_are_told(tmp_path: Path):
    model, _ = small("bert")
    tt.save(model, tmp_path / "a")
    for originals, there in (("keep", True), ("host", True), ("drop", False)):
        restoration.load(other := build("bert"), tmp_path / "a", originals=originals)
        assert all((whole is not None) is there for *_, whole in cut_of(other).parameters)


def test_restoring_keeps_who_learns_and_who_acts():
    model = adapted("bert", name="a")
    tt.attach(model, tt.LoRA(rank=1), targets="attn.q", name="b", trainable=False)
    tt.activate(model, "a")
    surgery.cut(model, some(model))
    wanted = run(model)
    restoration.restore(model)
    assert furthest(run(model), wanted) < TOLERANCE
    rows = {row["name"]: row for row in tt.summary(model)}
    assert rows["a"]["active"] and not rows["b"]["active"] and rows["b"]["trainable"] == 0 < rows["a"]["trainable"]
    model(input_ids=IDS).logits.square().sum().backward()
    torch.optim.SGD(tt.parameters(model), lr=0.1).step()  # exactly the adapters have gradients
