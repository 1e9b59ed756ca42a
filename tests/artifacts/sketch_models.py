"""Small checkpoints on disk for the tests of sketching a base, and readers of what became of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, T5Config, T5Model

from trimtab.compat.sketch_folder import read_all

IDS = torch.arange(40).view(4, 10)
BATCHES = [{"input_ids": part} for part in torch.randint(64, (6, 12), generator=torch.Generator().manual_seed(3)).split(2)]


def llama(folder: Path, *, layers: int = 2, dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB", **more: Any) -> Path:
    """A Llama with grouped queries and a head of its own."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, initializer_range=0.25, **more,
    )  # fmt: skip
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def bert(folder: Path) -> Path:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    BertModel(config).save_pretrained(folder)
    return folder


def gpt2(folder: Path) -> Path:
    """Conv1D layers, and a head that is tied to the embeddings."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, initializer_range=0.25)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def t5(folder: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = T5Config(vocab_size=64, decoder_start_token_id=0, pad_token_id=0, **sizes)
    T5Model(config).save_pretrained(folder)
    return folder


def dense_of(folder: Path) -> dict[str, Tensor]:
    """The tensors of a dense checkpoint."""
    return {key: value for file in sorted(folder.glob("model*.safetensors")) for key, value in load_file(file).items()}


def sketch_of(folder: Path) -> dict[str, Tensor]:
    """The tensors of a sketch, sketched ones as they are."""
    return read_all(folder)[1]


def sketched(folder: Path) -> dict[str, Any]:
    """The sketched tensors alone."""
    return {key: value for key, value in sketch_of(folder).items() if hasattr(value, "sketch_codes")}


def weight_files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}
