"""Learned tokens against huggingface/peft with the same parameters, where the two define the same thing; and where they do not,
what the difference is."""

from __future__ import annotations

import copy

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


CONFIGS = {
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS),
    "network": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS, encoder_hidden_size=8),
    "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS),
    "projected": peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=TOKENS, prefix_projection=True, encoder_hidden_size=5
    ),
}


def written_by_peft(folder, build, kind: str) -> torch.Tensor:
    """A folder of peft's, and the logits of peft's model for the sequence itself."""
    other = theirs(build, copy.deepcopy(CONFIGS[kind]))  # peft fills the config in
    with torch.no_grad():
        for parameter in other.prompt_encoder.parameters():
            parameter.mul_(3.0)
    other.save_pretrained(folder)
    logits = other(**ids()).logits
    return logits[:, logits.shape[1] - LENGTH :]


@pytest.mark.parametrize("kind", CONFIGS)
def test_folders_of_peft_are_read_and_written(kind: str, tmp_path) -> None:
    """With rotary positions exactly: a learned key changes by the rotation that peft's longer positions make."""
    want = written_by_peft(tmp_path / "theirs", llama, kind)
    model = seeded(llama)
    assert (model(**ids()).logits - want).abs().max() > 1e-2
    tt.load(model, tmp_path / "theirs", name="a")
    torch.testing.assert_close(model(**ids()).logits, want, atol=1e-5, rtol=1e-5)
    tt.save(model, tmp_path / "again", name="a", format="peft")
    back = peft.PeftModel.from_pretrained(seeded(llama), tmp_path / "again").eval()
    logits = back(**ids()).logits
    torch.testing.assert_close(logits[:, logits.shape[1] - LENGTH :], want, atol=1e-5, rtol=1e-5)


def test_converted_without_the_base_in_memory(tmp_path) -> None:
    want = written_by_peft(tmp_path / "theirs", llama, "prefix")
    seeded(llama).save_pretrained(tmp_path / "base")
    with pytest.raises(tt.Unsupported, match="say which base"):
        tt.convert(tmp_path / "theirs", tmp_path / "ours")
    report = tt.convert(tmp_path / "theirs", tmp_path / "ours", base=tmp_path / "base")
    assert set(report.column("becomes")) == {"PrefixTuning"} and set(report.column("error")) == {0.0}
    model = seeded(llama)
    tt.load(model, tmp_path / "ours")
    torch.testing.assert_close(model(**ids()).logits, want, atol=1e-5, rtol=1e-5)
    tt.convert(tmp_path / "ours", tmp_path / "back", to="peft", base=tmp_path / "base")
    logits = peft.PeftModel.from_pretrained(seeded(llama), tmp_path / "back").eval()(**ids()).logits
    torch.testing.assert_close(logits, want, atol=1e-5, rtol=1e-5)


def test_a_network_of_ours_is_written_as_its_tokens(tmp_path) -> None:
    for method in (tt.PTuning(tokens=TOKENS, hidden=8), tt.PrefixTuning(tokens=TOKENS, hidden=4, std=1.0)):
        model = seeded(llama)
        tt.attach(model, method, rng=torch.Generator().manual_seed(3))
        folder = tt.save(model, tmp_path / type(method).__name__, format="peft")
        logits = peft.PeftModel.from_pretrained(seeded(llama), folder).eval()(**ids()).logits
        torch.testing.assert_close(logits[:, logits.shape[1] - LENGTH :], model(**ids()).logits, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_read_or_written_says_why(tmp_path) -> None:
    written_by_peft(tmp_path / "theirs", gpt2, "prefix")
    with pytest.raises(tt.Unsupported, match="GPT2LMHeadModel has no rotary positions"):
        tt.load(seeded(gpt2), tmp_path / "theirs")
    written_by_peft(tmp_path / "narrow", llama, "prompt")
    with pytest.raises(tt.ShapeMismatch, match="tokens of width 16, and this model's are 24 wide"):
        tt.load(seeded(lambda: wide()), tmp_path / "narrow")
    written_by_peft(tmp_path / "deep", llama, "prefix")
    with pytest.raises(tt.ShapeMismatch, match="this model's 2 layers have 48"):
        tt.load(seeded(lambda: wide()), tmp_path / "deep")
    model = seeded(llama)
    tt.attach(model, tt.PrefixTuning(tokens=TOKENS), layers=[1])
    with pytest.raises(tt.Unsupported, match="a prefix in 1 of 2 layers"):
        tt.save(model, tmp_path / "part", format="peft")
    gated = seeded(llama)
    tt.attach(gated, tt.PrefixTuning(tokens=TOKENS, gated=True))
    with pytest.raises(tt.Unsupported, match="gated prefix"):
        tt.save(gated, tmp_path / "gated", format="peft")
    assert not (tmp_path / "part").exists() and not (tmp_path / "gated").exists()


def wide() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 24, "vocab_size": VOCABULARY}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))


def test_generation_gives_what_peft_gives() -> None:
    other = theirs(llama, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS))
    model = seeded(llama)
    tt.attach(model, tt.PromptTuning(tokens=TOKENS))
    copy_prompt(model, other.prompt_encoder["default"])
    more = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(**ids(), **more), other.generate(**ids(), **more))
