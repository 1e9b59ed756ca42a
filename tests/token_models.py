"""Small models of transformers with random weights, one a kind of stack, for tests of learned tokens."""

from __future__ import annotations

from torch import nn

WIDTH, VOCABULARY = 16, 32
HEADS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "vocab_size": VOCABULARY}


def llama(**more) -> nn.Module:
    """Two query heads a key head, rotary positions."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "intermediate_size": 24, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.4}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **HEADS, **more))


def gpt2(**more) -> nn.Module:
    """Fused projections, a table of positions, dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.4}
    return GPT2LMHeadModel(GPT2Config(**sizes, **HEADS, **more))


def bloom() -> nn.Module:
    """Scores written out, positions as a bias of them."""
    from transformers import BloomConfig, BloomForCausalLM

    return BloomForCausalLM(BloomConfig(hidden_size=WIDTH, n_layer=2, n_head=4, initializer_range=0.4, **HEADS))


def t5() -> nn.Module:
    """Encoder and decoder, positions as a bias of the scores."""
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": WIDTH, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "initializer_factor": 2.0}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, dropout_rate=0.0, **HEADS))


def bart() -> nn.Module:
    """Encoder and decoder, tables of positions."""
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("ffn_dim", 24))}
    sizes |= {f"{side}_attention_heads": 4 for side in ("encoder", "decoder")}
    more = {"decoder_start_token_id": 2, "forced_eos_token_id": None, "init_std": 0.4, "dropout": 0.0}
    return BartForConditionalGeneration(BartConfig(d_model=WIDTH, max_position_embeddings=64, **sizes, **more, **HEADS))


def bert(**more) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    rest = {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "initializer_range": 0.4}
    plain = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(**{**sizes, **rest, **plain, **more}))


def modernbert() -> nn.Module:
    """An encoder with rotary positions and local attention."""
    from transformers import ModernBertConfig, ModernBertModel

    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 24}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1, "cls_token_id": 1, "sep_token_id": 1}
    return ModernBertModel(ModernBertConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **sizes, **ids))


def vit(**more) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, initializer_range=0.4, **sizes, **more))
