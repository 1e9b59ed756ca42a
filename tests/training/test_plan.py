"""The plan against the real thing: three models, exact counters on real tensors."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

import trimtab as tt
from trimtab.core.account import LiveBytes, count_flops, saved_bytes
from trimtab.training.plan import _inputs, _loss, plan

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, vocab_size=99, num_key_value_heads=2)),
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SIZES, vocab_size=99)),
    "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES, image_size=32, patch_size=8)),
}
METHODS = [tt.LoRA(rank=4), tt.DoRA(rank=4), tt.LoKr(rank=2), tt.Bone(rank=8)]
METHODS += [tt.PrefixTuning(tokens=4), tt.PromptTuning(tokens=4, init="normal"), tt.VPT(tokens=4)]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("name", MODELS)
def test_prediction_is_within_ten_percent_of_measurement(name: str, method: tt.MethodConfig, tmp_path) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    before = list(model.state_dict())
    predicted = plan(model, method, batch=2, length=24)
    assert list(model.state_dict()) == before, "a plan leaves the model alone"
    meta = _inputs(copy.deepcopy(model).to("meta"), 2, 24)
    inputs = {k: torch.zeros(v.shape, dtype=v.dtype) if v.dtype == torch.long else torch.randn(v.shape) for k, v in meta.items()}
    tt.attach(model, method, check_gradients=False)
    model.train()
    with saved_bytes(model) as saved:
        _loss(model, inputs)
    with LiveBytes() as live, count_flops() as counter:
        _loss(model, inputs).backward()
    optimizer = torch.optim.AdamW(tt.parameters(model))
    optimizer.step()
    state = sum(v.numel() * v.element_size() for s in optimizer.state.values() for v in s.values() if v.dim())
    tt.save(model, tmp_path)
    on_disk = next(tmp_path.glob("*.safetensors")).stat().st_size
    header = int.from_bytes(next(tmp_path.glob("*.safetensors")).read_bytes()[:8], "little") + 8
    for ours, real in (
        (predicted.activation_bytes, saved.total),
        (predicted.peak_bytes, live.peak),
        (predicted.flops, counter.get_total_flops()),
        (predicted.optimizer_bytes, state),
        (predicted.adapter_bytes, on_disk - header),
    ):
        assert ours == pytest.approx(real, rel=0.1)
    assert predicted.trainable == sum(p.numel() for p in tt.parameters(model))


def test_memory_and_errors() -> None:
    model = MODELS["bert"]()
    small = plan(model, tt.LoRA(rank=4), batch=2, length=8, memory=10)
    assert small.fits is False
    assert plan(model, tt.LoRA(rank=4), batch=2, length=8, memory=small.total_bytes).fits is True
    with pytest.raises(tt.Unsupported, match="adamw"):
        plan(model, tt.LoRA(rank=4), optimizer="adam")
    with pytest.raises(tt.NoMatch, match=r"attn\.q"):
        plan(model, tt.LoRA(rank=4), targets="attn.w")


def test_checkpointing_keeps_less() -> None:
    model = MODELS["llama"]()
    plain, saved = (plan(model, tt.LoRA(rank=4), batch=2, length=24, checkpointing=flag) for flag in (False, True))
    assert saved.activation_bytes < plain.activation_bytes
    assert saved.flops > plain.flops
