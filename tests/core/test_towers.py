"""Models of several towers: every one is found, ``layers=`` says which it counts, and defaults say what they leave out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import trimtab as tt
from trimtab.core import anatomy
from trimtab.core.selection import select

transformers = pytest.importorskip("transformers")

TEXT = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 24,
        "vocab_size": 40}  # fmt: skip
VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 8,
    "patch_size": 4,
}


def llava() -> nn.Module:
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT), vision_config=transformers.CLIPVisionConfig(**VISION, projection_dim=8)
    )
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(config).eval()


def t5() -> nn.Module:
    config = transformers.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_decoder_layers=3, num_heads=2, vocab_size=40)
    torch.manual_seed(0)
    return transformers.T5ForConditionalGeneration(config).eval()


class Hidden(nn.Module):
    """A tower with attention beside one of blocks without any."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False)
        block = lambda: nn.ModuleDict({"norm": nn.LayerNorm(8), "fc1": nn.Linear(8, 16), "fc2": nn.Linear(16, 8)})  # noqa: E731
        self.language = nn.ModuleDict({"blocks": nn.ModuleList([block() for _ in range(3)])})


def test_a_tower_that_is_recognised_hides_no_other() -> None:
    assert {t.path: len(t.blocks) for t in anatomy.of(Hidden()).towers} == {"vision.layers": 2, "language.blocks": 3}
    assert {t.path.split(".")[1]: len(t.blocks) for t in anatomy.of(llava()).towers} == {"vision_tower": 2, "language_model": 3}
    assert {t.path: len(t.blocks) for t in anatomy.of(t5()).towers} == {"encoder.block": 2, "decoder.block": 3}


def test_stages_are_one_tower() -> None:
    config = transformers.SwinConfig(embed_dim=16, depths=[2, 2], num_heads=[2, 4], image_size=32, patch_size=4, window_size=4)
    with torch.device("meta"):
        found = anatomy.of(transformers.SwinModel(config))
    assert [(t.path, t.blocks) for t in found.towers] == [("encoder.layers.*.blocks", (0, 1, 2, 3))]


def paths(model: nn.Module, targets: str | None, layers) -> list[str]:
    return [place.path for place in select(model, targets, layers=layers)]


def test_indices_count_in_the_tower_that_the_targets_stand_in() -> None:
    model = t5()
    assert paths(model, r"decoder\..*SelfAttention\.q", [2]) == ["decoder.block.2.layer.0.SelfAttention.q"]
    assert paths(model, "EncDecAttention.q", [0]) == ["decoder.block.0.layer.1.EncDecAttention.q"]
    assert paths(model, r"encoder\..*\.q", [1]) == ["encoder.block.1.layer.0.SelfAttention.q"]


def test_a_tower_is_named_by_its_path_or_parts_of_it() -> None:
    model = t5()
    both = ["encoder.block.1.layer.0.SelfAttention.o", "decoder.block.0.layer.0.SelfAttention.o"]
    for names in (("encoder", "decoder"), ("encoder.block", "decoder.block")):
        layers = dict(zip(names, ([1], [0]), strict=True))
        assert paths(model, "SelfAttention.o", layers) == both
    assert {p.split(".")[0] for p in paths(model, "attn.v", {"decoder": [0]})} == {"decoder"}


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([0], r"does not say what it counts.*encoder\.block \(2 blocks\), decoder\.block \(3 blocks\).*\{'encoder': \[0\]\}"),
        ({"vision": [0]}, r"'vision' is no tower.*encoder\.block"),
        ({"block": [0]}, r"'block' means 2 towers"),
        ({"encoder": [2]}, r"valid: 0 to 1 in encoder\.block"),
        ({}, "names no tower"),
        ("0", r"numbers of blocks, as in layers=\[0, 1\]"),
        ("01", "numbers of blocks"),
        ([0.5], "numbers of blocks"),
        ([True], "numbers of blocks"),
    ],
)
def test_layers_that_say_too_little_are_refused_in_words(layers, words: str) -> None:
    with pytest.raises(tt.NoMatch, match=words):
        select(t5(), "attn.q", layers=layers)


def test_defaults_of_a_multimodal_model_stay_within_its_text_model_and_say_so() -> None:
    model = llava()
    table = tt.attach(model, tt.LoRA(rank=2), dry_run=True)
    assert all(path.startswith("model.language_model.") for path in table.column("path"))
    assert len(table) == 3 * 7
    said = str(table)
    assert "by default only the text model, model.language_model" in said
    assert "model.vision_tower" in said and "(2 blocks)" in said
    assert len(paths(model, None, [2])) == 7, "indices count its blocks"
    every = paths(model, "linear", None)
    assert any("vision_tower" in p for p in every) and any("multi_modal_projector" in p for p in every)
    assert "by default" not in str(tt.attach(model, tt.LoRA(rank=2), targets="linear", dry_run=True))


def test_a_prompt_enters_the_text_model_of_a_multimodal_model_by_default() -> None:
    table = tt.attach(llava(), tt.PromptTuning(tokens=2), dry_run=True)
    assert [path.split(".")[1] for path in table.column("path")] == ["language_model"]


@pytest.mark.parametrize("build", [t5, lambda: transformers.CLIPModel(transformers.CLIPConfig(
    text_config={**TEXT, "projection_dim": 8}, vision_config={**VISION, "projection_dim": 8}))], ids=["t5", "clip"])  # fmt: skip
def test_both_halves_of_an_encoder_decoder_and_of_a_pair_are_meant_by_default(build) -> None:
    model = build()
    hit = {place.block for place in select(model, None)}
    assert all(hit & set(tower.blocks) for tower in anatomy.of(model).towers)
