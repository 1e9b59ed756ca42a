"""trimtab merge and trimtab convert from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

import trimtab as tt
from tiny_text import settings, write_model
from trimtab.cli import main


def run(capsys: pytest.CaptureFixture, *arguments: object, code: int = 0) -> str:
    """What a command printed; its errors too."""
    assert main([str(a) for a in arguments]) == code
    shown = capsys.readouterr()
    return shown.out + shown.err


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    from transformers import BertModel

    write_model(tmp_path / "model")
    folders = []
    for i, name in enumerate("ab"):
        model = BertModel.from_pretrained(tmp_path / "model")
        tt.attach(model, tt.LoRA(rank=2), targets="attn.q", rng=torch.Generator().manual_seed(i), name=name)
        with torch.no_grad():
            for parameter in tt.parameters(model):
                parameter.add_(0.1)
        folders.append(tt.save(model, tmp_path / name, name=name))
    return folders


def test_what_train_made_becomes_a_model(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's line: the adapter of a run, with its head, into the base."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings(tmp_path, epochs=1)))
    assert main(["train", "c.yaml"]) == 0
    shown = run(capsys, "merge", "run/adapter", "--base", "model", "--out", "merged")
    assert "output error" in shown and "wrote merged" in shown
    from transformers import AutoModel, AutoTokenizer

    before, after = (AutoModel.from_pretrained(f).state_dict() for f in ("model", "merged"))
    assert 0 < sum(not torch.equal(before[k], after[k]) for k in before) < len(before)
    assert AutoTokenizer.from_pretrained("merged").get_vocab() == AutoTokenizer.from_pretrained("model").get_vocab()
    assert "exists already" in run(capsys, "merge", "run/adapter", "--base", "model", "--out", "merged", code=2)

    # the head and the labels are there, and compute what the run predicts
    from trimtab.tasks.text_classification import PooledClassifier
    from trimtab.training import evaluate

    assert "no class of transformers is this PooledClassifier" in shown
    model, texts = PooledClassifier.from_merged("merged"), ["red house", "tree dog", "road flat road"]
    found = model(**AutoTokenizer.from_pretrained("merged")(texts, padding=True, return_tensors="pt"))["logits"].softmax(-1)
    for row, wanted in zip(found, evaluate("run", inputs=texts).predictions, strict=True):
        assert model.config.id2label[int(row.argmax())] == wanted["label"]
        assert float(row.max()) == pytest.approx(wanted["probability"], abs=1e-5)


def test_runs_with_a_head_each_become_one(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's line: ``trimtab merge a b --rule ties --rank 16 --out ab``, of two runs, each with its own head."""
    monkeypatch.chdir(tmp_path)
    for name, seed in (("a", 1), ("b", 2)):
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings(tmp_path, epochs=1, seed=seed, output=name)))
        assert main(["train", "c.yaml"]) == 0
    shown = run(capsys, "merge", "a/adapter", "b/adapter", "--rule", "ties", "--rank", "16", "--out", "ab")
    assert "classifier is a head: the average of the adapters' heads" in shown and "wrote ab" in shown
    assert json.loads((tmp_path / "ab" / "manifest.json").read_text())["model"]["labels"] == ["animal", "colour", "shape"]


def test_several_become_one(two, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shown = run(capsys, "merge", *two, "--weights", "0.7,-0.3", "--out", tmp_path / "m")
    assert "linear of 0.7 a, -0.3 b" in shown and "overall error" in shown
    shown = run(
        capsys, "merge", *two, "--rule", "ties", "--set", "density=0.5", "--rank", "3", "--name", "t", "--out", tmp_path / "t"
    )
    made = json.loads((tmp_path / "t" / "manifest.json").read_text())
    assert made["name"] == "t" and made["made"]["parameters"]["density"] == 0.5 and "ties of 0.5 a, 0.5 b" in shown
    run(capsys, "merge", *two, "--base", tmp_path / "model", "--rule", "ties", "--out", tmp_path / "model2")
    assert json.loads((tmp_path / "model2" / "trimtab_merge.json").read_text())["rule"] == "ties"
    run(capsys, "merge", *two, "--base", tmp_path / "model", "--as", "adapter", "--format", "peft", "--out", tmp_path / "p")
    assert (tmp_path / "p" / "adapter_config.json").exists()
    assert "magnitude_prune" in run(capsys, "merge", "--rules")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ([], "needs at least one adapter and --out"),
        (["--weights", "a,b", "--out", "x"], "numbers with commas"),
        (["--set", "density", "--out", "x"], "key=value"),
        (["--set", "denisty=1", "--out", "x", "--rule", "ties"], "nearest: density"),
        (["--as", "thing", "--out", "x"], "--as is adapter or model"),
        (["--as", "model", "--out", "x"], "needs its base"),
        (["--untie", "--out", "x"], "--untie is about a merged model"),
        (["--rank", "2", "--base", "y", "--out", "x"], "--rank is about a merged adapter"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_sentence(options, match, two, capsys: pytest.CaptureFixture) -> None:
    shown = run(capsys, "merge", *two, *options, code=2)
    assert shown.startswith("trimtab: ") and match in shown and "Traceback" not in shown


def test_convert(two, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shown = run(capsys, "convert", two[0], "--to", "peft", "--out", tmp_path / "p")
    assert "trimtab -> peft" in shown and "LORA" in shown
    shown = run(capsys, "convert", tmp_path / "p", "--out", tmp_path / "t", "--base", tmp_path / "model", "--rank", "1")
    assert "peft -> trimtab" in shown and shown.rstrip().endswith(f"wrote {tmp_path / 't'}")
    assert "of which alpha cannot be said" in run(capsys, "convert", tmp_path / "p", "--alpha", 3, "--out", tmp_path / "x", code=2)
    assert "intact" in run(capsys, "inspect", tmp_path / "t")
