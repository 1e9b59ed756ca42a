"""What a peft folder must be to be read, and that writing one leaves nothing half done."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft_models import LLAMA, assert_same, base, edit, lora, lycoris, outputs, peft, rewrite, saved_by_peft, shake
from torch import nn

import trimtab as tt

pytestmark = pytest.mark.filterwarnings("ignore")

@pytest.fixture
def folder(tmp_path):
    saved_by_peft(lora(LLAMA), "llama", tmp_path / "a")
    return tmp_path / "a"


def refused(folder, error, match) -> str:
    model = base("llama")
    with pytest.raises(error, match=match) as caught:
        tt.load(model, folder)
    assert set(model.state_dict()) == set(base("llama").state_dict()) and not hasattr(model, "_trimtab_state")
    return str(caught.value)


KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"


def test_an_unknown_tensor_is_refused(folder) -> None:
    rewrite(folder, lambda t: t | {"base_model.model.model.layers.1.extra": torch.ones(2)})
    message = refused(folder, tt.CheckpointMismatch, r"used \(12\) +missing \(0\) +unused \(1\)")
    assert "model.layers.1.extra" in message


def test_a_missing_tensor_and_a_missing_place_are_refused(folder) -> None:
    rewrite(folder, lambda t: {k: v for k, v in t.items() if k != KEY})
    message = refused(folder, tt.CheckpointMismatch, r"used \(11\) +missing \(1\) +unused \(0\)")
    assert "model.layers.1.self_attn.q_proj.lora_B.weight" in message
    rewrite(folder, lambda t: {k: v for k, v in t.items() if "layers.1.self_attn.q_proj" not in k})
    assert "model.layers.1.self_attn.q_proj.*" in refused(folder, tt.CheckpointMismatch, r"missing \(1\)")


@pytest.mark.parametrize("size", [0, 7, 200, -1])
def test_a_truncated_file_is_refused(folder, size) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    refused(folder, tt.CheckpointMismatch, file.name)


def test_a_damaged_or_incomplete_folder_is_refused(folder) -> None:
    text = (folder / "adapter_config.json").read_text()
    for bad in ("{", "[]", "{}"):
        (folder / "adapter_config.json").write_text(bad)
        refused(folder, tt.CheckpointMismatch, "adapter_config.json")
    (folder / "adapter_config.json").write_text(text)
    (folder / "adapter_model.safetensors").unlink()
    refused(folder, tt.CheckpointMismatch, "lacks adapter_model.safetensors")


def test_another_base_is_refused(folder) -> None:
    with pytest.raises(tt.NoMatch, match=r"model\.layers\.0.*nearest"):
        tt.load(base("gpt2"), folder)
    from transformers import LlamaConfig, LlamaForCausalLM

    wide = LlamaConfig(hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=40)
    with pytest.raises(tt.ShapeMismatch, match="load the base it was trained on"):
        tt.load(LlamaForCausalLM(wide), folder)
    deep = LlamaConfig(**base("llama").config.to_dict() | {"num_hidden_layers": 3})
    with pytest.raises(tt.CheckpointMismatch, match=r"missing \(3\)"):
        tt.load(LlamaForCausalLM(deep), folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layer_replication", [[0, 1]]), ("use_qalora", True), ("lora_bias", True), ("alora_invocation_tokens", [3]),
        ("arrow_config", {"top_k": 2}), ("a_field_of_the_future", 0.5),
    ],
)  # fmt: skip
def test_fields_that_change_the_function_are_refused(folder, field, value) -> None:
    edit(folder, **{field: value})
    assert field in refused(folder, tt.Unsupported, "does not read")


def test_config_against_tensors(folder) -> None:
    edit(folder, r=8)
    refused(folder, tt.ShapeMismatch, r"lora_A.weight is \(4, 32\)")
    edit(folder, r=None)
    refused(folder, tt.CheckpointMismatch, "does not say r")
    edit(folder, r=4, init_lora_weights="lora_ga")
    refused(folder, tt.Unsupported, "lora_ga")
    edit(folder, init_lora_weights=True, peft_type="HIRA")
    refused(folder, tt.Unsupported, "HIRA")


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (lora(["groups", "head"]), r"groups, a Conv2d\*"),
        (peft.OFTConfig(oft_block_size=4, target_modules=["stem"]), "stem, a Conv2d"),
        (peft.BOFTConfig(boft_block_size=4, target_modules=["stem"]), "stem, a Conv2d"),
    ],
)  # fmt: skip
def test_layers_on_which_peft_computes_something_else_are_refused(config, why, tmp_path) -> None:
    """Their LoRA of grouped convolutions and their OFT of convolutions are no change of the kernel's matrix as it is here."""
    saved_by_peft(config, "conv", tmp_path / "a")
    with pytest.raises(tt.Unsupported, match=why):
        tt.load(base("conv"), tmp_path / "a")


def test_a_folder_without_adapter_tensors_is_refused(folder) -> None:
    rewrite(folder, lambda t: {})
    edit(folder, target_modules=["nothing_like_this"])
    refused(folder, tt.CheckpointMismatch, "no tensor of an adapter")


def test_dropouts_without_a_counterpart_matter_for_training_alone(tmp_path) -> None:
    saved_by_peft(lycoris(peft.LoKrConfig, LLAMA, rank_dropout=0.1), "llama", tmp_path / "a")
    tt.load(base("llama"), tmp_path / "a")
    with pytest.raises(tt.Unsupported, match="rank_dropout"):
        tt.load(base("llama"), tmp_path / "a", trainable=True)
    saved_by_peft(lora(LLAMA, lora_dropout=0.1), "llama", tmp_path / "b")
    model = base("llama")
    tt.load(model, tmp_path / "b", trainable=True)
    assert any(m.config.dropout == 0.1 for m in model.modules() if type(m).__name__ == "LoRAAdapter")


def test_several_adapters_and_a_taken_name(folder) -> None:
    model = base("llama")
    tt.attach(model, tt.LoRA(rank=2), name="first")
    assert tt.load(model, folder, name="second") == "second"
    assert_same(outputs(model, "llama"), outputs(base("llama"), "llama"))  # it does not act beside another one unasked
    with pytest.raises(tt.Unsupported, match="'second' is attached already"):
        tt.load(model, folder, name="second")


# -- writing


def test_saving_again_is_whole_at_any_time(folder, tmp_path, monkeypatch) -> None:
    """An interruption at any rename leaves the old adapter or the new one, never a mixture; other files stay."""
    old = base_with(folder)
    new = base("llama")
    tt.attach(new, tt.LoRA(rank=3), targets="attn.k")
    shake(new)
    for stop in range(1, 20):
        out = tmp_path / str(stop) / "out"
        tt.save(old, out, format="peft")
        (out / "README.md").write_text("mine")
        with monkeypatch.context() as patch:
            left = iter([True] * (stop - 1) + [False])
            for name in ("replace", "rename"):
                patch.setattr(os, name, interrupted(getattr(os, name), left))
            try:
                tt.save(new, out, format="peft")
                break
            except KeyboardInterrupt:
                pass
        whole = out if out.exists() else next(out.parent.glob(".out.*.old"))
        model = base("llama")
        tt.load(model, whole)
        assert any(torch.equal(outputs(model, "llama"), outputs(one, "llama")) for one in (old, new))
    assert stop > 3 and (out / "README.md").read_text() == "mine" and [p.name for p in out.parent.iterdir()] == ["out"]
    model = base("llama")
    tt.load(model, out)
    assert_same(outputs(model, "llama"), outputs(new, "llama"))


def interrupted(call, left):
    """``call``, as long as ``left`` says so."""

    def run(*args):
        if not next(left, True):
            raise KeyboardInterrupt
        return call(*args)

    return run


def base_with(folder: Path) -> nn.Module:
    model = base("llama")
    tt.load(model, folder)
    return model


def test_bad_values_and_unknown_formats_are_refused(folder, tmp_path) -> None:
    model = base_with(folder)
    with torch.no_grad():
        next(m for m in model.modules() if type(m).__name__ == "LoRAAdapter").a[0, 0] = float("nan")
    with pytest.raises(tt.CheckpointMismatch, match="NaN"):
        tt.save(model, tmp_path / "b", format="peft")
    model = base_with(folder)
    with pytest.raises(tt.Unsupported, match="nearest: peft"):
        tt.save(model, tmp_path / "b", format="peftt")


def test_peft_is_not_imported(folder) -> None:
    code = "import sys, trimtab, trimtab.compat.peft; print(any(m == 'peft' or m.startswith('peft.') for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"
