"""SPT: which entries are sensitive, which places get LoRA, how a budget is met, training and files (arXiv 2303.08566)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import trimtab as tt
from trimtab.core.account import saved_bytes

D = torch.float64
PATHS = ("0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias")


def net(dtype: torch.dtype = D) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 14), nn.GELU(), nn.LayerNorm(14), nn.Identity(), nn.Linear(14, 9)).to(dtype)


def batches(dtype: torch.dtype = D) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 10, generator=g).to(dtype), torch.randint(0, 9, (8,), generator=g)) for _ in range(4)]


def loss(model: nn.Module):
    for x, y in batches(next(model.parameters()).dtype):
        yield F.cross_entropy(model(x), y)


def sensitivity() -> dict[str, Tensor]:
    """Sums of squared gradients, batch by batch, the plain way."""
    model = net()
    names, tensors = zip(*model.named_parameters(), strict=True)
    total = [torch.zeros_like(t) for t in tensors]
    for one in loss(model):
        for t, g in zip(total, torch.autograd.grad(one, tensors), strict=True):
            t += g.square()
    return dict(zip(names, total, strict=True))


def attach(config: tt.SPT, model: nn.Module | None = None, **more) -> tuple[nn.Module, dict[str, nn.Module], tt.Table]:
    model = net() if model is None else model
    table = tt.attach(model, config, targets=["0", "2", "4"], loss=loss, rng=torch.Generator().manual_seed(0), **more)
    found = model.__dict__["_trimtab_state"].groups["default"].adapters
    return model, {f"{a.site.path}.{a.site.tensor}": a for a in found}, table


def chosen(scores: dict[str, Tensor], tau: int) -> dict[str, int]:
    """How many of the ``tau`` largest entries each tensor has, by one sort."""
    joined = torch.cat([s.flatten() for s in scores.values()])
    level = joined.sort(descending=True).values[tau - 1]
    return {name: int((s >= level).sum()) for name, s in scores.items()}


@pytest.mark.parametrize("tau", [1, 20, 57.3, 0.25, 0.999])
def test_the_number_selected_is_tau_rounded_up(tau):
    scores = sensitivity()
    total = sum(s.numel() for s in scores.values())
    wanted = math.ceil(tau * total) if tau < 1 else math.ceil(tau)
    # no structure: rank 14 costs more than any of these matrices
    _, found, table = attach(tt.SPT(tau=tau, rank=14, vector_divisor=1.0))
    counts = {name: len(adapter.index) for name, adapter in found.items()}
    assert sum(counts.values()) == wanted
    assert counts == chosen(scores, wanted)
    assert sum(row["parameters"] for row in table) == wanted
    for name, adapter in found.items():
        mask = torch.zeros(scores[name].numel(), dtype=torch.bool).index_fill(0, adapter.index.long(), True)
        flat = scores[name].flatten()
        assert not mask.any() or mask.all() or flat[mask].min() > flat[~mask].max()


def test_squares_are_summed_and_not_the_sum_squared():
    """Two batches whose gradients cancel in column 0: their squares do not."""
    model = nn.Sequential(nn.Linear(3, 2, bias=False))

    def batchwise(m):
        for row in torch.tensor([[5.0, 1.0, 0.0], [-5.0, 1.0, 0.0]]):
            yield m(row).sum()

    tt.attach(model, tt.SPT(tau=2), targets="0", loss=batchwise)
    adapter = next(m for m in model.modules() if isinstance(m, tt.Reparameterization))
    assert adapter.index.tolist() == [0, 3]


def test_thresholds_of_the_released_code():
    """1228.8 entries for 768 x 768 and 3072 for the feed-forward's at rank 8; a fifth of a vector."""
    config = tt.SPT()
    assert [config.is_structured((768, 768), c) for c in (1228, 1229)] == [False, True]
    assert [config.is_structured((3072, 768), c) for c in (3071, 3072)] == [False, True]
    assert [config.is_structured((768,), c) for c in (153, 154)] == [False, True]
    assert [config.cost((768, 768), c) for c in (1228, 1229)] == [1228, 12_288]
    assert [config.cost((768,), c) for c in (153, 154)] == [153, 768]
    paper = tt.SPT(divisor=1.0)
    assert [paper.is_structured((768, 768), c) for c in (12_287, 12_288)] == [False, True]
    # LoRA of rank 8 would cost 136 numbers, more than the 9 x 8 entries
    assert not config.is_structured((9, 8), 72)


def test_structured_where_much_is_sensitive_and_entries_elsewhere():
    scores = sensitivity()
    config = tt.SPT(tau=120, rank=2, divisor=2.0)
    _, found, _ = attach(config)
    kinds = set()
    for name, count in chosen(scores, 120).items():
        adapter, shape = found[name], scores[name].shape
        if config.is_structured(shape, count) and len(shape) == 2:
            assert [p.shape for p in adapter.parameters()] == [(2, shape[1]), (shape[0], 2)]
            kinds.add("low-rank")
        elif config.is_structured(shape, count):
            assert adapter.index.tolist() == list(range(len(scores[name])))
            kinds.add("whole")
        else:
            assert len(adapter.index) == count
            kinds.add("entries" if count else "nothing")
    assert kinds == {"low-rank", "whole", "entries", "nothing"}


@pytest.mark.parametrize("budget", [1, 40, 90, 131, 200, 0.5, 0.9])
def test_the_total_is_the_nearest_to_the_budget(budget):
    """Against all values of tau, by brute force."""
    scores = sensitivity()
    config = tt.SPT(budget=budget, rank=2)
    size = sum(s.numel() for s in scores.values())
    wanted = math.ceil(budget * size) if budget < 1 else budget
    spent = [
        sum(config.cost(scores[name].shape, count) for name, count in chosen(scores, tau).items()) for tau in range(1, size + 1)
    ]
    model, _, _ = attach(config)
    found = sum(p.numel() for p in tt.parameters(model))
    assert found in spent
    assert abs(found - wanted) == min(abs(s - wanted) for s in spent)


@pytest.mark.parametrize("tau", [60, 120])
def test_training_equals_dense_training_of_the_same_places(tau):
    """Adam without decay: masked entries, whole vectors and LoRA factors move as in a plain net; the rest keeps its bits."""
    ours, found, _ = attach(tt.SPT(tau=tau, rank=2, divisor=2.0))
    base = {name: p.detach().clone() for name, p in ours.named_parameters() if "trimtab" not in name}
    low = {name: [p.detach().clone().requires_grad_() for p in a.parameters()] for name, a in found.items() if a.b is not None}
    dense = {name: base[name].clone().requires_grad_() for name in PATHS if name not in low}
    masks = {
        name: torch.zeros(base[name].numel(), dtype=D).index_fill(0, found[name].index.long(), 1.0).view(base[name].shape)
        for name in dense
    }
    assert 0 < len(low) < len(found)

    def weights() -> dict[str, Tensor]:
        return dense | {name: base[name] + b @ a for name, (a, b) in low.items()}

    plain = net()
    adam = [
        torch.optim.Adam(tt.parameters(ours), lr=0.01),
        torch.optim.Adam([*dense.values(), *(p for pair in low.values() for p in pair)], lr=0.01),
    ]
    for x, y in batches():
        adam[0].zero_grad()
        F.cross_entropy(ours(x), y).backward()
        adam[0].step()
        adam[1].zero_grad()
        F.cross_entropy(torch.func.functional_call(plain, weights(), (x,)), y).backward()
        for name, W in dense.items():
            W.grad *= masks[name]
        adam[1].step()
    for name, want in weights().items():
        path, tensor = name.split(".")
        effective = tt.effective_weight(ours, path, tensor=tensor)
        torch.testing.assert_close(effective, want, atol=1e-10, rtol=0)
        if name in masks:
            assert torch.equal(effective[masks[name] == 0], base[name][masks[name] == 0])
        assert torch.equal(ours.state_dict()[name], base[name])


def test_starts_at_the_base_merges_and_comes_back():
    model = net(torch.float32)
    x = batches(torch.float32)[0][0]
    base = model(x)
    _, found, _ = attach(tt.SPT(tau=70, rank=2, divisor=2.0), model)
    torch.testing.assert_close(model(x), base, atol=1e-6, rtol=0)
    with torch.no_grad():
        for p in tt.parameters(model):
            p.normal_(std=0.1)
    adapted = model(x)
    assert (adapted - base).abs().max() > 1e-3
    tt.merge(model, "default")
    assert (model(x) - adapted).abs().max() < 1e-5
    tt.unmerge(model, "default")
    assert torch.equal(model[0]._parameters["weight"], net(torch.float32)[0].weight)
    assert all((a.factors() is not None) == (a.b is not None) for a in found.values())


def test_a_file_brings_the_shapes_back_without_gradients(tmp_path):
    """Low-rank, single entries, whole vectors, and a place that got nothing."""
    model, found, _ = attach(tt.SPT(tau=12, rank=1, divisor=8.0))
    assert {bool(list(a.parameters())) for a in found.values()} == {False, True}
    assert any(a.b is not None for a in found.values())
    with torch.no_grad():
        for p in tt.parameters(model):
            p.normal_()
    tt.save(model, tmp_path)
    fresh = net()
    tt.load(fresh, tmp_path, trainable=True)
    state = fresh.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    x, y = batches()[0]
    torch.testing.assert_close(fresh(x), model(x), atol=0, rtol=0)
    for m in (fresh, model):
        F.cross_entropy(m(x), y).backward()
    for ours, theirs in zip(tt.parameters(model), tt.parameters(fresh), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_a_plan_without_gradients_is_near_the_budget():
    """ViT-B/16 from shapes alone: both kinds of place, and a total below the budget by less than one place's jump."""
    from transformers import ViTConfig, ViTModel

    with torch.device("meta"):
        model = ViTModel(ViTConfig(), add_pooling_layer=False)
    table = tt.attach(model, tt.SPT(budget=400_000), dry_run=True)
    total = sum(row["parameters"] for row in table)
    assert 400_000 - 8 * (768 + 3072) < total <= 400_000
    assert {row["parameters"] for row in table} >= {12_288, 30_720}
    assert all("embeddings" not in row["path"] for row in table)


def test_convolutions_and_embeddings_take_both_kinds():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 4))
    x = torch.randn(6, 3, 4, 4)
    for tau, rank in ((30, 1), (8, 4)):
        tt.attach(model, tt.SPT(tau=tau, rank=rank, divisor=2.0), targets=["0"], name=f"{tau}", loss=lambda m: m(x).square().sum())
    adapters = [g.adapters[0] for g in model.__dict__["_trimtab_state"].groups.values()]
    assert [a.b is not None for a in adapters] == [True, False]
    for adapter in adapters:
        with torch.no_grad():
            for p in adapter.parameters():
                p.normal_()
        place = adapter.site
        torch.testing.assert_close(adapter.run(x, place), place.apply(x, adapter.weight(place.weight)), atol=1e-5, rtol=1e-5)


def test_saves_the_input_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    x = torch.randn(100, 64, requires_grad=True)
    for config in (tt.SPT(tau=60), tt.SPT(tau=2000, rank=1)):
        tt.attach(model, config, targets="0", loss=lambda m: m(x).square().sum())
        with saved_bytes(model) as saved:
            y = model(x)
        assert x.numel() * 4 <= saved.total <= (x.numel() + 100) * 4  # rank 1 keeps x A^T, one number a token
        y.sum().backward()
        tt.detach(model, "default")


def test_bad_input():
    for bad in ({"budget": 0}, {"tau": 0}, {"rank": 0}, {"divisor": 0.5}, {"vector_divisor": 0.9}, {"dropout": 1.0}):
        with pytest.raises(tt.ShapeMismatch):
            tt.SPT(**bad)
    with pytest.raises(tt.ShapeMismatch, match=r"budget=400 is more than the 317 weights of the 6 targeted places"):
        attach(tt.SPT(budget=400))
    with pytest.raises(tt.ShapeMismatch, match="tau=400"):
        attach(tt.SPT(tau=400))
    with pytest.raises(tt.Unsupported, match="loss="):
        tt.attach(net(), tt.SPT(), targets="0")


def test_banks_are_refused():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj, self.down_proj = nn.Parameter(torch.randn(3, 8, 4)), nn.Parameter(torch.randn(3, 4, 4))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts, self.out = Experts(), nn.Linear(4, 2)

    with pytest.raises(tt.Unsupported, match="experts.gate_up_proj is a bank of 3 matrices"):
        tt.attach(Net(), tt.SPT(), targets="experts.gate_up_proj", loss=lambda m: m.out.weight.sum())
