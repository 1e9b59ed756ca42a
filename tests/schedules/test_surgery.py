"""Cutting units out of a base, and the very originals back: against the model with the same units masked."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from cut_models import FAMILIES, IDS, D, Fused, adapted, build, furthest, hard, masked, run, some
from torch import nn

import trimtab as tt
from trimtab.core import anatomy
from trimtab.core.cut import cut_of, packed, unpacked
from trimtab.schedules import surgery
from trimtab.schedules.restoration import restore
from trimtab.schedules.units import find_units


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_gives_what_masking_gives_and_is_smaller(family: str):
    """Oracle 1, LoRA on all linear layers; kept units in no contiguous order (oracle 10)."""
    model = adapted(family)
    kept, whole = some(model), run(model)
    with masked(model, hard(kept)):
        wanted = run(model)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    record = surgery.cut(model, kept)
    assert furthest(run(model), wanted) < 2e-14 < 1e-3 < furthest(run(model), whole)
    left = {kind: {path: len(index) for path, (_, index) in places.items()} for kind, places in kept.items()}
    assert {kind: {u.reader: u.count for u in find_units(model, kind)} for kind in kept} == left  # the anatomy counts what is there
    changed = {name.rpartition(".")[0] for name, p in model.named_parameters() if p.shape != shapes[name] and "trimtab" not in name}
    assert changed == set(record.slices)
    for path in changed:
        assert model.get_submodule(path).weight.is_contiguous()


@pytest.mark.parametrize("family", ["llama, a key for two queries", "bert", "gpt2", "fused by hand"])
def test_one_unit_left(family: str):
    """Oracle 10."""
    model = adapted(family)
    kept = some(model, first=lambda count: [count - 2])
    with masked(model, hard(kept)):
        wanted = run(model)
    surgery.cut(model, kept)
    assert furthest(run(model), wanted) < 2e-14


@pytest.mark.parametrize("family", FAMILIES)
def test_originals_come_back_as_the_same_objects(family: str):
    model = build(family)
    before, output = dict(model.named_parameters()), run(model)
    bytes_before = {name: p.detach().clone() for name, p in before.items()}
    numbers = [{k: v for k, v in vars(m).items() if type(v) is int} for m in model.modules()]
    surgery.cut(model, some(model))
    assert any(p is not before[name] for name, p in model.named_parameters())
    restore(model)
    assert all(p is before[name] and torch.equal(p, bytes_before[name]) for name, p in model.named_parameters())
    assert [{k: v for k, v in vars(m).items() if type(v) is int} for m in model.modules()] == numbers
    assert furthest(run(model), output) == 0 and not [a for a in vars(model) if "trimtab" in a]


def test_dropped_originals_come_back_from_a_source_that_is_the_same_base(tmp_path):
    model = build("bert")
    base = copy.deepcopy(model)
    surgery.cut(model, some(model), originals="drop")
    with pytest.raises(tt.Unsupported, match="were dropped"):
        restore(model)
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.bert.encoder.layer[1].intermediate.dense.weight[0, 0] += 1e-12
    small = run(model)
    with pytest.raises(tt.CheckpointMismatch, match="another base"):
        restore(model, other)
    with pytest.raises(tt.CheckpointMismatch, match="no tensor bert.encoder.layer.0"):
        restore(model, {"x": torch.zeros(2)})
    assert furthest(run(model), small) == 0  # nothing has been changed
    base.save_pretrained(tmp_path)
    for source in (base, base.state_dict(), tmp_path, tmp_path / "model.safetensors"):
        twin = copy.deepcopy(model)
        restore(twin, source)
        assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), base.parameters(), strict=True))


def test_counts_of_parameters_of_roberta_large():
    """The brief's totals, on the meta device: 1/3 and 1/2 of heads and channels."""
    with torch.device("meta"):
        config = hf.RobertaConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
                                  vocab_size=50265, max_position_embeddings=514)  # fmt: skip
        model = hf.RobertaModel(config, add_pooling_layer=False)
    total = sum(p.numel() for p in model.parameters())
    for heads, channels, removed in ((6, 32_768, 104_918_016), (8, 49_152, 151_080_960)):
        twin = surgery.shared_copy(model)
        each, rest = divmod(channels, 24)
        kept = some(twin, ("heads",), first=lambda n, heads=heads: list(range(heads, n)))
        kept["channels"] = {
            u.reader: (u.count, torch.arange(each + (i < rest), u.count)) for i, u in enumerate(find_units(twin, "channels"))
        }
        surgery.cut(twin, kept, originals="drop")
        assert total - sum(p.numel() for p in twin.parameters()) == removed
        assert sum(p.numel() for p in model.parameters()) == total  # the other model keeps its own


def test_grouped_queries_go_with_their_key():
    model = build("llama, a key for two queries")
    units = find_units(model, "heads")[0]
    assert (units.count, units.size) == (4, 8)
    q, k, v, o = units.members
    assert q.index(torch.tensor([0, 2])).tolist() == [*range(0, 8), *range(16, 24)] == o.index(torch.tensor([2, 0])).tolist()
    assert k.index(torch.tensor([2])).tolist() == v.index(torch.tensor([2])).tolist() == [8, 9, 10, 11]
    surgery.cut(model, {"heads": {units.reader: (4, torch.tensor([1, 2, 3]))}})
    found = anatomy.of(model).block(0)
    assert (found.heads, found.kv_heads, found.head_size) == (6, 3, 4)
    single = find_units(build("llama, one key"), "heads")[0]
    assert single.count == 4 and [m.path.rpartition(".")[2] for m in single.members] == ["q_proj", "o_proj"]


def test_generation_with_a_cache_is_that_without():
    model = build("llama, a key for two queries")
    surgery.cut(model, some(model))
    assert len({model.model.layers[0].self_attn.k_proj.out_features, model.model.layers[0].self_attn.q_proj.out_features}) == 2
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached, plain = (model.generate(IDS, use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(cached, plain) and cached.shape == (2, 16)


def test_methods_that_follow_their_place_and_those_that_cannot():
    for method, targets in (
        (tt.DoRA(rank=2), "linear"), (tt.RsLoRA(rank=2), "linear"), (tt.PiSSA(rank=2), "linear"), (tt.IA3(), None),
        (tt.IA3(side="input"), "linear"), (tt.SSF(), "linear"), (tt.BitFit(), "linear"), (tt.Unfreeze(), "attention | mlp"),
    ):  # fmt: skip
        model = adapted("bert", method, targets=targets)
        kept = some(model)
        with masked(model, hard(kept)):
            wanted = run(model)
        surgery.cut(model, kept)
        assert furthest(run(model), wanted) < 1e-12, method
    for family in ("gpt2", "gpt-neox, rows by head", "fused by hand"):  # parts of a fused projection
        model = adapted(family, targets="attn.q | attn.v | mlp.down")
        kept = some(model)
        with masked(model, hard(kept)):
            wanted = run(model)
        surgery.cut(model, kept)
        assert furthest(run(model), wanted) < 1e-12
    model = adapted("bert", tt.LoHa(rank=2), targets="attn.q")
    with pytest.raises(tt.Unsupported, match="LoHa at bert.encoder.layer.0.attention.self.query cannot follow when outputs"):
        surgery.cut(model, some(model))
    assert cut_of(model) is None


class Tied(Fused):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].mlp["w3_down"].weight = self.blocks[0].mlp["w3_down"].weight


def test_what_cannot_be_cut_is_refused_with_the_reason():
    text = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    t5 = hf.T5EncoderModel(hf.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=64))
    olmo = hf.Olmo2Model(hf.Olmo2Config(hidden_size=32, intermediate_size=48, **text))
    experts = {"num_key_value_heads": 2, "num_local_experts": 2}
    mixtral = hf.MixtralModel(hf.MixtralConfig(hidden_size=32, intermediate_size=48, **text | experts))
    packed_ = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2)
    for model, kind, message in (
        (t5, "heads", "relative_attention_bias.weight of shape .32, 4. runs over all heads"),
        (olmo, "heads", "q_norm.weight of shape .32,. runs over all heads"),
        (mixtral, "channels", "a bank of experts"),
        (packed_, "heads", "layers.0.self_attn is an nn.MultiheadAttention, whose heads must fill its width"),
        (Tied(), "channels", "is tied to blocks.1.mlp.w3_down.weight; untie"),
        (nn.Sequential(nn.Linear(4, 4)), "heads", "no heads to prune"),
    ):
        with pytest.raises(tt.Unsupported, match=message):
            find_units(model, kind)
    quantised = Fused()
    weight = quantised.blocks[0].mlp["w12"].weight
    quantised.blocks[0].mlp["w12"].weight = nn.Parameter(weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(tt.Unsupported, match="is quantised .Parameter., and its blocks cannot be cut"):
        find_units(quantised, "channels")


def test_what_no_structure_tells_shows_in_a_trial():
    """BLOOM makes its position table outside the blocks, Phi3 reads the number of heads off its config."""
    text = {"hidden_size": 32, "vocab_size": 64, "num_attention_heads": 4}
    bloom = hf.BloomForCausalLM(hf.BloomConfig(n_layer=1, n_head=4, hidden_size=32, vocab_size=64)).to(D).eval()
    phi = hf.Phi3ForCausalLM(hf.Phi3Config(intermediate_size=48, num_hidden_layers=1, pad_token_id=0, **text)).to(D).eval()
    for model in (bloom, phi):
        kept = some(model, ("heads",))
        with masked(model, hard(kept)):
            wanted = run(model)
        before = dict(model.named_parameters())
        with pytest.raises(tt.Unsupported, match="does not run with units cut out"):
            surgery.trial(model, kept, run, wanted)
        assert cut_of(model) is None and all(p is before[name] for name, p in model.named_parameters())
    model = adapted("bert")
    with masked(model, hard(some(model))):
        wanted = run(model)
    surgery.trial(model, some(model), run, wanted)
    with pytest.raises(tt.Unsupported, match="differs from the masked model"):
        surgery.trial(model, some(model, first=lambda n: list(range(n // 2))), run, wanted)


def test_bad_cuts():
    model = adapted("bert")
    reader = "bert.encoder.layer.0.output.dense"
    for kept, message in (
        ({"head": {}}, "no units called 'head'; nearest: heads"),
        ({"channels": {"bert.encoder.layer.0.output": (64, torch.arange(3))}}, "reads no channels in this model"),
        ({"channels": {reader: (65, torch.arange(3))}}, "reads 64 channels in this model, and the cut is of 65"),
        ({"channels": {reader: (64, torch.arange(0))}}, "keep at least one"),
        ({"channels": {reader: (64, torch.tensor([3, 2]))}}, "must be ascending"),
    ):
        with pytest.raises(tt.Unsupported, match=message):
            surgery.cut(model, kept)
    with pytest.raises(ValueError, match="keep, host, drop"):
        surgery.cut(model, some(model), originals="file")
    tt.merge(model, "default")
    with pytest.raises(tt.Unsupported, match="tt.unmerge it"):
        surgery.cut(model, some(model))
    tt.unmerge(model, "default")
    surgery.cut(model, some(model))
    with pytest.raises(tt.Unsupported, match="were cut out of this model before"):
        surgery.cut(model, some(model))


def test_a_cut_model_trains_merges_copies_and_keeps_its_cut_without_adapters():
    model = adapted("vit")
    surgery.cut(model, some(model))
    wanted = run(model)
    assert furthest(run(copy.deepcopy(model)), wanted) == 0
    tt.merge(model, "default")
    assert furthest(run(model), wanted) < 1e-13
    tt.unmerge(model, "default")
    optimizer = torch.optim.AdamW(tt.parameters(model), lr=1e-2)
    model(pixel_values=torch.randn(2, 3, 16, 16, dtype=D)).logits.square().sum().backward()
    optimizer.step()  # exactly the adapters have gradients
    tt.detach(model, "default")
    tt.attach(model, tt.LoHa(rank=2), targets="linear")  # any method, on the smaller matrices
    assert cut_of(model) is not None
    with pytest.raises(tt.Unsupported, match="cannot follow"):
        restore(model)
    tt.detach(model, "default")
    restore(model)
    assert furthest(run(model), run(build("vit"))) == 0


def test_the_record_of_a_cut_is_small_and_reads_back():
    kept = some(build("bert"))
    text = packed(kept)
    assert text["heads"]["bert.encoder.layer.0.attention.output.dense"] == [4, "d"]  # units 0, 2, 3
    back = unpacked(text)
    for kind, places in kept.items():
        for path, (count, index) in places.items():
            assert back[kind][path][0] == count and torch.equal(back[kind][path][1], index)
            assert len(text[kind][path][1]) <= count / 4 + 1
