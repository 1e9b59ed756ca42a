"""S2FT: which units are chosen, what is coupled, and finished slices (arXiv 2412.06289)."""

from __future__ import annotations

import copy

import pytest
import torch
from slice_models import IDS, adapters, llama, moved
from structured_places import layer
from torch import nn
from transformers import ViTConfig, ViTModel

import trimtab as tt
from trimtab.artifacts.slices import adopt, fuse
from trimtab.core.errors import CheckpointMismatch, NotMergeable, ShapeMismatch

D = torch.float64
INPUTS, OUTPUTS = tt.S2FT(units=3, side="inputs"), tt.S2FT(units=3, side="outputs")
side = pytest.mark.parametrize("config", [INPUTS, OUTPUTS], ids=["inputs", "outputs"])


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


HEAD = torch.randperm(8, generator=torch.Generator().manual_seed(2))  # another order of the channels of a head
PAIRS = torch.tensor([1, 0, 2, 3, 5, 4, 6, 7])  # rotary pairs (i, i + 4) stay together
PERMUTATIONS = [
    # key-value heads, what moves (rows of q, k, v; columns of o; or the feed-forward's channels), whether the function stays
    ("channels", 4, ("up", "gate", "down"), None, True), ("channels, grouped queries", 2, ("up", "gate", "down"), None, True),
    ("heads", 4, ("q", "k", "v", "o"), None, True), ("v and o inside heads", 4, ("v", "o"), HEAD, True),
    ("v and o inside heads, grouped queries", 2, ("v", "o"), HEAD, True), ("o alone", 4, ("o",), HEAD, False),
    ("q and k inside heads", 4, ("q", "k"), HEAD, False), ("rotary pairs of q and k", 4, ("q", "k"), PAIRS, False),
    ("q and k inside heads, grouped queries", 2, ("q", "k"), HEAD, False),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kv_heads", "names", "inside", "holds"), [row[1:] for row in PERMUTATIONS], ids=[row[0] for row in PERMUTATIONS]
)
def test_which_permutations_keep_the_function(kv_heads, names, inside, holds):
    """Oracle 2, row by row: why units are heads and channels; in float32 the function stays but for the order of summation."""
    model = llama(kv_heads=kv_heads)
    rng = torch.Generator().manual_seed(4)
    channels, heads = torch.randperm(48, generator=rng), torch.tensor([2, 0, 3, 1])
    order = {}
    for name in names:
        count = 4 if name in "qo" else kv_heads
        grid = torch.arange(8 * count).view(count, 8)
        order[name] = channels if name in ("up", "gate", "down") else (grid[heads] if inside is None else grid[:, inside]).flatten()
    gap = (permuted(model, order)(IDS).logits - model(IDS).logits).abs().max()
    assert gap < 1e-6 if holds else gap > 0.1
    if holds and "down" in names:
        narrow = model.float()
        assert not torch.equal(permuted(narrow, order)(IDS).logits, narrow(IDS).logits)


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


# -- finished slices


def test_fused_adapter_does_what_its_parts_do_together(tmp_path):
    """Overlapping and disjoint slices, with weights; saved and loaded; the parts stay as they were."""
    model = llama()
    for seed, name in enumerate(("one", "two")):
        tt.attach(model, tt.S2FT(ratio=0.3), name=name, rng=torch.Generator().manual_seed(seed))
        moved(model, name, seed)
    fuse(model, ["one", "two"], into="both", weights=[1.0, -0.5])
    tt.activate(model, "both")
    W = model.model.layers[0].mlp.down_proj._parameters["weight"]
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
