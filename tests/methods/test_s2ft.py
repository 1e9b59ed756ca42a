"""S2FT: oracles of the slice, selections, coupled structures, grouped queries, counts, bytes, fusing (arXiv 2412.06289)."""

from __future__ import annotations

import copy

import pytest
import torch
from structured_places import assert_law, build, gradients, layer, saved_bytes, site
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel

import trimtab as tt
from trimtab.artifacts.slices import adopt, fuse
from trimtab.core.account import saved_bytes as model_bytes
from trimtab.core.errors import CheckpointMismatch, NotMergeable, ShapeMismatch, Unsupported
from trimtab.core.kinds import LinearSite, PartOperation
from trimtab.core.site import Rows

D = torch.float64
INPUTS, OUTPUTS = tt.S2FT(units=3, side="inputs"), tt.S2FT(units=3, side="outputs")
side = pytest.mark.parametrize("config", [INPUTS, OUTPUTS], ids=["inputs", "outputs"])


def llama(kv_heads: int = 2, *, layers: int = 2, std: float = 0.25, **more) -> LlamaForCausalLM:
    """A Llama with weights large enough that a wrong permutation shows."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=kv_heads,
        vocab_size=64, initializer_range=std, attention_bias=True, **more,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(D).eval()


def adapters(model: nn.Module, name: str = "default") -> dict[str, tt.Reparameterization]:
    return {m.site.path: m for path, m in model.named_modules() if f"trimtab.{name}." in path and hasattr(m, "site")}


def moved(model: nn.Module, name: str = "default", seed: int = 3) -> None:
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in tt.parameters(model, name):
            p.add_(0.1 * torch.randn(p.shape, generator=rng).to(p))


IDS = torch.arange(20).view(2, 10)


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


# -- which units


def test_a_draw_from_the_model_gives_places_different_numbers():
    """int(ratio n L) of all layers' units, without replacement, as the authors draw; the same again from the same seed."""
    model = llama(layers=8)
    drawn = []
    for name in ("one", "two"):
        tt.attach(model, tt.S2FT(ratio=0.1), targets="mlp.down", name=name, rng=torch.Generator().manual_seed(7))
        drawn.append([a.index.tolist() for a in adapters(model, name).values()])
    assert drawn[0] == drawn[1] and sum(map(len, drawn[0])) == int(0.1 * 48 * 8)
    assert len({len(index) for index in drawn[0]}) > 1
    assert all(index == sorted(set(index)) and max(index, default=0) < 48 for index in drawn[0])


def test_a_place_that_the_draw_left_out_has_nothing(tmp_path):
    model = llama(layers=8)
    before = model(IDS).logits
    tt.attach(model, tt.S2FT(ratio=0.2), targets="attn.o", rng=torch.Generator().manual_seed(1))  # 6 of 32 heads
    sizes = {path: len(a.index) for path, a in adapters(model).items()}
    assert 0 in sizes.values() and sum(sizes.values()) == 6 * 8
    moved(model)
    tt.save(model, tmp_path / "a")
    fresh = llama(layers=8)
    tt.load(fresh, tmp_path / "a")
    torch.testing.assert_close(fresh(IDS).logits, model(IDS).logits)
    assert not torch.equal(fresh(IDS).logits, before)


def test_heads_are_query_heads_at_o_and_key_value_heads_at_v():
    """Grouped queries: 4 query heads, 2 key-value heads of 8 channels."""
    model = llama(kv_heads=2)
    tt.attach(model, tt.S2FT(units=1), targets="attention")
    for path, adapter in adapters(model).items():
        index = adapter.index.tolist()
        assert len(index) == 8 and index == list(range(index[0], index[0] + 8)) and index[0] % 8 == 0, path
        assert adapter.inputs == path.endswith("o_proj")


def test_coupled_units_are_one_structure():
    """Whole key-value groups through q, k, v and o; channels through gate, up and down; layer by layer."""
    model = llama(kv_heads=2)
    tt.attach(model, tt.S2FT(units=1, coupled=True), targets="attention | mlp", rng=torch.Generator().manual_seed(4))
    for block in range(2):
        found = {p.rpartition(".")[2]: a.index for p, a in adapters(model).items() if f"layers.{block}." in p}
        assert torch.equal(found["k_proj"], found["v_proj"]) and torch.equal(found["q_proj"], found["o_proj"])
        assert found["q_proj"][0] == 2 * found["k_proj"][0] and len(found["q_proj"]) == 16
        assert torch.equal(found["gate_proj"], found["up_proj"]) and torch.equal(found["gate_proj"], found["down_proj"])


def test_coupled_channels_of_a_fused_gate_and_up():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.gate_up_proj, self.down_proj = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(12, 8)

        def forward(self, x):
            gate, up = self.gate_up_proj(self.norm(x)).chunk(2, -1)
            return x + self.down_proj(gate.sigmoid() * up)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Block() for _ in range(2))

    model = Net()
    tt.attach(model, tt.S2FT(units=3, coupled=True), targets="mlp.gate_up | mlp.down")
    for block in ("layers.0", "layers.1"):
        down, both = (adapters(model)[f"{block}.{name}"].index for name in ("down_proj", "gate_up_proj"))
        assert torch.equal(both, torch.cat([down, down + 12]))


def permuted(model: nn.Module, index: dict[str, torch.Tensor], block: int = 0) -> nn.Module:
    """A copy with rows (o, down: columns) of one block's projections in the order ``index`` by name; biases move with rows."""
    twin = copy.deepcopy(model)
    holders = twin.model.layers[block]
    with torch.no_grad():
        for name, order in index.items():
            module = (holders.self_attn if name[0] in "qkvo" else holders.mlp).get_submodule(f"{name}_proj")
            if name in ("o", "down"):
                module.weight.copy_(module.weight[:, order].clone())
            else:
                module.weight.copy_(module.weight[order].clone())
                if module.bias is not None:
                    module.bias.copy_(module.bias[order].clone())
    return twin


def first(index: torch.Tensor, width: int) -> torch.Tensor:
    """A permutation that brings ``index`` to the front."""
    rest = [i for i in range(width) if i not in set(index.tolist())]
    return torch.cat([index.long(), torch.tensor(rest, dtype=torch.long)])


def test_coupled_units_could_be_permuted_to_the_front():
    """Oracle 2, as a test of the structures: the paper's co-permutation of our coupled units leaves the function alone."""
    model = llama(kv_heads=2)
    twin = copy.deepcopy(model)
    tt.attach(twin, tt.S2FT(units=1, coupled=True), targets="attention | mlp", layers=[0], rng=torch.Generator().manual_seed(1))
    index = {p.rpartition(".")[2].removesuffix("_proj"): a.index for p, a in adapters(twin).items()}
    widths = {"q": 32, "k": 16, "v": 16, "o": 32, "gate": 48, "up": 48, "down": 48}
    order = {name: first(index[name], width) for name, width in widths.items()}
    assert any(not torch.equal(o, torch.arange(len(o))) for o in order.values())
    same = permuted(model, order)(IDS).logits
    want = model(IDS).logits
    torch.testing.assert_close(same, want, atol=1e-6, rtol=0)
    halves = ({name: order[name] for name in names} for names in (("q", "o"), ("k", "v"), ("up", "gate")))
    assert all((permuted(model, half)(IDS).logits - want).abs().max() > 0.1 for half in halves)


def test_a_query_head_does_not_move_to_another_group():
    """Oracle 2: heads of q and o inside a group may change places, across groups not."""
    model, heads = llama(kv_heads=2), torch.arange(32).view(4, 8)
    want = model(IDS).logits
    for order, holds in (([1, 0, 2, 3], True), ([2, 1, 0, 3], False)):
        both = heads[order].flatten()
        gap = (permuted(model, {"q": both, "o": both})(IDS).logits - want).abs().max()
        assert bool(gap < 1e-6) is holds


def sample(model):
    for part in IDS.split(1):
        yield model(part, labels=part).loss


@pytest.mark.parametrize("order", ["smallest", "largest"])
@pytest.mark.parametrize("strategy", ["weight", "activation", "product", "gradient"])
def test_scores_are_the_norms_that_the_dense_model_shows(strategy, order):
    """Against hooks and autograd on the base: root mean square over all tokens, gradients summed over batches, heads by norm."""
    model = llama()
    flows: dict[str, list] = {}
    hooks = [m.register_forward_pre_hook(lambda m, a, p=p: flows.setdefault(p, []).append(a[0].detach().reshape(-1, m.in_features)))
             for p, m in model.named_modules() if p.endswith(("o_proj", "down_proj"))]  # fmt: skip
    sum(sample(model)).backward()
    for hook in hooks:
        hook.remove()
    want = {}
    for path, flow in flows.items():
        module = model.get_submodule(path)
        rms, norm = torch.cat(flow).square().mean(0).sqrt(), module.weight.detach().norm(dim=0)
        score = {"weight": norm, "activation": rms, "product": rms * norm, "gradient": module.weight.grad.norm(dim=0)}[strategy]
        size = 8 if path.endswith("o_proj") else 1
        units = score.view(-1, size).norm(dim=1).argsort(descending=order == "largest")[:2]
        want[path] = (units[:, None] * size + torch.arange(size)).flatten().sort().values.int()
    model.zero_grad()
    tt.attach(model, tt.S2FT(units=2, strategy=strategy, order=order), loss=sample)
    found = adapters(model)
    assert found.keys() == want.keys() and all(torch.equal(found[path].index, want[path]) for path in want)
    assert all(p.requires_grad == ("trimtab" in name) for name, p in model.named_parameters())


def test_vit_with_its_biases():
    model = ViTModel(ViTConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16,
                               patch_size=8), add_pooling_layer=False).eval()  # fmt: skip
    x = torch.randn(2, 3, 16, 16)
    before = model(x).last_hidden_state
    tt.attach(model, tt.S2FT(units=1, coupled=True), targets="attention | mlp")
    assert torch.equal(model(x).last_hidden_state, before)
    moved(model)
    after = model(x).last_hidden_state
    tt.merge(model, "default")
    torch.testing.assert_close(model(x).last_hidden_state, after, atol=1e-5, rtol=1e-4)


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


# -- finished slices


def test_fused_adapter_does_what_its_parts_do_together(tmp_path):
    """Overlapping and disjoint slices, with weights; saved and loaded; the parts stay as they were."""
    model = llama()
    for seed, name in enumerate(("one", "two")):
        tt.attach(model, tt.S2FT(ratio=0.3), name=name, rng=torch.Generator().manual_seed(seed))
        moved(model, name, seed)
    fuse(model, ["one", "two"], into="both", weights=[1.0, -0.5])
    tt.activate(model, "both")
    W = model.model.layers[0].mlp.down_proj.weight
    parts = [tt.effective_weight(model, "model.layers.0.mlp.down_proj", name=name) - W for name in ("one", "two")]
    got = tt.effective_weight(model, "model.layers.0.mlp.down_proj", name="both") - W
    torch.testing.assert_close(got, parts[0] - 0.5 * parts[1])
    assert not any(p.requires_grad for p in adapters(model, "both")["model.layers.0.mlp.down_proj"].parameters())
    tt.save(model, tmp_path / "both", name="both")
    fresh = llama()
    tt.load(fresh, tmp_path / "both")
    torch.testing.assert_close(fresh(IDS).logits, model(IDS).logits)


def test_fuse_refuses_what_is_no_slice():
    model = nn.Sequential(layer(8, 12))
    for name, config in (("in", INPUTS), ("out", OUTPUTS), ("lora", tt.LoRA(rank=2))):
        tt.attach(model, config, name=name, targets=["0"])
    for names, error, message in (
        (["in", "lora"], NotMergeable, "LoRA in it"),
        (["in", "out"], NotMergeable, "no one slice"),
        (["in"], ShapeMismatch, "two or more"),
        (["in", "in"], ShapeMismatch, "different names"),
    ):
        with pytest.raises(error, match=message):
            fuse(model, names, into="new")
    with pytest.raises(ShapeMismatch, match="a new name"):
        fuse(model, ["in", "out"], into="lora")


@side
def test_weights_tuned_in_place_become_an_adapter(config):
    """And are refused where they differ outside of the slice."""
    model = nn.Sequential(layer(8, 12))
    tt.attach(model, config, targets=["0"], dtype=D)
    index = adapters(model)["0"].index.long()
    tuned = {key: value.clone() for key, value in model.state_dict().items()}
    at = (slice(None), index) if config.side == "inputs" else index
    tuned["0.weight"][at] += torch.randn(tuned["0.weight"][at].shape, dtype=D)
    adopt(model, tuned)
    torch.testing.assert_close(tt.effective_weight(model, "0"), tuned["0.weight"])
    tuned["0.weight"] += 1e-3
    before = adapters(model)["0"].d.clone()
    with pytest.raises(CheckpointMismatch, match="outside the slice"):
        adopt(model, tuned)
    with pytest.raises(CheckpointMismatch, match="found none"):
        adopt(model, {})
    assert torch.equal(adapters(model)["0"].d, before)
