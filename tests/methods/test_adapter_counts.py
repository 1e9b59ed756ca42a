"""Printed counts of adapters, from the shapes of the real models on the meta device."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import trimtab as tt

transformers = pytest.importorskip("transformers")

LLAMA = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000}
LLAMA_13B = LLAMA | {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
MODELS = {
    "LLaMA-7B": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)),
    "LLaMA-13B": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA_13B)),
    "GPT-J-6B": lambda: transformers.GPTJForCausalLM(transformers.GPTJConfig()),
    "BLOOMz-7B": lambda: transformers.BloomForCausalLM(
        transformers.BloomConfig(hidden_size=4096, n_layer=30, n_head=32, vocab_size=250880)
    ),
    "T5-base": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12, vocab_size=32128)
    ),
    "ViT-B": lambda: transformers.ViTModel(transformers.ViTConfig(), add_pooling_layer=False),
}
#: shapes of LLM-Adapters: no biases, tanh
PLAIN = {"act": "tanh", "bias": False, "bottleneck": 256}
LORA = {"LLaMA": "attn.q | attn.k | attn.v | mlp.up | mlp.down", "GPT-J": "attn.q | attn.k | attn.v | mlp.up | mlp.down",
        "BLOOMz": "attn.qkv | mlp.up | mlp.down"}  # fmt: skip


@functools.cache
def model(name: str) -> nn.Module:
    with torch.device("meta"):
        return MODELS[name]()


def count(name: str, config: tt.MethodConfig, **more) -> int:
    """Trainable parameters of ``config`` on the model, which is left as it was."""
    tt.attach(model(name), config, **more)
    found = sum(p.numel() for p in tt.parameters(model(name)))
    assert tt.attach(model(name), config, name="dry", dry_run=True, **more).total("parameters") == found
    tt.detach(model(name), "default")
    return found


def percent(name: str, added: int) -> float:
    """Of the base and what is added, as the tables print it."""
    base = sum(p.numel() for p in model(name).parameters())
    return 100 * added / (base + added)


@pytest.mark.parametrize(
    ("name", "placement", "want", "printed"),
    [
        ("LLaMA-7B", "pfeiffer", 67_108_864, 0.99),  # "after the MLP"
        ("LLaMA-13B", "pfeiffer", 104_857_600, 0.80),
        ("LLaMA-7B", "llm", 201_326_592, None),  # gate, up and down: the README's 200M
        ("GPT-J-6B", "pfeiffer", 28 * 2 * 4096 * 256, None),
        ("BLOOMz-7B", "pfeiffer", 30 * 2 * 4096 * 256, None),
    ],
)
def test_series(name, placement, want, printed) -> None:
    found = count(name, tt.SeriesAdapter(placement=placement, **PLAIN))
    assert found == want
    assert printed is None or round(percent(name, found), 2) == printed


@pytest.mark.parametrize(
    ("name", "want", "printed"),
    [
        ("LLaMA-7B", 247_463_936, 3.54),
        ("LLaMA-13B", 387_973_120, 2.89),
        ("GPT-J-6B", 28 * 2 * 256 * (4096 + 16384), None),
        ("BLOOMz-7B", 30 * 2 * 256 * (4096 + 16384), None),
    ],
)
def test_parallel(name, want, printed) -> None:
    found = count(name, tt.ParallelAdapter(placement="llm", **PLAIN))
    assert found == want
    assert printed is None or abs(percent(name, found) - printed) < 0.006  # 2.895 is printed as 2.89


@pytest.mark.parametrize(
    ("name", "want", "printed"),
    [
        ("LLaMA-7B", 56_098_816, 0.83),
        ("LLaMA-13B", 87_818_240, 0.67),
        ("GPT-J-6B", 28 * 32 * (3 * 2 * 4096 + 2 * (4096 + 16384)), None),
        ("BLOOMz-7B", 30 * 32 * (4 * 4096 + 2 * (4096 + 16384)), None),
    ],
)
def test_lora(name, want, printed) -> None:
    found = count(name, tt.LoRA(rank=32), targets=LORA[name.split("-7")[0].split("-13")[0].split("-6")[0]])
    assert found == want
    assert printed is None or round(percent(name, found), 2) == printed


def test_two_adapters_a_block_with_biases() -> None:
    """The surveys' table: m = 64, after attention and feed-forward."""
    assert count("LLaMA-7B", tt.SeriesAdapter(bottleneck=64)) == 33_820_672


def test_compacter_on_t5_base() -> None:
    """Printed 0.073% and, after the feed-forward alone, 0.047%; both with the norms, which the authors train as well."""
    full, half = (count("T5-base", tt.Compacter(placement=placement)) for placement in ("houlsby", "pfeiffer"))
    assert (full, half) == (24 * 2 * 2 * (768 + 24) + 24 * 2 * (768 + 24) + 64, 24 * 2 * (768 + 24) + 24 * (768 + 24) + 64)
    norms = count("T5-base", tt.NormTuning())
    assert norms == 62 * 768
    base = 222_882_048  # the authors' figure
    assert round(100 * (full + norms) / base, 3) == 0.073
    assert round(100 * (half + norms) / base, 3) == 0.047


def test_loreft_on_llama_7b() -> None:
    """r = 8 in all layers, first and last tokens tied: printed 0.031% of the base."""
    found = count("LLaMA-7B", tt.ReFT(rank=8, first=7, last=7))
    assert found == 32 * (2 * 8 * 4096 + 8) == 2_097_408
    base = sum(p.numel() for p in model("LLaMA-7B").parameters())
    assert base == 6_738_415_616 and round(100 * found / base, 3) == 0.031
    assert count("LLaMA-7B", tt.ReFT(rank=8, first=7, last=7, tied=False)) == 2 * found


@pytest.mark.parametrize(("m", "want"), [(1, 27_660), (64, 1_189_632)])
def test_adaptformer_on_vit_b(m, want) -> None:
    assert count("ViT-B", tt.AdaptFormer(bottleneck=m)) == want


@pytest.mark.parametrize(("m", "want"), [(8, 156_768), (32, 599_424)])
def test_adapters_after_the_feed_forward_on_vit_b(m, want) -> None:
    assert count("ViT-B", tt.SeriesAdapter(bottleneck=m, placement="pfeiffer")) == want


def test_fusion_on_three_places() -> None:
    for name in ("a", "b"):
        tt.attach(model("ViT-B"), tt.SeriesAdapter(bottleneck=8, placement="pfeiffer"), name=name, layers=[0, 1, 2])
    fusion = tt.AttentionFusion(adapters=("a", "b"))
    tt.attach(model("ViT-B"), fusion, name="fusion")
    assert sum(p.numel() for p in tt.parameters(model("ViT-B"), "fusion")) == 3 * (3 * 768**2 + 768)
    for name in ("fusion", "a", "b"):
        tt.detach(model("ViT-B"), name)
