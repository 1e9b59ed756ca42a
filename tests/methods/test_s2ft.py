"""S2FT: oracles of the slice, selections, coupled structures, grouped queries, counts, bytes, fusing (arXiv 2412.06289)."""

from __future__ import annotations

import copy

import pytest
import torch
from slice_models import IDS, adapters, llama, moved
from structured_places import assert_law, build, gradients, layer, saved_bytes, site
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import trimtab as tt
from trimtab.core.account import saved_bytes as model_bytes
from trimtab.core.errors import ShapeMismatch, Unsupported
from trimtab.core.kinds import LinearSite, PartOperation
from trimtab.core.site import Rows

D = torch.float64
INPUTS, OUTPUTS = tt.S2FT(units=3, side="inputs"), tt.S2FT(units=3, side="outputs")
side = pytest.mark.parametrize("config", [INPUTS, OUTPUTS], ids=["inputs", "outputs"])


def test_worked_example():
    """Oracle 4, with its unsorted index [2, 0]; ours is ascending, so its rows come in the other order."""
    place = site(layer(2, 4, bias=False))
    adapter = build(tt.S2FT(units=2, side="inputs"), place, move=0)
    with torch.no_grad():
        place.module.weight.copy_(torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]]))
        adapter.index.copy_(torch.tensor([0, 2]))
    x = torch.tensor([[1.0, 0, -1, 2]], dtype=D, requires_grad=True)
    y = adapter(x, place)
    assert y.tolist() == [[6, 14]]
    y.backward(torch.tensor([[1.0, -1]], dtype=D))
    assert adapter.d.grad.tolist() == [[1, -1], [-1, 1]] and x.grad.tolist() == [[-4, -4, -4, -4]]
    with torch.no_grad():
        adapter.d.sub_(0.1 * adapter.d.grad)
    torch.testing.assert_close(adapter.weight(place.weight), torch.tensor([[0.9, 2, 3.1, 4], [5.1, 6, 6.9, 8]], dtype=D))
    torch.testing.assert_close(adapter(x, place), torch.tensor([[5.8, 14.2]], dtype=D))


def test_starts_at_the_base_to_the_bit():
    """Oracle 1, on a whole model in float32 and in bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        model = llama().to(dtype)
        before = model(IDS).logits
        tt.attach(model, tt.S2FT(units=1), targets="attention | mlp")
        assert torch.equal(model(IDS).logits, before)


@side
def test_gradient_is_the_full_gradients_slice(config):
    """Oracle 3."""
    place = site(layer(8, 12))
    adapter = build(config, place, move=0)
    x, dy = torch.randn(5, 12, dtype=D, requires_grad=True), torch.randn(5, 8, dtype=D)
    got_x, got = gradients_with(adapter(x, place), [x, adapter.d], dy)
    W = place.weight.detach().clone().requires_grad_()
    want_x, full = gradients_with(x @ W.t(), [x, W], dy)
    index = adapter.index.long()
    torch.testing.assert_close(got, full[:, index].t() if config.side == "inputs" else full[index])
    torch.testing.assert_close(got_x, want_x)


def gradients_with(y, inputs, dy):
    return torch.autograd.grad(y, inputs, dy)


@pytest.mark.parametrize("bias", [False, True])
@side
def test_law(config, bias):
    assert_law(build(config, site(layer(8, 12, bias=bias))), site(layer(8, 12, bias=bias)))


@side
def test_law_on_rows_of_a_fused_matrix(config):
    place = site(layer(16, 12))
    place.rows, place.shape = Rows(start=8, size=8), (8, 12)
    whole = LinearSite(module=place.module, path="fc", tensor="weight", shape=(16, 12))
    x = torch.randn(5, 12, dtype=D, requires_grad=True)
    assert_law(build(config, place), PartOperation(place, whole, x, whole(x)))


@side
def test_it_is_a_lora_with_a_factor_of_unit_vectors(config):
    """Oracle 5: rank at most k, zero but in the slice; training the other factor alone is the same."""
    place = site(layer(8, 12))
    adapter = build(config, place)
    b, a = adapter.factors()
    update = (adapter.weight(place.weight) - place.weight).detach()
    torch.testing.assert_close(b @ a, update)
    assert torch.linalg.matrix_rank(update) <= 3
    axis = 0 if config.side == "inputs" else 1
    assert set(update.abs().sum(axis).nonzero().flatten().tolist()) == set(adapter.index.tolist())
    unit = a if config.side == "inputs" else b.t()
    assert torch.equal(unit.argmax(1).int(), adapter.index) and torch.equal(unit.sum(1), torch.ones(3, dtype=D))


@side
def test_training_equals_masked_training_of_the_dense_weight(config):
    """Oracle 6: Adam without decay, ten steps; every entry outside the slice keeps its bits."""
    place = site(layer(8, 12))
    adapter = build(config, place, move=0)
    W0 = place.weight.detach().clone()
    W, mask = W0.clone().requires_grad_(), torch.zeros(8, 12, dtype=torch.bool)
    mask[(slice(None), adapter.index.long()) if config.side == "inputs" else adapter.index.long()] = True
    slices, dense = torch.optim.AdamW([adapter.d], lr=0.05, weight_decay=0), torch.optim.AdamW([W], lr=0.05, weight_decay=0)
    for step in range(10):
        x = torch.randn(16, 12, dtype=D, generator=torch.Generator().manual_seed(step))
        for optimizer, y in ((slices, adapter(x, place)), (dense, x @ W.t() + place.bias)):
            optimizer.zero_grad()
            (y - 1).square().mean().backward()
            if optimizer is dense:
                W.grad.mul_(mask)
            optimizer.step()
    torch.testing.assert_close(adapter.weight(place.weight), W, atol=1e-12, rtol=0)
    assert torch.equal(adapter.weight(place.weight)[~mask], W0[~mask])


def test_weight_decay_pulls_the_change_back_and_not_the_weight():
    """Oracle 6: without a gradient, decay leads to the base; in place it would lead to zero."""
    place = site(layer(8, 12))
    adapter = build(INPUTS, place)
    before = (adapter.weight(place.weight) - place.weight).detach()
    adapter.d.grad = torch.zeros_like(adapter.d)
    torch.optim.AdamW([adapter.d], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(adapter.weight(place.weight) - place.weight, 0.95 * before)


def test_saved_bytes_do_not_depend_on_the_width():
    """Oracle 7: tokens times k, of inputs of any width; outputs keep x."""
    for width in (64, 256):
        place = site(layer(32, width, dtype=torch.bfloat16))
        x = torch.randn(10, width, dtype=torch.bfloat16, requires_grad=True)
        for config, want in ((INPUTS, 2 * 10 * 3), (OUTPUTS, 2 * 10 * width)):
            adapter = build(config, place)
            kept = saved_bytes(lambda: adapter(x, place), place.weight, place.bias, *adapter.parameters())  # noqa: B023
            assert kept == want


def test_after_fused_attention_nothing_more_is_kept():
    """The input of o is what the attention keeps for its own backward: a copy of its columns would come on top."""
    kept = {}
    for implementation in ("sdpa", "eager"):
        model = llama(attn_implementation=implementation).float()
        x = torch.randn(2, 10, 32, requires_grad=True)
        run = lambda m: m.model(inputs_embeds=x, use_cache=False).last_hidden_state  # noqa: E731, B023
        counts = []
        for targets in (None, "attn.o", "mlp.down"):
            twin = copy.deepcopy(model).requires_grad_(False).train()
            if targets:
                tt.attach(twin, tt.S2FT(units=1), targets=targets)
            with model_bytes(twin, beside=(x,)) as saved:
                run(twin)
            counts.append(saved.total)
        kept[implementation] = [count - counts[0] for count in counts[1:]]
    tokens, layers = 20, 2
    assert kept["sdpa"] == [0, 4 * tokens * layers * 1]
    assert kept["eager"] == [4 * tokens * layers * 8, 4 * tokens * layers * 1]


@pytest.mark.parametrize("config", [tt.S2FT(ratio=0.25), tt.S2FT(units=1, coupled=True)], ids=["drawn", "coupled"])
def test_merge_unmerge_and_rows_of_a_batch(config):
    """Oracle 8: the base's bits come back; every row of a batch equals its own merged model."""
    model = llama()
    names, outputs, before = ["one", "two"], {}, copy.deepcopy(model.state_dict())
    for seed, name in enumerate(names):
        tt.attach(model, config, name=name, targets="attn.v | attn.o | mlp", rng=torch.Generator().manual_seed(5))
        moved(model, name, seed)
    for name in names:
        tt.activate(model)
        tt.merge(model, name)
        outputs[name] = model(IDS[:1]).logits
        tt.unmerge(model, name)
    tt.activate(model)
    outputs[None] = model(IDS[:1]).logits
    with tt.routed(model, ["two", None, "one"]):
        rows = model(IDS[:1].expand(3, -1)).logits
    for row, name in zip(rows, ("two", None, "one"), strict=True):
        torch.testing.assert_close(row, outputs[name][0])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items() if key in before)


def test_disjoint_adapters_fuse_in_any_order():
    """Oracle 8: they touch no common entry, so their sum is one after the other, to the bit."""
    x, merged = torch.randn(4, 12, dtype=D), []
    for order in (("a", "b"), ("b", "a")):
        model = nn.Sequential(layer(8, 12))
        for name, index in (("a", [0, 3, 5]), ("b", [1, 4, 11])):
            tt.attach(model, INPUTS, name=name, targets=["0"], dtype=D)
            adapters(model, name)["0"].index.copy_(torch.tensor(index))
            moved(model, name, len(name) + index[0])
        tt.activate(model, "a", "b")
        both = model(x)
        for name in order:
            tt.merge(model, name)
        torch.testing.assert_close(model(x), both)
        merged.append(model[0].weight.detach().clone())
    assert torch.equal(*merged)


def test_counts():
    """Oracle 9: LLaMA-3-8B with 3 % of the down channels; LLaMA-2-7B with the scripts' ratios."""
    shape = {"vocab_size": 64, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
    for config, groups, want in (
        (LlamaConfig(intermediate_size=14336, num_key_value_heads=8, **shape), {"mlp.down": 0.03}, 56_369_152),
        (LlamaConfig(intermediate_size=11008, **shape), {"attn.o": 0.052, "mlp.down": 0.02}, 56_643_584),
    ):
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        for role, ratio in groups.items():
            tt.attach(model, tt.S2FT(ratio=ratio), targets=role)
        assert sum(p.numel() for p in tt.parameters(model)) == want


@side
def test_two_microbatches_equal_one_batch(config):
    """Oracle 10."""
    place = site(layer(8, 12))
    adapter = build(config, place)
    x = torch.randn(6, 12, dtype=D)
    whole = gradients(adapter(x, place).square().sum(), list(adapter.parameters()))[0]
    parts = [gradients(adapter(half, place).square().sum(), list(adapter.parameters()))[0] for half in x.chunk(2)]
    torch.testing.assert_close(sum(parts), whole)


# -- bad input


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"ratio": 0.0}, "above 0"),
        ({"ratio": 1.5}, "at most 1"),
        ({"units": 0}, "at least 1"),
        ({"strategy": "fisher"}, "random, weight"),
        ({"order": "middle"}, "smallest, largest"),
        ({"side": "left"}, "auto, inputs"),
        ({"strategy": "weight", "pool": "model"}, "pool must be the layer"),
    ],
)
def test_bad_config(config, message):
    with pytest.raises(ShapeMismatch, match=message):
        tt.S2FT(**config)


def test_bad_input():
    with pytest.raises(ShapeMismatch, match=r"0 of the 8 units .* likes; choose a ratio of at least 1/8"):
        tt.attach(llama(), tt.S2FT(ratio=0.1), targets="attn.o")
    with pytest.raises(ShapeMismatch, match="units from 1 to 4"):
        tt.attach(llama(), tt.S2FT(units=5), targets="attn.o")
    for strategy, what in (("gradient", "gradients"), ("activation", "activations")):
        with pytest.raises(Unsupported, match=f"{what} of sample data; pass loss="):
            tt.attach(llama(), tt.S2FT(units=1, strategy=strategy))
    with pytest.raises(Unsupported, match="does not run"):
        tt.attach(llama(), tt.S2FT(units=1, strategy="activation"), loss=lambda m: torch.zeros(()))
    with pytest.raises(Unsupported, match="another strategy"):
        tt.attach(nn.Sequential(nn.Conv2d(3, 8, 1)), tt.S2FT(units=1, strategy="product"), targets="conv", loss=lambda m: 0)
