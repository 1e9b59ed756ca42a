"""Models of transformers that read a child's weight past its forward: with adapters, merged, and a plain copy with the dense
weights written in, they give the same; in a cached generation too."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import transformers as hf
from torch import nn

import trimtab as tt

SMALL = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64}
MAMBA = {"state_size": 4, "expand": 2, "time_step_rank": 4, "use_mambapy": False}
MAMBA2 = {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "expand": 2, "chunk_size": 8}
JAMBA = {
    "mamba_d_state": 4, "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2,
    "use_mamba_kernels": False,
}  # fmt: skip
NEXT = {
    "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
#: name -> model, and the places that its forward reads past
MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "mamba": (lambda: hf.MambaForCausalLM(hf.MambaConfig(**SMALL, **MAMBA)), ["dt_proj", "conv1d"]),
    "falcon_mamba": (lambda: hf.FalconMambaForCausalLM(hf.FalconMambaConfig(**SMALL, **MAMBA)), ["dt_proj", "conv1d"]),
    "mamba2": (lambda: hf.Mamba2ForCausalLM(hf.Mamba2Config(**SMALL, **MAMBA2)), ["conv1d"]),
    "jamba": (lambda: hf.JambaForCausalLM(hf.JambaConfig(**SMALL, **HEADS, **JAMBA)), ["dt_proj", "conv1d"]),
    "lfm2": (lambda: hf.Lfm2ForCausalLM(hf.Lfm2Config(**SMALL, **HEADS, layer_types=["conv", "full_attention"])), ["conv.conv"]),
    "qwen3_next": (lambda: hf.Qwen3NextForCausalLM(hf.Qwen3NextConfig(**SMALL, **HEADS, **NEXT)), ["conv1d"]),
}
IDS = torch.tensor([[5, 8, 13, 21, 34, 55, 3], [7, 2, 9, 4, 11, 6, 1]])


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0]().eval()


def adapted(model: nn.Module, targets: list[str]) -> nn.Module:
    tt.attach(model, tt.LoRA(rank=2), targets=targets, rng=torch.Generator().manual_seed(1), check_gradients=False)
    torch.manual_seed(2)
    with torch.no_grad():
        for p in tt.parameters(model):
            p.add_(torch.randn_like(p))
    return model


def written_in(model: nn.Module, plain: nn.Module) -> nn.Module:
    """``plain`` with the adapted weights of ``model``."""
    with torch.no_grad():
        for path in model._trimtab_state.hosts:
            module = plain.get_submodule(path)
            value = tt.effective_weight(model, path)
            module.weight.copy_((value.t() if isinstance(module, nn.Embedding) else value).reshape(module.weight.shape))
    return plain


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize("name", MODELS)
def test_recurrent_models_read_adapted_weights_in_both_their_ways(name) -> None:
    model = adapted(build(name), MODELS[name][1])
    plain = written_in(model, build(name))
    with torch.no_grad():
        y, base = model(IDS).logits, build(name)(IDS).logits
        close(y, plain(IDS).logits)
        assert float((y - base).abs().max()) > 5e-3
    model(IDS).logits.pow(2).sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in tt.parameters(model))
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    cached, uncached = (model.generate(IDS, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences)
    close(torch.stack(cached.logits), torch.stack(uncached.logits))
    close(torch.stack(cached.logits), torch.stack(plain.generate(IDS, **options).logits))
    tt.merge(model, "default")
    with torch.no_grad():
        close(model(IDS).logits, y)
    close(torch.stack(model.generate(IDS, **options).logits), torch.stack(cached.logits))


def test_an_adapter_without_a_weight_form_is_refused_in_mamba() -> None:
    model = build("mamba")
    tt.attach(model, tt.SeriesAdapter(bottleneck=2), targets=["dt_proj"])
    with pytest.raises(tt.Unsupported, match="dt_proj.weight is read past"):
        model(IDS)


def _wavlm() -> tuple[nn.Module, dict]:
    config = hf.WavLMConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, conv_dim=(16,), conv_stride=(5,),
        conv_kernel=(10,), num_feat_extract_layers=1, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    return hf.WavLMModel(config).eval(), {"input_values": torch.randn(2, 200)}


def _layoutlmv3() -> tuple[nn.Module, dict]:
    config = hf.LayoutLMv3Config(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, coordinate_size=6,
        shape_size=4, has_relative_attention_bias=True, has_spatial_attention_bias=True, visual_embed=False,
    )  # fmt: skip
    return hf.LayoutLMv3Model(config).eval(), {"input_ids": IDS, "bbox": torch.randint(0, 50, (2, 7, 4)).sort(-1).values}


#: model, places, and whether it lets gradients through (LayoutLMv3 reads its table without gradients)
ENCODERS = [(_wavlm, ["q_proj", "k_proj", "v_proj", "out_proj"], True), (_layoutlmv3, ["rel_pos_bias"], False)]


@pytest.mark.parametrize(("make", "targets", "learns"), ENCODERS)
def test_encoders_that_hand_weights_to_functions(make, targets, learns) -> None:
    torch.manual_seed(0)
    model, inputs = make()
    plain = copy.deepcopy(model)
    base = model(**inputs).last_hidden_state.detach()
    adapted(model, targets)
    written_in(model, plain)
    y = model(**inputs).last_hidden_state
    close(y, plain(**inputs).last_hidden_state)
    assert float((y - base).abs().max()) > 5e-3
    assert y.requires_grad is learns
    if learns:
        y.pow(2).sum().backward()
        assert all(p.grad is not None and bool(p.grad.any()) for p in tt.parameters(model))
    tt.merge(model, "default")
    close(model(**inputs).last_hidden_state, y)


def test_ties_and_a_growing_vocabulary_see_the_base() -> None:
    """Code that wires parameters together, with an adapter on the tied embedding."""
    config = hf.LlamaConfig(**SMALL, **HEADS, tie_word_embeddings=True)
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(config).eval()
    base = model(IDS).logits.detach()
    tt.attach(model, tt.LoRA(rank=2), targets=["q_proj", "lm_head"])
    table = model.model.embed_tokens._parameters["weight"]
    model.tie_weights()
    assert model.lm_head._parameters["weight"] is table
    assert model.model.embed_tokens._parameters["weight"] is table
    close(model(IDS).logits, base)
    assert not any("Adapted" in type(value).__name__ for value in model.state_dict().values())
    assert {id(p) for p in model.parameters()} >= {id(table)}
