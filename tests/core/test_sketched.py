"""A weight stored as a sketch: what modules, copies, pickles, adapters and merges make of it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import trimtab as tt
from trimtab.compat.sketched import SketchedWeight, dense_
from trimtab.core.account import LiveBytes, stored_bytes
from trimtab.core.errors import ShapeMismatch
from trimtab.kernels.codes import pack, unpack
from trimtab.kernels.sweep import codebook, nearest_codes


def sketch_of(W: torch.Tensor, bits: int = 4, groups: int = 1) -> SketchedWeight:
    table = codebook(W, bits, groups, rng=torch.Generator().manual_seed(0)).to(W.dtype)
    return SketchedWeight(pack(nearest_codes(W, table), bits), table)


def net(bits: int = 4, groups: int = 1) -> nn.Sequential:
    """Two linear layers with sketched weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 8)).requires_grad_(False)
    for i in (0, 2):
        model[i].weight = nn.Parameter(sketch_of(model[i].weight.detach(), bits, groups), requires_grad=False)
    return model


def dense(model: nn.Sequential) -> nn.Sequential:
    """A twin with plain weights of the same values."""
    twin = nn.Sequential(nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 8)).requires_grad_(False)
    for i in (0, 2):
        twin[i].weight.copy_(model[i].weight.dequantize())
        twin[i].bias.copy_(model[i].bias)
    return twin


def moved(model: nn.Module, name: str = "default", seed: int = 0) -> None:
    with torch.no_grad():
        for p in tt.parameters(model, name):
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed + p.numel())))


X = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("bits", "groups"), [(2, 2), (4, 1), (4, 2), (8, 1)])
def test_forward_and_input_gradient_are_the_dense_ones(bits, groups):
    model = net(bits, groups)
    x, z = X.clone().requires_grad_(), X.clone().requires_grad_()
    y, want = model(x), dense(model)(z)
    torch.testing.assert_close(y, want)
    y.square().sum().backward()
    want.square().sum().backward()
    torch.testing.assert_close(x.grad, z.grad)


def test_bytes_are_codes_and_table():
    """Exactly out in b / 8 for the codes."""
    W = net(bits=2)[0].weight
    assert W.sketch_codes.nbytes == 16 * 32 * 2 / 8 and W.sketch_table.nbytes == 16 * 4 * 4
    assert stored_bytes(W) == 128 + 256
    assert W.shape == (16, 32) and isinstance(W, nn.Parameter) and not W.requires_grad


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state dict"])
def test_copies_are_sketches_of_the_same_values(way):
    model = net()
    if way == "state dict":
        twin = net()
        old = twin[0].weight
        twin[0].weight = nn.Parameter(old.with_table(old.sketch_table * 0), requires_grad=False)
        twin.load_state_dict(model.state_dict(), assign=True)
    else:
        twin = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert all(isinstance(twin[i].weight, SketchedWeight) and isinstance(twin[i].weight, nn.Parameter) for i in (0, 2))
    assert torch.equal(twin(X), model(X))


def test_to_another_dtype_casts_the_table_alone():
    model = net()
    codes = model[0].weight.sketch_codes.clone()
    model.to(torch.bfloat16)
    assert model[0].weight.dtype == model[0].weight.sketch_table.dtype == torch.bfloat16
    assert torch.equal(model[0].weight.sketch_codes, codes) and model(X.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("write", [lambda W: W.copy_(torch.zeros(16, 32)), lambda W: W.mul_(2), lambda W: nn.init.zeros_(W)])
def test_it_is_not_written(write):
    with pytest.raises(ShapeMismatch, match="cannot be written"):
        write(net()[0].weight)


@pytest.mark.parametrize(
    ("codes", "table"),
    [
        (torch.zeros(4, 1, 8, dtype=torch.int32), torch.zeros(4, 1, 16)),
        (torch.zeros(4, 1, 8, dtype=torch.uint8), torch.zeros(4, 1, 15)),
        (torch.zeros(4, 2, 8, dtype=torch.uint8), torch.zeros(4, 1, 16)),
        (torch.zeros(4, 1, 8, dtype=torch.uint8), torch.zeros(4, 16)),
    ],
)
def test_what_does_not_belong_together_is_refused(codes, table):
    with pytest.raises(ShapeMismatch, match="codes .out, groups, bytes. uint8"):
        SketchedWeight(codes, table)


BESIDE = [tt.LoRA(rank=2), tt.DoRA(rank=2), tt.HUT(rank=2), tt.S2FT(units=2)]


@pytest.mark.parametrize("config", BESIDE, ids=lambda c: type(c).__name__)
def test_other_methods_stand_beside_it(config):
    """As beside a dense base of the same values, in value and every gradient."""
    found = []
    for model in (net(), dense(net())):
        tt.attach(model, config, targets=["0", "2"], rng=torch.Generator().manual_seed(3))
        moved(model)
        y = model(X)
        y.square().sum().backward()
        found.append([y, *(p.grad for p in tt.parameters(model))])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_tables_start_at_the_base_and_only_they_are_stored(tmp_path):
    model = net(groups=2)
    before = model(X)
    tt.attach(model, tt.SketchTune(groups=2), targets=["0", "2"])
    assert torch.equal(model(X), before)
    moved(model)
    tt.save(model, tmp_path / "a")
    (file,) = (tmp_path / "a").glob("*.safetensors")
    assert {tuple(t.shape) for t in load_file(file).values()} == {(16, 2, 16), (8, 2, 16)}
    fresh = net(groups=2)
    tt.load(fresh, tmp_path / "a")
    assert torch.equal(fresh(X), model(X)) and not torch.equal(fresh(X), before)


def test_switching_tasks_is_switching_tables():
    """Oracle 12: outputs equal those of the merged models; merging keeps the codes, exactly; unmerging gives the bytes back."""
    model = net()
    for seed, name in enumerate(("one", "two")):
        tt.attach(model, tt.SketchTune(), targets=["0", "2"], name=name)
        moved(model, name, seed)
    for name in ("one", "two"):
        tt.activate(model, name)
        task, codes = model(X), model[0].weight.sketch_codes
        tt.merge(model, name, into="requantised")
        assert torch.equal(model(X), task) and torch.equal(model[0].weight.sketch_codes, codes)
        assert isinstance(model[0].weight, SketchedWeight)
        tt.unmerge(model, name)
        assert torch.equal(model(X), task)


def test_another_methods_update_is_merged_by_nearest_values():
    """Not exact; the tables stay."""
    model = net()
    tt.attach(model, tt.LoRA(rank=2), targets=["0"])
    moved(model)
    want = tt.effective_weight(model, "0").detach()
    table = model[0].weight.sketch_table.clone()
    tt.merge(model, "default", into="requantised")
    got = model[0].weight
    assert torch.equal(got.sketch_table.sort(-1).values, table.sort(-1).values)
    nearest = (want[:, :, None] - table.view(16, 1, 16)).abs().amin(-1)
    torch.testing.assert_close((got.dequantize() - want).abs(), nearest)


def test_another_layout_than_the_bases_is_refused():
    with pytest.raises(ShapeMismatch, match=r"sketch of 4 bits and 1 groups.*SketchTune\(bits=4, groups=1\)"):
        tt.attach(net(), tt.SketchTune(bits=2), targets=["0"])


def test_a_weight_that_is_stored_transposed():
    """transformers' Conv1D: on codes, in value and input gradient; SketchTune and LoRA beside it; merged, unmerged, copied."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(16, 32)).requires_grad_(False)
    sketch = sketch_of(model[0].weight.t().contiguous(), groups=2)
    model[0].weight = nn.Parameter(SketchedWeight(sketch.sketch_codes, sketch.sketch_table, transposed=True), requires_grad=False)
    W, x, z = sketch.dequantize(), X.clone().requires_grad_(), X.clone().requires_grad_()
    assert model[0].weight.shape == (32, 16)
    y, want = model(x), z @ W.t() + model[0].bias
    torch.testing.assert_close(y, want)
    y.square().sum().backward()
    want.square().sum().backward()
    torch.testing.assert_close(x.grad, z.grad)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).double().float()):
        assert twin[0].weight.transposed and torch.equal(twin(X), model(X))
    before = model(X)
    for config in (tt.SketchTune(groups=2), tt.LoRA(rank=2)):
        tt.attach(model, config, targets=["0"])
        moved(model)
        task = model(X)
        tt.merge(model, "default", into="requantised" if isinstance(config, tt.SketchTune) else "dequantised")
        torch.testing.assert_close(model(X), task)
        tt.unmerge(model, "default")
        tt.detach(model, "default")
        assert torch.equal(model(X), before)


def test_an_embedding_is_looked_up_by_row():
    """And a head that is tied to it multiplies by it; nothing dense is made on the way."""
    table = nn.Embedding(40, 32, padding_idx=0).requires_grad_(False)
    table.weight = nn.Parameter(sketch_of(table.weight.detach()), requires_grad=False)
    head = nn.Linear(32, 40, bias=False)
    head.weight = table.weight
    W, ids = table.weight.dequantize(), torch.tensor([[3, 39], [0, 3]])
    with LiveBytes() as live:
        rows = table(ids)
    assert torch.equal(rows, W[ids]) and live.peak < W.nbytes / 2
    torch.testing.assert_close(head(rows), W[ids] @ W.t())
    narrow = nn.Embedding(40, 32, max_norm=0.5)
    narrow.weight = table.weight
    with pytest.raises(ShapeMismatch, match="cannot be written"):  # it would rescale rows in place
        narrow(ids)


def test_dense_again():
    """Every sketched weight by its values; what was one tensor stays one."""
    model = net()
    model.append(nn.Linear(32, 16, bias=False))
    model[3].weight = model[0].weight
    want = model[0].weight.dequantize()
    assert dense_(model) is model and type(model[0].weight) is nn.Parameter and model[3].weight is model[0].weight
    assert torch.equal(model[0].weight, want) and not model[0].weight.requires_grad


def test_functions_beside_linear_see_the_dense_values():
    W = net()[0].weight
    plain = W.dequantize()
    assert torch.equal(W + 0, plain) and torch.equal(W.t() @ torch.ones(16), plain.t() @ torch.ones(16))
    assert torch.equal(F.linear(X, W + 0), F.linear(X, plain)) and torch.equal(W.abs().amax(), plain.abs().amax())
    assert int(unpack(W.sketch_codes, 4).max()) <= 15
