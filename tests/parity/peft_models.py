"""Small frozen bases for the tests of peft folders, and peft adapters with random values on them."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import trimtab as tt

peft = pytest.importorskip("peft")

VOCABULARY, WIDTH = 40, 32
LLAMA = ["q_proj", "v_proj", "down_proj"]
BERT = ["query", "attention.output.dense", "intermediate.dense"]
GPT2 = ["c_attn", "mlp.c_proj"]
CONV = ["stem", "point", "line", "cube", "head"]


def lora(targets, **more):
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": targets} | more)


def lycoris(cls, targets, **more):
    return cls(**{"r": 4, "alpha": 6, "target_modules": targets} | more)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, num_labels=3, initializer_range=0.2,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2)
    return GPT2LMHeadModel(config)


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.groups = nn.Conv2d(8, 8, 3, padding=2, groups=2, dilation=2)
        self.point = nn.Conv2d(8, 16, 1, bias=False)
        self.line = nn.Conv1d(16, 16, 3, padding="same")
        self.cube = nn.Conv3d(16, 8, (3, 1, 1), padding=(1, 0, 0))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.point(self.groups(self.stem(x)).relu())
        x = self.line(x.flatten(2))[..., None, None]
        return self.head(self.cube(x).mean((2, 3, 4)))


BASES = {"llama": llama, "bert": bert, "gpt2": gpt2, "conv": ConvNet}


def base(name: str, *, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return BASES[name]().eval()


def outputs(model: nn.Module, name: str, *, grad: bool = False) -> Tensor:
    g = torch.Generator().manual_seed(3)
    with torch.set_grad_enabled(grad):
        if name == "conv":
            return model(torch.randn(2, 4, 8, 8, generator=g))
        return model(input_ids=torch.randint(VOCABULARY, (2, 9), generator=g)).logits


def trained(peft_config, name: str, *, size: float = 0.2) -> nn.Module:
    """A peft model whose trainable parameters were moved, in evaluation mode."""
    torch.manual_seed(1)
    model = peft.get_peft_model(copy.deepcopy(base(name)), peft_config)
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=g))
    return model.eval()


def saved_by_peft(config, name: str, folder: Path) -> nn.Module:
    model = trained(config, name)
    model.save_pretrained(folder)
    return model


def assert_same(mine, theirs) -> None:
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def config_of(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def shake(model: nn.Module, size: float = 0.2) -> None:
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in tt.parameters(model):
            parameter.add_(size * torch.randn(parameter.shape, generator=g))


def edit(folder: Path, **fields) -> None:
    """Change fields of the config; None removes one."""
    config = config_of(folder) | fields
    (folder / "adapter_config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in fields or v is not None}))


def rewrite(folder: Path, change) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
