"""Roles of real architectures, written by hand from reading their modules; rows of fused projections against the models' own code."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import trimtab as tt
from trimtab.core import anatomy
from trimtab.core.selection import describe, select

transformers = pytest.importorskip("transformers")

TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99}
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BERT = {
    "attn.q": "attention.self.query",
    "attn.k": "attention.self.key",
    "attn.v": "attention.self.value",
    "attn.o": "attention.output.dense",
    "mlp.up": "intermediate.dense",
    "mlp.down": "output.dense",
}
LLAMA = {f"attn.{x}": f"self_attn.{x}_proj" for x in "qkvo"} | {f"mlp.{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")}
GPT2 = {"attn.qkv": "attn.c_attn", "attn.o": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
NEOX = {
    "attn.qkv": "attention.query_key_value",
    "attn.o": "attention.dense",
    "mlp.up": "mlp.dense_h_to_4h",
    "mlp.down": "mlp.dense_4h_to_h",
}
VIT = {f"attn.{x}": f"attention.{x}_proj" for x in "qkvo"} | {"mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"}
OPT = {f"attn.{x}": f"self_attn.{x}_proj" for x in "qkv"} | {"attn.o": "self_attn.out_proj"}

# name: (auto class, config class, config, blocks, first block, {role: path in the first block}, other {path: role})
MODELS = {  # fmt: skip
    "bert": ("AutoModelForSequenceClassification", "BertConfig", TEXT, 2, "bert.encoder.layer.0", BERT,
             {"classifier": "head", "bert.pooler.dense": "linear", "bert.embeddings.word_embeddings": "embedding"}),
    "roberta": ("AutoModelForSequenceClassification", "RobertaConfig", TEXT, 2, "roberta.encoder.layer.0", BERT,
                {"classifier": "head", "classifier.dense": "head", "classifier.out_proj": "head"}),
    "deberta": ("AutoModelForSequenceClassification", "DebertaV2Config", TEXT, 2, "deberta.encoder.layer.0",
                BERT | {f"attn.{x}": f"attention.self.{n}_proj" for x, n in zip("qkv", ("query", "key", "value"), strict=True)},
                {"pooler.dense": "linear", "classifier": "head"}),
    "distilbert": ("AutoModelForSequenceClassification", "DistilBertConfig",
                   {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": 99}, 2, "distilbert.transformer.layer.0",
                   {"attn.q": "attention.q_lin", "attn.o": "attention.out_lin", "mlp.up": "ffn.lin1", "mlp.down": "ffn.lin2"}, {}),
    "modernbert": ("AutoModelForMaskedLM", "ModernBertConfig", TEXT | SPECIAL | {"cls_token_id": 3, "sep_token_id": 4}, 2, "model.layers.0",
                   {"attn.qkv": "attn.Wqkv", "attn.o": "attn.Wo", "mlp.down": "mlp.Wo"}, {}),
    "gpt2": ("AutoModelForCausalLM", "GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99}, 2, "transformer.h.0", GPT2,
             {"lm_head": "head", "transformer.wpe": "embedding"}),
    "gptneox": ("AutoModelForCausalLM", "GPTNeoXConfig", TEXT, 2, "gpt_neox.layers.0", NEOX, {}),
    "gptj": ("AutoModelForCausalLM", "GPTJConfig", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, "rotary_dim": 4}, 2,
             "transformer.h.0", {"attn.q": "attn.q_proj", "attn.o": "attn.out_proj", "mlp.up": "mlp.fc_in", "mlp.down": "mlp.fc_out"}, {}),
    "bloom": ("AutoModelForCausalLM", "BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99}, 2, "transformer.h.0",
              NEOX | {"attn.qkv": "self_attention.query_key_value", "attn.o": "self_attention.dense"}, {}),
    "falcon": ("AutoModelForCausalLM", "FalconConfig", {k: v for k, v in TEXT.items() if k != "intermediate_size"}, 2, "transformer.h.0",
               NEOX | {"attn.qkv": "self_attention.query_key_value", "attn.o": "self_attention.dense"}, {}),
    "opt": ("AutoModelForCausalLM", "OPTConfig", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64,
            "vocab_size": 99, "word_embed_proj_dim": 32}, 2, "model.decoder.layers.0", OPT | {"mlp.up": "fc1", "mlp.down": "fc2"}, {}),
    "llama": ("AutoModelForCausalLM", "LlamaConfig", TEXT | {"num_key_value_heads": 2}, 2, "model.layers.0", LLAMA, {"lm_head": "head"}),
    "mistral": ("AutoModelForCausalLM", "MistralConfig", TEXT | {"num_key_value_heads": 2}, 2, "model.layers.0", LLAMA, {}),
    "qwen3": ("AutoModelForCausalLM", "Qwen3Config", TEXT | {"num_key_value_heads": 2, "head_dim": 8}, 2, "model.layers.0", LLAMA,
              {"model.layers.0.self_attn.q_norm": "norm"}),
    "phi3": ("AutoModelForCausalLM", "Phi3Config", TEXT | SPECIAL | {"num_key_value_heads": 2}, 2, "model.layers.0",
             {"attn.qkv": "self_attn.qkv_proj", "attn.o": "self_attn.o_proj", "mlp.gate_up": "mlp.gate_up_proj", "mlp.down": "mlp.down_proj"}, {}),
    "gemma": ("AutoModelForCausalLM", "GemmaConfig", TEXT | {"num_key_value_heads": 2, "head_dim": 8}, 2, "model.layers.0", LLAMA, {}),
    "mixtral": ("AutoModelForCausalLM", "MixtralConfig", TEXT | {"num_local_experts": 4, "num_key_value_heads": 2}, 2, "model.layers.0",
                {f"attn.{x}": f"self_attn.{x}_proj" for x in "qkvo"}, {}),
    "t5": ("AutoModelForSeq2SeqLM", "T5Config", {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 99,
           "feed_forward_proj": "gated-gelu"}, 4, "encoder.block.0",
           {"attn.q": "layer.0.SelfAttention.q", "attn.o": "layer.0.SelfAttention.o", "mlp.gate": "layer.1.DenseReluDense.wi_0",
            "mlp.up": "layer.1.DenseReluDense.wi_1", "mlp.down": "layer.1.DenseReluDense.wo"},
           {"decoder.block.0.layer.1.EncDecAttention.q": "attn.q", "lm_head": "head"}),
    "bart": ("AutoModelForSeq2SeqLM", "BartConfig", {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
             "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 99}, 4, "model.encoder.layers.0",
             OPT | {"mlp.up": "fc1", "mlp.down": "fc2"}, {"model.decoder.layers.1.encoder_attn.out_proj": "attn.o"}),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
                "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 99,
                "pad_token_id": 0}, 4, "model.encoder.layers.0", OPT | {"mlp.up": "fc1", "mlp.down": "fc2"},
                {"proj_out": "head", "model.encoder.conv1": "conv"}),
    "vit": ("ViTForImageClassification", "ViTConfig", VISION, 2, "vit.layers.0", VIT, {"classifier": "head"}),
    "beit": ("BeitForImageClassification", "BeitConfig", VISION, 2, "beit.layers.0", VIT, {}),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", {k: v for k, v in VISION.items() if k != "intermediate_size"}, 2,
               "dinov2.encoder.layer.0", VIT, {}),
    "swin": ("SwinForImageClassification", "SwinConfig", {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "image_size": 32,
             "patch_size": 4, "window_size": 4}, 4, "swin.encoder.layers.0.blocks.0", VIT,
             {"swin.encoder.layers.0.downsample.reduction": "linear"}),
    "clip": ("CLIPModel", "CLIPConfig", {"text_config": TEXT, "vision_config": VISION}, 4, "text_model.encoder.layers.0",
             OPT | {"mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"}, {"visual_projection": "linear", "text_projection": "linear"}),
    "segformer": ("SegformerForSemanticSegmentation", "SegformerConfig", {"hidden_sizes": [16, 32], "depths": [1, 1], "num_encoder_blocks": 2,
                  "sr_ratios": [2, 1], "patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2],
                  "decoder_hidden_size": 16}, 2, "segformer.stages.0.blocks.0", VIT, {"decode_head": "head"}),
    "mamba": ("MambaForCausalLM", "MambaConfig", {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 99}, 2, "backbone.layers.0",
              {"linear": "mixer.in_proj"}, {"lm_head": "head"}),
}  # fmt: skip


def build(name: str, device: str = "meta") -> nn.Module:
    cls, config, values, *_ = MODELS[name]
    config = getattr(transformers, config)(**values)
    cls = getattr(transformers, cls)
    torch.manual_seed(0)
    with torch.device(device):
        return cls.from_config(config) if hasattr(cls, "from_config") else cls(config)


@pytest.mark.parametrize("name", MODELS)
def test_roles(name: str) -> None:
    _, _, _, count, first, inside, elsewhere = MODELS[name]
    found = anatomy.of(build(name))
    assert len(found.blocks) == count
    assert found.blocks[0] == first
    block = found.block(0)
    for role, path in inside.items():
        assert f"{first}.{path}" in block.roles[role], f"{role}: {block.roles}"
    for path, role in elsewhere.items():
        assert found.roles[path] == role
    assert name == "mamba" or block.heads in (4, 2, 1)


@pytest.mark.parametrize("name", [n for n in MODELS if n not in ("clip", "segformer")])
def test_linear_is_every_matrix_but_head_and_embeddings(name: str) -> None:
    model = build(name)
    found = anatomy.of(model)
    chosen = {place.path for place in select(model, "linear") if place.tensor is None}
    heads = {p for p, r in found.roles.items() if r in ("head", "router")}
    assert chosen == {p for p, m in found.modules.items() if anatomy.is_matrix(m)} - heads


@pytest.mark.parametrize("name", ["gpt2", "gptneox", "bloom", "falcon", "phi3"])
@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_rows_of_a_fused_projection_are_the_models_own(name: str, part: str) -> None:
    """Zero a part's rows: attention then does what its own code does with zero queries, keys or values."""
    model = build(name, "cpu").eval()
    block = anatomy.of(model).block(0)
    path = block.roles["attn.qkv"][0]
    rows = anatomy.of(model).parts[path][part]
    fused, output = model.get_submodule(path), model.get_submodule(block.roles["attn.o"][0])
    seen = {}
    output.register_forward_hook(lambda m, args, y: seen.update(x=args[0].detach()))
    with torch.no_grad():
        index = rows.index(torch.device("cpu"))
        weight = fused.weight if name != "gpt2" else fused.weight.t()
        weight[index] = 0
        if fused.bias is not None:
            fused.bias[index] = 0
        ids = torch.tensor([[5, 6, 7, 8, 9]])
        model(ids)
        x = seen["x"][0]  # (tokens, heads * head size)
    if part == "v":
        assert x.abs().max() == 0
        return
    # zero queries or keys: uniform attention, so that each token's output is the mean of the values up to it
    values = {}
    fused.register_forward_hook(lambda m, args, y: values.update(y=y.detach()))
    with torch.no_grad():
        model(ids)
    v = anatomy.of(model).parts[path]["v"].take(values["y"][0], -1).reshape(5, block.kv_heads, -1)
    v = v.repeat_interleave(block.heads // block.kv_heads, 1).flatten(1)
    means = v.cumsum(0) / torch.arange(1, 6)[:, None]
    if name == "bloom":  # ALiBi biases the scores: the first token alone is exact
        assert torch.allclose(x[:1], means[:1], atol=1e-5)
    else:
        assert torch.allclose(x, means, atol=1e-5)


def test_expert_banks_are_places() -> None:
    model = build("mixtral")
    places = select(model, "mlp")
    assert [(p.path, p.tensor, p.role) for p in places[:2]] == [
        ("model.layers.0.mlp.experts", "down_proj", "mlp.down"),
        ("model.layers.0.mlp.experts", "gate_up_proj", "mlp.gate_up"),
    ]


def test_adapters_are_no_part_of_the_anatomy() -> None:
    model = build("llama", "cpu")
    before = anatomy.of(model)
    tt.attach(model, tt.LoRA(rank=2))
    after = anatomy.of(model)
    assert (before.roles, before.blocks) == (after.roles, after.blocks)


def test_hand_written_nets() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    found = anatomy.of(model)
    assert found.blocks == ("layers.0", "layers.1")
    assert found.roles["layers.0.linear1"] == "mlp.up"
    assert found.roles["layers.0.self_attn"] == "attn.qkv"
    assert found.roles["layers.0.self_attn.out_proj"] == "attn.o"
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    assert anatomy.of(plain).roles == {"0": "linear", "2": "linear"}
    assert anatomy.of(plain).blocks == ()


# -- selection


def paths(model: nn.Module, targets, **more) -> list[str]:
    return [place.path + (f"[{place.part}]" if place.part else "") for place in select(model, targets, **more)]


def test_the_ways_to_say_where() -> None:
    model = build("llama")
    q = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    down = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    for targets in (
        "attn.q",
        "q_proj",
        ["q_proj"],
        ["self_attn.q_proj"],
        r"layers\.\d+\..*q_proj",
        q,
        lambda p, m: p.endswith("q_proj"),
    ):
        assert paths(model, targets) == q
    assert paths(model, "attn.q | mlp.down") == sorted(q + down, key=lambda p: (p.split(".")[2], p in down))
    assert paths(model, ["attn.q", "mlp.down"]) == paths(model, "attn.q|mlp.down")
    assert paths(model, "q_proj | attn.q") == q
    assert paths(model, r".*(q|k)_proj", layers=[1]) == ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"]
    assert paths(model, "layers.0.self_attn") == [f"model.layers.0.self_attn.{x}_proj" for x in "qkvo"]
    assert len(paths(model, None)) == 14


def test_parts_of_a_fused_projection() -> None:
    model = build("gpt2")
    assert paths(model, "attn.q | attn.v", layers=[0]) == ["transformer.h.0.attn.c_attn[q]", "transformer.h.0.attn.c_attn[v]"]
    assert paths(model, "attention", layers=[0]) == ["transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj"]
    with pytest.raises(tt.Unsupported, match="whole and in part"):
        select(model, "attn.q | attn.qkv")


@pytest.mark.parametrize(
    ("targets", "near"),
    [
        ("q_porj", "q_proj"),
        ("atn.q", "attn.q"),
        ("attn.q | mlp.dwon", "mlp.down"),
        (["v_proj", "lm_hed"], "lm_head"),
        ("mlp.(", "mlp"),
    ],
)
def test_every_clause_must_match(targets, near: str) -> None:
    with pytest.raises(tt.NoMatch, match=near) as caught:
        select(build("llama"), targets)
    assert "attn.q x 2" in str(caught.value)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(tt.NoMatch, match=r"(?s)2 problems.*'foo'.*'bar'"):
        select(build("llama"), "foo | attn.q | bar")
    with pytest.raises(tt.NoMatch, match="valid: 0 to 1"):
        select(build("llama"), "attn.q", layers=[5])
    with pytest.raises(tt.NoMatch, match="callable"):
        select(build("llama"), lambda path, module: False)


def test_describe_counts() -> None:
    assert describe(anatomy.of(build("llama"))).startswith("embedding x 1, block x 2, attn.q x 2")
