"""A tie that a merge cuts, in every architecture that ties more than two: nothing of the written model starts at random."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bases import config_of, make, save
from saved_adapters import shake
from torch import Tensor, nn

import trimtab as tt
from trimtab.core.state import parameter_users

pytestmark = pytest.mark.filterwarnings("ignore")

#: model types whose model ties at least three tensors in transformers 5.23
MANY = (
    "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "led", "longt5", "m2m_100", "marian", "mbart", "mt5", "mvp",
    "nllb-moe", "pegasus", "pegasus_x", "plbart", "switch_transformers", "t5", "umt5",
)  # fmt: skip
QUICK = ("bart", "m2m_100", "t5", "umt5", "florence2")  # umt5's config ties whatever it is told, and its forward asks for the flag
SIZES = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 40, "max_position_embeddings": 64, "d_kv": 8, "d_ff": 24,
    "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2, "attention_window": 4, "max_encoder_position_embeddings": 64,
    "max_decoder_position_embeddings": 64, "num_experts": 2, "num_sparse_encoder_layers": 0, "num_sparse_decoder_layers": 0,
    "encoder_sparse_step": 0, "decoder_sparse_step": 0, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 2, "forced_eos_token_id": None, "num_global_tokens": 4, "block_size": 8,
}  # fmt: skip
IDS = torch.arange(3, 15)[None]


def tied_model(kind: str) -> nn.Module:
    """A tiny random encoder-decoder whose embeddings and head share a tensor."""
    import transformers as t
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES as names

    torch.manual_seed(0)
    if kind == "florence2":
        text = {k: v for k, v in SIZES.items() if hasattr(t.BartConfig(), k)}
        vision = {
            "embed_dim": [16], "depths": [1], "num_heads": [2], "num_groups": [2], "projection_dim": 16, "patch_size": [7],
            "patch_stride": [4], "patch_padding": [3], "patch_prenorm": [False], "window_size": 2,
        }  # fmt: skip
        config = t.Florence2Config(text_config={"model_type": "bart", **text}, vision_config=vision)
        return t.Florence2ForConditionalGeneration(config).eval()
    config_class = t.CONFIG_MAPPING[kind]
    known = {key: value for key, value in SIZES.items() if hasattr(config_class(), key)}
    return getattr(t, names[kind])(config_class(**known)).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, decoder_input_ids=IDS).logits


def strictly(folder: Path, like: nn.Module) -> nn.Module:
    model, info = type(like).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return model.eval()


@pytest.mark.parametrize("kind", [k if k in QUICK else pytest.param(k, marks=pytest.mark.slow) for k in (*MANY, "florence2")])
def test_a_tie_of_many_is_cut_whole_or_refused(kind, tmp_path) -> None:
    """At every end: the merge in memory, what it saves, and the merge on disk give the logits of the attached model."""
    base = tied_model(kind)
    base.save_pretrained(tmp_path / "base")
    names = max(parameter_users(base).values(), key=len)
    assert len(names) > 2
    plain, refused = logits(base), []
    for number, name in enumerate(names):
        path = name.rpartition(".")[0]
        model = strictly(tmp_path / "base", base)
        tt.attach(model, tt.LoRA(rank=2), targets=[path], name="a")
        shake(model, 1)
        tt.save(model, tmp_path / f"a{number}", name="a")
        wanted, out = logits(model), tmp_path / f"out{number}"
        if torch.equal(wanted, plain):  # the module holds a tensor and is never called
            refused.append(path)
            for merge in (lambda: tt.merge(model, "a", untie=True), lambda: merged_to(tmp_path, number, out)):  # noqa: B023
                with pytest.raises(tt.NotMergeable, match=rf"{path} (is|may) never (be )?called .* attach to .*embed_tokens"):
                    merge()
            assert not out.exists() and torch.equal(logits(model), plain)
            continue
        tt.merge(model, "a", untie=True)
        torch.testing.assert_close(logits(model), wanted, atol=1e-5, rtol=1e-5)
        model.save_pretrained(tmp_path / "memory")
        tt.unmerge(model, "a")
        assert torch.equal(logits(model), wanted)
        tt.detach(model, "a")
        assert torch.equal(logits(model), plain) and sorted(max(parameter_users(model).values(), key=len)) == sorted(names)
        model = strictly(tmp_path / "base", base)
        tt.load(model, tmp_path / f"a{number}")
        tt.merge(model, "a", untie=True, permanent=True)
        model.save_pretrained(tmp_path / "permanent")
        merged_to(tmp_path, number, out)
        for folder in (tmp_path / "permanent", out):
            torch.testing.assert_close(logits(strictly(folder, base)), wanted, atol=1e-5, rtol=1e-5)
    assert len(refused) == 1  # in Florence-2 the embedding of the encoder, whose vectors come from outside


def merged_to(folder: Path, number: int, out: Path) -> None:
    tt.merge_checkpoint(folder / f"a{number}", folder / "base", out=out, untie=True)


def test_a_merge_that_is_taken_back_ties_again_and_keeps_the_flag(tmp_path) -> None:
    model = make("llama", tied=True)
    tt.attach(model, tt.LoRA(rank=2), targets="head", name="a")
    shake(model, 1)
    tt.merge(model, "a", untie=True)
    assert model.config.tie_word_embeddings is False and not model.all_tied_weights_keys
    model.tie_weights()  # as transformers does after a resize
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    tt.unmerge(model, "a")
    assert model.config.tie_word_embeddings is True and "lm_head.weight" in model.all_tied_weights_keys
    tt.detach(model, "a")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_checkpoint_that_would_lack_a_tensor_is_not_written(tmp_path) -> None:
    """A classifier's frozen pooler was random where the adapter was trained, and no file has it."""
    from safetensors.torch import load_file, save_file
    from transformers import BertForSequenceClassification

    base = save(make("bert"), tmp_path / "base", shard="10MB")
    kept = {k: v for k, v in load_file(base / "model.safetensors").items() if "pooler" not in k}
    save_file(kept, base / "model.safetensors", metadata={"format": "pt"})
    model = BertForSequenceClassification.from_pretrained(base, num_labels=3)
    tt.attach(model, tt.Unfreeze(), targets="head", name="a")
    shake(model, 1)
    tt.save(model, tmp_path / "a", name="a")
    with pytest.raises(tt.NotMergeable, match=r"would lack bert\.pooler\.dense\.bias, bert\.pooler\.dense\.weight, which"):
        tt.merge_checkpoint(tmp_path / "a", base, out=tmp_path / "out")
    assert not (tmp_path / "out").exists() and config_of(base)["architectures"] == ["BertModel"]
