"""Learned tokens against huggingface/peft with the same parameters, where the two define the same thing; and where they do not,
what the difference is."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

import trimtab as tt
from token_models import VOCABULARY, WIDTH, bert, gpt2, llama

TOKENS, LENGTH = 3, 6
SHIFTED = torch.arange(TOKENS, TOKENS + LENGTH)[None]


def ids() -> dict[str, torch.Tensor]:
    """peft always makes a mask for its own tokens, so that there must be one."""
    found = torch.randint(3, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    return {"input_ids": found, "attention_mask": torch.ones_like(found)}


def seeded(build) -> nn.Module:
    torch.manual_seed(0)
    return build().eval()


def theirs(build, config: peft.PeftConfig) -> nn.Module:
    torch.manual_seed(5)
    return peft.get_peft_model(seeded(build), config).eval()


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("hidden", [None, 5])
def test_prefix_tuning(build, hidden: int | None) -> None:
    """peft's cache of learned entries moves the sequence's positions up; ours leaves them. With them moved by hand: equal."""
    network = {} if hidden is None else {"prefix_projection": True, "encoder_hidden_size": hidden}
    other = theirs(build, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS, **network))
    want = other(**ids()).logits
    model = seeded(build)
    tt.attach(model, tt.PrefixTuning(tokens=TOKENS, hidden=hidden))
    encoder, adapters = other.prompt_encoder["default"], tt.core.state.state_of(model).groups["default"].adapters
    with torch.no_grad():
        for index, adapter in enumerate(adapters):
            width = adapter.widths[0]
            rows = slice(2 * index * width, (2 * index + 2) * width)  # key and value of the layer, side by side
            if hidden is None:
                key, value = encoder.embedding.weight[:, rows].split(width, 1)
                adapter.k.copy_(key), adapter.v.copy_(value)
            else:
                first, last = encoder.transform[0], encoder.transform[2]
                if width == WIDTH:
                    adapter.e.copy_(encoder.embedding.weight)
                    adapter.down.copy_(first.weight)
                else:  # with fewer key heads, peft's embedding is as narrow as the keys
                    adapter.e.zero_()[:, :width].copy_(encoder.embedding.weight)
                    adapter.down.zero_()[:, :width].copy_(first.weight)
                adapter.down_bias.copy_(first.bias)
                adapter.up.copy_(last.weight[rows])
                adapter.up_bias.copy_(last.bias[rows])
    torch.testing.assert_close(model(**ids(), position_ids=SHIFTED).logits, want, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(model(**ids()).logits, want, atol=1e-3)


@pytest.mark.parametrize("encoder", [None, "MLP", "LSTM"])
@pytest.mark.parametrize("build", [llama, gpt2])
def test_prompt_tuning_and_p_tuning(build, encoder: str | None) -> None:
    """With rotary positions equal as they are; with a table of positions once the sequence's are moved up by hand."""
    size = {"task_type": "CAUSAL_LM", "num_virtual_tokens": TOKENS}
    if encoder is None:
        config, method = peft.PromptTuningConfig(**size), tt.PromptTuning(tokens=TOKENS)
    else:
        more = {"encoder_reparameterization_type": encoder, "encoder_hidden_size": 8, "encoder_dropout": 0.0}
        config, method = peft.PromptEncoderConfig(**size, **more), tt.PTuning(tokens=TOKENS, encoder=encoder.lower(), hidden=8)
    other = theirs(build, config)
    want = other(**ids()).logits[:, TOKENS:]
    model = seeded(build)
    tt.attach(model, method)
    copy_prompt(model, other.prompt_encoder["default"])
    moved = {} if build is llama else {"position_ids": SHIFTED}
    torch.testing.assert_close(model(**ids(), **moved).logits, want, atol=1e-5, rtol=1e-5)


def copy_prompt(model: nn.Module, source: nn.Module) -> None:
    """peft's prompt encoder into ours: the embedding, then the LSTM and the linear layers in order."""
    (adapter,) = tt.core.state.state_of(model).groups["default"].adapters
    with torch.no_grad():
        (adapter.p if hasattr(adapter, "p") else adapter.e).copy_(source.embedding.weight)
        if hasattr(source, "lstm_head"):
            for name, value in source.lstm_head.named_parameters():
                adapter.lstm.get_parameter(name).copy_(value)
        layers = [module for module in source.modules() if isinstance(module, nn.Linear)]
        for ours, layer in zip(adapter.mlp if layers else (), layers, strict=True):
            ours.weight.copy_(layer.weight)
            ours.bias.copy_(layer.bias)


def test_prompt_tuning_of_an_encoder() -> None:
    """peft's tokens pass BERT's embedding stage, with its positions; ours enter behind it. The same once that is done by hand."""
    other = theirs(lambda: bert().bert, peft.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=TOKENS))
    want = other(**ids()).last_hidden_state[:, TOKENS:]
    model = seeded(lambda: bert().bert)
    tt.attach(model, tt.PromptTuning(tokens=TOKENS))
    with torch.no_grad():
        entering = model.embeddings(inputs_embeds=other.prompt_encoder["default"].embedding.weight[None])[0]
        tt.parameters(model)[0].copy_(entering)
    torch.testing.assert_close(model(**ids(), position_ids=SHIFTED).last_hidden_state, want, atol=1e-5, rtol=1e-5)


def test_generation_gives_what_peft_gives() -> None:
    other = theirs(llama, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS))
    model = seeded(llama)
    tt.attach(model, tt.PromptTuning(tokens=TOKENS))
    copy_prompt(model, other.prompt_encoder["default"])
    more = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(**ids(), **more), other.generate(**ids(), **more))
