"""GPS: K entries of every row by gradient, and equality with fine-tuning under a mask (arXiv 2312.10136)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import trimtab as tt
from trimtab.core.account import saved_bytes

D = torch.float64


def net(dtype: torch.dtype = D, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(10, 14), nn.GELU(), nn.Linear(14, 6, bias=False)).to(dtype)


def data(dtype: torch.dtype = D) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(40, 10, generator=g).to(dtype), torch.randint(0, 6, (40,), generator=g)


def loss(model: nn.Module) -> Tensor:
    x, y = data(next(model.parameters()).dtype)
    return F.cross_entropy(model(x), y)


def adapters(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, tt.Reparameterization)]


def dense_gradients(model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss(model), [model[0]._parameters["weight"], model[2]._parameters["weight"]]))


@pytest.mark.parametrize("k", [1, 3, 10])
def test_every_row_has_k_entries_and_they_are_the_largest(k):
    model, gradients = net(), dense_gradients(net())
    tt.attach(model, tt.GPS(entries=k), targets=["0", "2"], loss=loss)
    for adapter, G in zip(adapters(model), gradients, strict=True):
        mask = torch.zeros_like(G).flatten().index_fill(0, adapter.index(), 1.0).view(G.shape)
        assert torch.equal(mask.sum(1), torch.full((len(G),), float(k), dtype=D))
        least = (G.abs() + (1 - mask) * 1e9).amin(1)
        assert (least >= (G.abs() * (1 - mask)).amax(1)).all()
        assert adapter.columns.dtype == torch.int16


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(D, 1e-12), (torch.float32, 1e-5)])
def test_training_equals_masked_dense_training(k, dtype, tolerance):
    """Six steps of Adam without decay: the same weights, frozen entries to the bit, moments for K numbers a row alone."""
    ours, plain = net(dtype), net(dtype)
    tt.attach(ours, tt.GPS(entries=k), targets=["0", "2"], loss=loss)
    places = [adapter.index() for adapter in adapters(ours)]
    weights = [plain[0].weight, plain[2].weight]
    before = [W.detach().clone() for W in weights]
    masks = [torch.zeros(W.numel(), dtype=dtype).index_fill(0, p, 1.0).view(W.shape) for W, p in zip(weights, places, strict=True)]
    adam = [torch.optim.Adam(tt.parameters(ours), lr=0.01), torch.optim.Adam(weights, lr=0.01)]
    for _ in range(6):
        for model, optimizer in zip((ours, plain), adam, strict=True):
            optimizer.zero_grad()
            loss(model).backward()
            if model is plain:
                for W, mask in zip(weights, masks, strict=True):
                    W.grad *= mask
            optimizer.step()
    for path, W, W0, mask in zip(("0", "2"), weights, before, masks, strict=True):
        found = tt.effective_weight(ours, path)
        torch.testing.assert_close(found, W, atol=tolerance, rtol=0)
        assert torch.equal(found[mask == 0], W0[mask == 0])
        assert ((found != W0) == (mask == 1)).all()
        assert torch.equal(ours.get_submodule(path)._parameters["weight"], W0)
    assert sum(state["exp_avg"].numel() for state in adam[0].state.values()) == k * (14 + 6)


def test_starts_at_the_base_and_merges_to_base_plus_scatter():
    model, x = net(torch.float32), data(torch.float32)[0]
    base = model(x)
    tt.attach(model, tt.GPS(entries=2), targets="0", loss=loss)
    assert torch.equal(model(x), base)
    adapter = adapters(model)[0]
    with torch.no_grad():
        adapter.d.normal_()
    adapted, W = model(x), model[0]._parameters["weight"].detach().clone()
    want = W.scatter_add(1, adapter.columns.long(), adapter.d.detach())
    tt.merge(model, "default")
    assert torch.equal(model[0]._parameters["weight"], want)
    torch.testing.assert_close(model(x), adapted)
    tt.unmerge(model, "default")
    assert torch.equal(model[0]._parameters["weight"], W)


def test_batches_are_summed_before_the_largest_are_chosen():
    """Two batches whose gradients cancel in column 0: the sum is largest in column 1."""
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    batches = torch.tensor([[5.0, 1.0, 0.0], [-5.0, 1.0, 0.0]])

    def batchwise(m):
        for row in batches:
            yield m(row).sum()

    tt.attach(model, tt.GPS(), targets="0", loss=batchwise)
    assert adapters(model)[0].columns.tolist() == [[1], [1]]
    assert model[0]._parameters["weight"].grad is None


def test_counts_of_the_paper():
    """ViT-B/16: one weight of every neuron and filter, and their biases; nothing has values."""
    from transformers import ViTConfig, ViTModel

    def trainable(k: int, biases: bool) -> int:
        with torch.device("meta"):
            model = ViTModel(ViTConfig(), add_pooling_layer=False)
        assert sum(p.numel() for p in model.parameters()) == 85_798_656
        tt.attach(model, tt.GPS(entries=k), targets="linear | conv")
        if biases:
            tt.attach(model, tt.BitFit(), targets="linear | conv")
        return sum(p.numel() for p in tt.parameters(model))

    assert trainable(1, biases=False) == 83_712
    assert trainable(1, biases=True) == 167_424
    assert trainable(20, biases=False) == 20 * 83_712
    assert round(100 * 167_424 / 85_798_656, 3) == 0.195


def test_saves_the_input_alone_and_small_files(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 96))
    tt.attach(model, tt.GPS(entries=2), targets="0", loss=lambda m: m(torch.randn(8, 128)).square().sum())
    x = torch.randn(200, 128, requires_grad=True)
    with saved_bytes(model) as saved:
        y = model(x)
    assert saved.total == x.numel() * 4
    y.sum().backward()
    tt.save(model, tmp_path)
    stored = sum(f.stat().st_size for f in tmp_path.glob("*.safetensors"))
    assert stored < 96 * 2 * (4 + 2) + 1000
    fresh = nn.Sequential(nn.Linear(128, 96))
    fresh.load_state_dict({k: v for k, v in model.state_dict().items() if "trimtab" not in k})
    tt.load(fresh, tmp_path)
    assert torch.equal(fresh(x), model(x))


def test_wide_matrices_store_wider_columns():
    model = nn.Sequential(nn.Linear(40_000, 2, bias=False))
    x = torch.zeros(40_000).index_fill(0, torch.tensor([39_999]), 1.0)
    tt.attach(model, tt.GPS(), targets="0", loss=lambda m: m(x).sum())
    assert adapters(model)[0].columns.dtype == torch.int32
    assert adapters(model)[0].columns.tolist() == [[39_999], [39_999]]


def test_bad_input():
    for bad in (0, -1, 1.5, True):
        with pytest.raises(tt.ShapeMismatch, match="entries"):
            tt.GPS(entries=bad)
    with pytest.raises(tt.ShapeMismatch, match=r"entries=11 .* 10 inputs of 0; use at most 10"):
        tt.attach(net(), tt.GPS(entries=11), targets="0", loss=loss)
    with pytest.raises(tt.Unsupported, match="loss="):
        tt.attach(net(), tt.GPS(), targets="0")
    with pytest.raises(tt.Unsupported, match="0 a gradient with NaN"):
        tt.attach(net(), tt.GPS(), targets="0", loss=lambda m: loss(m) * float("nan"))
    with pytest.raises(tt.Unsupported, match="does not depend on 2"):
        tt.attach(net(), tt.GPS(), targets="2", loss=lambda m: m[0](data()[0]).sum())
