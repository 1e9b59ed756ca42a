"""Folders that are older than a move of transformers' layout, and LoRA on banks of experts in the layouts that files have."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from peft_models import assert_same, config_of, edit, peft, rewrite
from torch import nn

import trimtab as tt

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.tensor([[1, 5, 9, 3, 7], [2, 2, 8, 4, 6]])
TEXT = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "initializer_range": 0.2}  # fmt: skip
EXPERTS = {"num_experts": 3, "num_local_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12}


def qwen2_vl() -> nn.Module:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 16, "mlp_ratio": 2, "patch_size": 4}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=TEXT | {"rope_parameters": rope}, vision_config=vision))


def llava() -> nn.Module:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8}
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=CLIPVisionConfig(**vision, patch_size=4), text_config=LlamaConfig(**TEXT))
    )


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**TEXT, num_local_experts=3, num_experts_per_tok=2))


def qwen3_moe() -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**TEXT, **EXPERTS, head_dim=8))


def gpt_oss() -> nn.Module:
    """Its banks are stored (experts, in, out)."""
    from transformers import GptOssConfig, GptOssForCausalLM

    return GptOssForCausalLM(GptOssConfig(**TEXT, num_local_experts=3, num_experts_per_tok=2, head_dim=8))


def base(build) -> nn.Module:
    torch.manual_seed(0)
    model = build()
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.normal_(std=0.2)
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


def written(build, folder: Path, **fields) -> torch.Tensor:
    """A folder of peft's with random values, and the logits."""
    torch.manual_seed(1)
    model = peft.get_peft_model(base(build), peft.LoraConfig(**{"r": 2, "lora_alpha": 3} | fields)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn(p.shape))
    model.save_pretrained(folder)
    return logits(model)


MOVED = {
    "Qwen2-VL until 4.52": (qwen2_vl, lambda k: k.replace("model.model.language_model.", "model.model.").replace(
        "model.model.visual.", "model.visual.")),
    "LLaVA until 4.52": (llava, lambda k: re.sub("model.model.language_model.", "model.language_model.model.", k).replace(
        "model.lm_head", "model.language_model.lm_head").replace("model.model.vision_tower.", "model.vision_tower.vision_model.")),
}  # fmt: skip


@pytest.mark.parametrize("case", MOVED)
@pytest.mark.parametrize("more", [{}, {"modules_to_save": ["norm"]}, {"alpha_pattern": {"ALL.layers.1.self_attn.q_proj": 9}}],
                         ids=["", "whole", "pattern"])  # fmt: skip
def test_a_folder_from_before_a_move(case, more, tmp_path) -> None:
    build, old = MOVED[case]
    new = {k: {n.replace("ALL", "^model.language_model"): v for n, v in p.items()} if isinstance(p, dict) else p
           for k, p in more.items()}  # fmt: skip
    want = written(build, tmp_path / "a", target_modules=["q_proj", "down_proj", "lm_head"], **new)
    rewrite(tmp_path / "a", lambda tensors: {old(k): v for k, v in tensors.items()})
    if "alpha_pattern" in more:
        theirs = old("base_model.model.model.language_model.layers.1").removeprefix("base_model.model.").removesuffix(".layers.1")
        edit(tmp_path / "a", alpha_pattern={f"^{theirs}.layers.1.self_attn.q_proj": 9})
    model = base(build)
    tt.load(model, tmp_path / "a")
    assert_same(logits(model), want)
    lost = lambda tensors: {k: v for k, v in tensors.items() if "layers.1.self_attn.q_proj" not in k}  # noqa: E731
    rewrite(tmp_path / "a", lost)
    with pytest.raises(tt.CheckpointMismatch, match=r"layers.1.self_attn.q_proj"):
        tt.load(base(build), tmp_path / "a")


BANKS = {
    "mixtral": (mixtral, ["experts.gate_up_proj", "experts.down_proj"]),
    "one of two": (mixtral, ["experts.down_proj"]),
    "the other": (qwen3_moe, ["gate_up_proj"]),
    "qwen3_moe": (qwen3_moe, ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]),
    "stored the other way": (gpt_oss, ["experts.gate_up_proj", "experts.down_proj"]),
    "a router": (mixtral, ["gate.weight", "experts.down_proj"]),
}


@pytest.mark.parametrize("scale", [{}, {"use_rslora": True}, {"alpha_pattern": {"experts.down_proj": 8}}], ids=["", "rs", "alpha"])
@pytest.mark.parametrize("case", BANKS)
def test_target_parameters_are_read_and_written(case, scale, tmp_path) -> None:
    build, names = BANKS[case]
    fields = {"target_modules": ["q_proj"], "target_parameters": names} | scale
    want = written(build, tmp_path / "a", **fields)
    assert (want - logits(base(build))).abs().max() > 0.05
    model = base(build)
    tt.load(model, tmp_path / "a")
    assert_same(logits(model), want)
    tt.save(model, tmp_path / "own")
    own = base(build)
    tt.load(own, tmp_path / "own")
    assert_same(logits(own), want)
    if "gate.weight" in names:
        return  # a router is no layer that trimtab writes a LoRA for
    tt.save(model, tmp_path / "back", format="peft")
    assert config_of(tmp_path / "back")["target_parameters"]
    assert_same(logits(peft.PeftModel.from_pretrained(base(build), tmp_path / "back").eval()), want)
    again = base(build)
    tt.load(again, tmp_path / "back")
    assert_same(logits(again), want)


def split(key: str) -> tuple[str, str, str] | None:
    """(below which path, parameter, factor) of an expert's factors as peft names them."""
    match = re.match(r"(.*\.experts)(\.base_layer)?\.(lora_[AB])\.weight$", key)
    return None if match is None else (match[1], "gate_up_proj" if match[2] else "down_proj", match[3])


def stacked(tensors, experts=3):
    """vLLM's stack: three axes under the same names."""
    shape = lambda k, v: (experts, -1, v.shape[1]) if "lora_A" in k else (v.shape[0], -1, experts)  # noqa: E731
    return {k: v if split(k) is None else v.reshape(shape(k, v)) for k, v in tensors.items()}


def by_parameter(tensors, experts=3):
    """SGLang's: experts first, the parameter's own name."""
    found = {}
    for k, v in tensors.items():
        if (parts := split(k)) is None:
            found[k] = v
        elif parts[2] == "lora_A":
            found[f"{parts[0]}.{parts[1]}.lora_A.weight"] = v.reshape(experts, -1, v.shape[1])
        else:
            found[f"{parts[0]}.{parts[1]}.lora_B.weight"] = v.reshape(v.shape[0], -1, experts).permute(2, 0, 1).contiguous()
    return found


@pytest.mark.parametrize("build", [mixtral, qwen3_moe, gpt_oss])
@pytest.mark.parametrize("layout", [stacked, by_parameter])
def test_three_axes(layout, build, tmp_path) -> None:
    names = ["experts.gate_up_proj", "experts.down_proj"]
    want = written(build, tmp_path / "a", target_modules=["q_proj"], target_parameters=names)
    rewrite(tmp_path / "a", layout)
    for fields in ({}, {"target_parameters": None}):
        edit(tmp_path / "a", **fields)
        model = base(build)
        tt.load(model, tmp_path / "a")
        assert_same(logits(model), want)


def dense(build, updates: dict[str, torch.Tensor]) -> torch.Tensor:
    model = base(build)
    with torch.no_grad():
        for name, update in updates.items():
            model.get_parameter(name).add_(update)
    return logits(model)


@pytest.mark.parametrize("shared", [False, True])
def test_one_a_of_two_joined_matrices(shared, tmp_path) -> None:
    """SGLang's gate and up: A one below the other, or the same of all experts."""
    written(qwen3_moe, tmp_path / "a", target_modules=["q_proj"], target_parameters=["gate_up_proj", "down_proj"])
    rewrite(tmp_path / "a", lambda t: {k: v for k, v in t.items() if split(k) is None and "lora_B" not in k or "q_proj" in k})
    zero = {"q_proj": 0.0}
    g = torch.Generator().manual_seed(4)
    tensors, updates = {}, {}
    for i in range(2):
        path = f"model.layers.{i}.mlp.experts"
        a = torch.randn(1 if shared else 3, 4, 16, generator=g)
        b = torch.randn(3, 24, 2, generator=g) * 0.2
        tensors[f"base_model.model.{path}.gate_up_proj.lora_A.weight"] = a
        tensors[f"base_model.model.{path}.gate_up_proj.lora_B.weight"] = b
        whole = a.expand(3, 4, 16)
        updates[f"{path}.gate_up_proj"] = 1.5 * torch.cat([b[:, :12] @ whole[:, :2], b[:, 12:] @ whole[:, 2:]], dim=1)
    rewrite(tmp_path / "a", lambda t: {k: v * zero["q_proj"] if "lora_B" in k else v for k, v in t.items()} | tensors)
    edit(tmp_path / "a", target_parameters=["gate_up_proj"])
    model = base(qwen3_moe)
    tt.load(model, tmp_path / "a")
    torch.testing.assert_close(logits(model), dense(qwen3_moe, updates), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("build", [mixtral, qwen3_moe])
def test_experts_one_by_one(build, tmp_path) -> None:
    """As adapters were before transformers stacked experts; each matrix has factors of its own."""
    written(build, tmp_path / "a", target_modules=["q_proj"])
    names = ("w1", "w3", "w2") if build is mixtral else ("gate_proj", "up_proj", "down_proj")
    owner = "block_sparse_moe" if build is mixtral else "mlp"
    g = torch.Generator().manual_seed(4)
    tensors, updates = {}, {}
    for layer in range(2):
        made = {}
        for name in names:
            model = base(build)
            bank = model.model.layers[layer].mlp.experts
            wide, narrow = bank.down_proj.shape[1:]
            out, fan_in = (wide, narrow) if name == names[2] else (narrow, wide)
            for e in range(3):
                a, b = torch.randn(2, fan_in, generator=g), 0.2 * torch.randn(out, 2, generator=g)
                key = f"base_model.model.model.layers.{layer}.{owner}.experts.{e}.{name}"
                tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
                made[name, e] = 1.5 * b @ a
        path = f"model.layers.{layer}.mlp.experts"
        updates[f"{path}.gate_up_proj"] = torch.stack([torch.cat([made[names[0], e], made[names[1], e]]) for e in range(3)])
        updates[f"{path}.down_proj"] = torch.stack([made[names[2], e] for e in range(3)])
    rewrite(tmp_path / "a", lambda t: {k: v * 0 if "lora_B" in k else v for k, v in t.items()} | tensors)
    edit(tmp_path / "a", target_modules=["q_proj", *names])
    model = base(build)
    tt.load(model, tmp_path / "a")
    torch.testing.assert_close(logits(model), dense(build, updates), atol=1e-4, rtol=1e-4)
    gone = f"layers.1.{owner}.experts.2.{names[0]}"
    rewrite(tmp_path / "a", lambda t: {k: v for k, v in t.items() if gone not in k})
    with pytest.raises(tt.CheckpointMismatch, match="lacks factors of the expert 2"):
        tt.load(base(build), tmp_path / "a")


def test_banks_that_do_not_fit_are_refused(tmp_path) -> None:
    names = ["experts.gate_up_proj", "experts.down_proj"]
    written(mixtral, tmp_path / "a", target_modules=["q_proj"], target_parameters=names)
    edit(tmp_path / "a", target_parameters=names[:1])
    with pytest.raises(tt.CheckpointMismatch, match="adapts 2 parameters.*names gate_up_proj"):
        tt.load(base(mixtral), tmp_path / "a")
    edit(tmp_path / "a", target_parameters=names, r=3)
    with pytest.raises((tt.CheckpointMismatch, tt.ShapeMismatch), match="no multiple of the config's r=3"):
        tt.load(base(mixtral), tmp_path / "a")
