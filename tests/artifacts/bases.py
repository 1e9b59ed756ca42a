"""Tiny transformers checkpoints on disk."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40}
SHARD = "20KB"


def make(name: str, *, seed: int = 0, tied: bool = False) -> nn.Module:
    """A random model of an architecture."""
    import transformers as t

    torch.manual_seed(seed)
    decoder = {
        **TEXT,
        "intermediate_size": 48,
        "num_key_value_heads": 2,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if name == "llama":
        return t.LlamaForCausalLM(t.LlamaConfig(**decoder)).eval()
    if name == "mixtral":
        return t.MixtralForCausalLM(t.MixtralConfig(**decoder, num_local_experts=3)).eval()
    if name == "bert":
        return t.BertModel(t.BertConfig(**TEXT, intermediate_size=64, max_position_embeddings=16)).eval()
    if name == "gpt2":
        config = t.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=40, n_positions=16, bos_token_id=1, eos_token_id=2)
        config.tie_word_embeddings = tied
        return t.GPT2LMHeadModel(config).eval()
    config = t.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=8
    )
    return t.ViTForImageClassification(config).eval()


def save(model: nn.Module, folder: Path, *, shard: str = SHARD, dtype: torch.dtype = torch.float32) -> Path:
    """The model as a folder of several files, with what stands beside weights in such folders."""
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "README.md").write_text("the base")
    (folder / "pytorch_model.bin").write_bytes(b"old")
    return folder


def load(folder: Path, like: nn.Module) -> nn.Module:
    """The folder as transformers loads it, strictly."""
    model, info = type(like).from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())
