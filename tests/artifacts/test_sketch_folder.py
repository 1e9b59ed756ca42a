"""A sketch on disk: damaged and foreign folders, runs on it, adapters merged into it, the commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from sketch_models import IDS, bert, dense_of, gpt2, llama, sketch_of, sketched
from transformers import AutoModel, LlamaForCausalLM

import trimtab as tt
from tiny_text import settings, write_model
from trimtab.cli import main
from trimtab.compat.sketch_folder import read_manifest, seal, sha256
from trimtab.compat.sketched import SketchedWeight
from trimtab.core.errors import CheckpointMismatch, NotMergeable, Unsupported
from trimtab.training import evaluate, train

QUICK = tt.BaseSketch(restarts=1)


def edit(folder: Path, **changes) -> None:
    """Change the manifest and seal it again."""
    manifest = {**json.loads((folder / "sketch.json").read_text()), **changes}
    (folder / "sketch.json").write_text(json.dumps({**manifest, "seal": seal(manifest)}))


def change_shard(folder: Path, change) -> None:
    """Rewrite the first shard, with its new hash in the manifest."""
    file = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    edit(folder, shards={**read_manifest(folder)["shards"], file.name: sha256(file)})


def rewrite(folder: Path, change) -> None:
    (folder / "sketch.json").write_text(change((folder / "sketch.json").read_text()))


def cut(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-100])


KEY = "model.layers.0.self_attn.q_proj.weight"
DAMAGE = [
    (cut, r"sketch-0000.-of-0000.\.safetensors is damaged or was changed: its SHA-256"),
    (lambda f: sorted(f.glob("*.safetensors"))[1].unlink(), r"its sketch.json names sketch-00002-of-.*, which is not there"),
    (lambda f: (f / "sketch.json").unlink(), r"no model.safetensors|no file named model.safetensors"),
    (lambda f: (f / "sketch.json").write_text("{"), "sketch.json is damaged"),
    (lambda f: (f / "sketch.json").write_text('{"format": "other"}'), "is not the sketch.json of a trimtab sketch"),
    (lambda f: edit(f, version=2), "has version 2; this trimtab reads up to 1: upgrade it"),
    (lambda f: rewrite(f, lambda text: text.replace('"bits": 4', '"bits": 2')), "its seal does not fit"),
    (lambda f: (f / "sketch.json").write_text('{"format": "trimtab sketch", "version": 1}'), "lacks settings, source, shards"),
    (lambda f: change_shard(f, lambda t: t.pop("model.norm.weight")), "is damaged: it lacks model.norm.weight"),
    (lambda f: change_shard(f, lambda t: t.update(extra=torch.zeros(1))), "tensors that sketch.json does not name: extra"),
    (lambda f: change_shard(f, lambda t: t.update({"model.norm.weight": torch.ones(3)})), r"is \[3\], and sketch.json says \[32\]"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_damaged_and_foreign_folders(tmp_path, damage, message):
    """By name, on loading and on expanding; nothing is written."""
    tt.compress_base(llama(tmp_path / "a"), tmp_path / "s", sketch=QUICK, shard_bytes=30_000)
    damage(tmp_path / "s")
    with pytest.raises((CheckpointMismatch, tt.TrimtabError), match=message):
        tt.load_base(tmp_path / "s")
    with pytest.raises(CheckpointMismatch, match="there is no sketch.json" if "model.safetensors" in message else message):
        tt.expand_base(tmp_path / "s", tmp_path / "d")
    assert not (tmp_path / "d").exists() and not list(tmp_path.glob(".*"))


def test_all_damaged_shards_are_named(tmp_path):
    tt.compress_base(llama(tmp_path / "a"), tmp_path / "s", sketch=QUICK, shard_bytes=30_000)
    files = sorted((tmp_path / "s").glob("*.safetensors"))
    for file in files[:2]:
        file.unlink()
    with pytest.raises(CheckpointMismatch, match=rf"2 problems:(.|\n)*{files[0].name}(.|\n)*{files[1].name}"):
        tt.load_base(tmp_path / "s")
    with pytest.raises(CheckpointMismatch, match=f"{files[0].name} is damaged or gone"):
        tt.compress_base(tmp_path / "a", tmp_path / "s", sketch=QUICK, shard_bytes=30_000)


def test_not_a_sketch(tmp_path):
    source = llama(tmp_path / "a")
    with pytest.raises(CheckpointMismatch, match="is no sketch: there is no sketch.json .found: config.json"):
        tt.expand_base(source, tmp_path / "d")
    with pytest.raises(CheckpointMismatch, match="no such folder"):
        tt.expand_base(tmp_path / "b", tmp_path / "d")


# -- runs


def test_train_and_evaluate_on_a_sketch(tmp_path):
    """``model:`` names the folder; the adapter holds tables and the head alone; a fresh model evaluates the same."""
    write_model(tmp_path / "dense")
    tt.compress_base(tmp_path / "dense", tmp_path / "model", sketch=tt.BaseSketch(bits=2, groups=2))
    config = settings(tmp_path, method={"name": "SketchTune", "bits": 2, "groups": 2}, learning_rate=1e-2, epochs=4)
    result = train(config)
    (file,) = (tmp_path / "run" / "adapter").glob("*.safetensors")
    stored = load_file(file)
    tables = [value for key, value in stored.items() if key.endswith(".table")]
    rows = 2 * (4 * 32 + 64 + 32)
    assert len(tables) == 12 and sum(v.numel() for v in tables) == rows * 2 * 4 and not any("codes" in key for key in stored)
    assert result.trainable == rows * 2 * 4 + 3 * 32 + 3
    again = evaluate(tmp_path / "run", on="test")
    assert again.metrics["accuracy"] == result.metrics["test"]["accuracy"]
    assert again.metrics["loss"] == pytest.approx(result.metrics["test"]["loss"], rel=1e-5)


def test_plan_on_a_sketch(tmp_path):
    """Bytes of codes and tables instead of dense ones; SketchTune's codes are the base's."""
    tt.compress_base(bert(tmp_path / "a"), tmp_path / "s", sketch=QUICK)
    dense, found = (tt.plan(str(tmp_path / name), tt.SketchTune(), batch=2, length=8) for name in "as")
    weights = sketched(tmp_path / "s").values()
    saved = sum(4 * w.numel() - w.sketch_codes.nbytes - 4 * w.sketch_table.numel() for w in weights)
    assert dense.weight_bytes - found.weight_bytes == saved and found.trainable == dense.trainable
    assert found.activation_bytes == dense.activation_bytes


# -- adapters merged into it


def tuned(folder: Path, config: tt.MethodConfig, targets=None) -> tuple[torch.nn.Module, torch.Tensor]:
    model = tt.load_base(folder).eval()
    tt.attach(model, config, targets=targets)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in tt.parameters(model):
            p.add_(0.02 * torch.randn(p.shape, generator=rng))
    return model, model(IDS)[0]


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_learned_table_becomes_the_bases(tmp_path, make, capsys):
    """The command writes a sketch of the same codes, whose outputs are the adapted ones'."""
    tt.compress_base(make(tmp_path / "a"), tmp_path / "s", sketch=QUICK)
    model, want = tuned(tmp_path / "s", tt.SketchTune(), targets="attention | mlp")
    tt.save(model, tmp_path / "adapter")
    arguments = ["merge", str(tmp_path / "adapter"), "--base", str(tmp_path / "s")]
    assert main([*arguments, "--out", str(tmp_path / "m")]) == 2 and 'into="dequantised"' in capsys.readouterr().err
    assert main([*arguments, "--out", str(tmp_path / "m"), "--into", "requantised"]) == 0
    one, two = sketched(tmp_path / "s"), sketched(tmp_path / "m")
    assert all(torch.equal(one[key].sketch_codes, two[key].sketch_codes) for key in one)
    torch.testing.assert_close(tt.load_base(tmp_path / "m").eval()(IDS)[0], want, rtol=1e-2, atol=2e-2)  # tables in 16 bits
    fresh = tt.load_base(tmp_path / "m")
    name = tt.load(tt.load_base(tmp_path / "s"), tmp_path / "adapter")
    assert name == "default" and not hasattr(fresh, "trimtab")


def test_a_dense_checkpoint_with_the_adapter_in_it(tmp_path):
    """The tokenizer-less way, in Python, and by the command with a tokenizer."""
    write_model(tmp_path / "a")
    tt.compress_base(tmp_path / "a", tmp_path / "s", sketch=QUICK)
    ids = {"input_ids": torch.arange(12).view(2, 6)}
    model = tt.load_base(tmp_path / "s").eval()
    tt.attach(model, tt.LoRA(rank=2), targets="attn.q", rng=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in tt.parameters(model):
            p.add_(0.1)
    want = model(**ids)[0]
    tt.save(model, tmp_path / "adapter")
    arguments = ["merge", str(tmp_path / "adapter"), "--base", str(tmp_path / "s"), "--into", "dequantised"]
    assert main([*arguments, "--out", str(tmp_path / "m")]) == 0
    plain = AutoModel.from_pretrained(tmp_path / "m").eval()
    assert not any(isinstance(p, SketchedWeight) for p in plain.parameters())
    torch.testing.assert_close(plain(**ids)[0], want, rtol=1e-5, atol=1e-5)


def test_save_base_refuses_what_is_no_longer_a_sketch(tmp_path):
    tt.compress_base(llama(tmp_path / "a"), tmp_path / "s", sketch=QUICK)
    model, _ = tuned(tmp_path / "s", tt.LoRA(rank=2), targets="attn.q")
    with pytest.raises(NotMergeable, match="say what it becomes"):
        tt.merge(model, "default")
    tt.merge(model, "default", into="dequantised", permanent=True)
    with pytest.raises(CheckpointMismatch, match=f"{KEY} is a SketchedWeight in the sketch and a Parameter in the model"):
        tt.save_base(model, tmp_path / "s", tmp_path / "m")
    assert not (tmp_path / "m").exists()
    with pytest.raises(Unsupported, match="exists already"):
        tt.save_base(model, tmp_path / "s", tmp_path / "a")


def test_changed_dense_tensors_are_saved(tmp_path):
    """A norm that learnt, beside weights that stay."""
    tt.compress_base(llama(tmp_path / "a"), tmp_path / "s", sketch=QUICK, shard_bytes=30_000)
    model, want = tuned(tmp_path / "s", tt.NormTuning())
    tt.merge(model, "default", permanent=True)
    tt.save_base(model, tmp_path / "s", tmp_path / "m")
    torch.testing.assert_close(tt.load_base(tmp_path / "m", LlamaForCausalLM).eval()(IDS).logits, want)
    one, two = sketch_of(tmp_path / "s"), sketch_of(tmp_path / "m")
    assert {key for key in one if not torch.equal(one[key] + 0, two[key] + 0)} == {key for key in one if "norm" in key}


# -- commands


def test_commands(tmp_path, monkeypatch, capsys):
    write_model(tmp_path / "model")
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"line": "red cat " * i}) + "\n" for i in range(1, 9)))
    monkeypatch.chdir(tmp_path)
    arguments = ["compress-base", "model", "--out", "s", "--bits", "2", "--groups", "2", "--shard-size", "20KB", "--restarts", "1"]
    assert main([*arguments, "--calibrate", "texts.jsonl", "--column", "line", "--samples", "6"]) == 0
    shown = capsys.readouterr().out
    assert "BaseSketch(bits=2, groups=2" in shown and "output error %" in shown and "bytes of weights" in shown
    assert read_manifest(tmp_path / "s")["settings"]["calibration"]["sequences"] == 6
    assert main(["expand-base", "s", "--out", "d"]) == 0 and main(["expand-base", "s", "--out", "d"]) == 2
    assert AutoModel.from_pretrained("d") and len(dense_of(tmp_path / "d")) == len(sketch_of(tmp_path / "s"))
    assert main(["compress-base", "d", "--out", "s"]) == 2
    assert "holds another sketch" in capsys.readouterr().err
    assert main(["compress-base", "model", "--out", "t", "--shard-size", "much"]) == 2
    shutil.rmtree(tmp_path / "d")
    config = settings(tmp_path, model="s", method={"name": "SketchTune", "bits": 2, "groups": 2}, epochs=1)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", "c.yaml"]) == 0 and main(["eval", "run", "--text", "red cat"]) == 0
