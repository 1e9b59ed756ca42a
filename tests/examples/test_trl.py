"""TRL's trainers run unchanged on a model with an adapter: the adapter alone learns, and what is saved loads on a fresh base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab as tt
from tiny_decoder import rows, write_decoder, write_public

pytest.importorskip("trl", reason="trl is not installed")

from examples import trl_dpo, trl_sft
from trimtab.tasks.instructions import public


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_decoder(tmp_path_factory.mktemp("decoder"))


def check(trainer: Any, folder: Path, output: Path, name: str) -> None:
    """The base kept its bits, the adapter moved, and a fresh base with the saved adapter computes the same."""
    from transformers import AutoModelForCausalLM

    fresh = AutoModelForCausalLM.from_pretrained(folder)
    trained = trainer.model.state_dict()
    assert all(torch.equal(value, trained[key]) for key, value in fresh.state_dict().items())
    ids = torch.tensor([[1, 50, 60, 70]])
    before = fresh(input_ids=ids).logits
    tt.load(fresh, output / "adapter")
    after = fresh(input_ids=ids).logits
    assert not torch.allclose(before, after, atol=1e-3)
    trainer.model.eval()
    torch.testing.assert_close(trainer.model(input_ids=ids).logits, after, atol=1e-5, rtol=1e-4)
    learns = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    declared = {id(p) for p in tt.parameters(trainer.model, name=name)}
    assert learns == {n for n, p in trainer.model.named_parameters() if id(p) in declared}


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def test_sft(decoder: Path, tmp_path: Path):
    chats = [trl_sft.chat(row["instruction"], row["output"]) for row in rows(24, seed=0)]
    trainer = trl_sft.run(decoder, chats, tmp_path, steps=20, rate=2e-2)
    losses = logged(trainer, "loss")
    assert losses[-1] < 0.5 * losses[0]
    check(trainer, decoder, tmp_path, "sft")


def test_dpo(decoder: Path, tmp_path: Path):
    other = {"true": "false", "false": "true"}
    pairs = [
        {"prompt": row["instruction"], "chosen": f" {row['answer']}", "rejected": f" {other[row['answer']]}"}
        for row in rows(24, seed=0)
    ]
    trainer = trl_dpo.run(decoder, pairs, tmp_path, steps=20, rate=2e-2)
    losses = logged(trainer, "loss")
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # ln 2: the adapter starts at the reference
    margins = logged(trainer, "rewards/margins")
    assert sum(losses[-4:]) / 4 < 0.6 and sum(margins[-4:]) / 4 > 0.2
    check(trainer, decoder, tmp_path, "dpo")


def test_rows_of_the_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = write_public(tmp_path / "sets")
    monkeypatch.setattr(public, "wheel_folder", lambda: folder)
    chat = trl_sft.chats()[0]
    assert chat["prompt"][0]["content"].endswith("?") and chat["completion"][0]["content"].startswith("The answer is ")
    right = {int(pair["prompt"].rsplit(" ", 1)[1]) % 2: (pair["chosen"], pair["rejected"]) for pair in trl_dpo.pairs()}
    assert right == {0: (" look.", " shout."), 1: (" shout.", " look.")}
