"""A base's folder that is damaged or hostile: nothing of it is run, asked for, waited for, or followed out of it."""

from __future__ import annotations

import json
import os

import pytest
import torch

import trimtab as tt
from artifacts.bases import make, save
from trimtab.artifacts.weights import Weights
from trimtab.compat.model_config import config_class
from trimtab.compat.pretrained import Pretrained
from trimtab.training.errors import ConfigError
from trimtab.training.models import load_base


@pytest.fixture
def base(tmp_path):
    return save(make("llama"), tmp_path / "base")


def change(base, **fields) -> None:
    file = base / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"num_hidden_layers": 1 << 64}, r"num_hidden_layers=18446744073709551616; no model has more than 10,000"),
        ({"num_hidden_layers": 10**9}, "no model has more than 10,000"),
        ({"text_config": {"num_local_experts": 10**9}}, r"text_config\.num_local_experts"),
        ({"hidden_size": 1 << 62}, "transformers cannot"),
        ({"hidden_size": "large"}, "transformers cannot"),
        ({"hidden_size": None}, "transformers cannot"),
        ({"model_type": 5}, "model_type=5, where a text is needed"),
        ({"architectures": [["LlamaForCausalLM"]]}, "where names of classes are needed"),
        ({"quantization_config": 5}, "transformers cannot"),
        ({"hidden_size": 10**35}, "no model has more"),
        ({"num_hidden_layers": [2]}, "transformers cannot"),
    ],
)  # fmt: skip
def test_a_damaged_configuration_is_refused(base, fields, match) -> None:
    change(base, **fields)
    with pytest.raises(tt.CheckpointMismatch, match=match):
        Pretrained(base)


def test_a_byte_order_mark_is_read(base) -> None:
    for name in ("config.json", "model.safetensors.index.json"):
        (base / name).write_bytes(b"\xef\xbb\xbf" + (base / name).read_bytes())
    assert Pretrained(base).class_name == "LlamaForCausalLM"


def test_a_pipe_is_not_waited_for(base) -> None:
    (base / "config.json").unlink()
    os.mkfifo(base / "config.json")
    with pytest.raises(tt.CheckpointMismatch, match="is a pipe"):
        Pretrained(base)


def test_code_of_the_folder_is_neither_run_nor_asked_about(base, monkeypatch) -> None:
    (base / "evil.py").write_text("raise SystemExit('run')\n")
    change(base, model_type="evil", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("asked on stdin"))
    with pytest.raises(tt.Unsupported, match="auto_map in its config.json.*never run here"):
        config_class(base)
    with pytest.raises(ConfigError, match="auto_map in its config.json.*never run here"):
        load_base(base)


@pytest.mark.parametrize("name", ["../other.safetensors", "/tmp/other.safetensors", 5])
def test_an_index_names_only_files_of_its_folder(base, name) -> None:
    index = {"weight_map": dict.fromkeys(Pretrained(base).where, name)}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    for read in (Pretrained, Weights):
        with pytest.raises(tt.CheckpointMismatch, match="nothing outside of it is read|no weight_map"):
            read(base)


def test_a_manifest_names_only_files_of_its_folder(tmp_path) -> None:
    from trimtab.core.checkpoint import _seal

    model = make("llama")
    tt.attach(model, tt.LoRA(rank=2))
    tt.save(model, tmp_path / "a")
    file = tmp_path / "a" / "manifest.json"
    for name in ("../x.safetensors", str(tmp_path / "x.safetensors")):
        manifest = json.loads(file.read_text()) | {"file": name}
        file.write_text(json.dumps(manifest | {"seal": _seal(manifest)}))
        with pytest.raises(tt.CheckpointMismatch, match="nothing outside of it is read"):
            tt.load(make("llama"), tmp_path / "a")


def test_values_that_are_not_finite_are_refused_in_a_resealed_folder(tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    from trimtab.core.checkpoint import _hash, _seal

    model = make("llama")
    tt.attach(model, tt.LoRA(rank=2))
    tt.save(model, tmp_path / "a")
    file = tmp_path / "a" / "manifest.json"
    manifest = json.loads(file.read_text())
    tensors = load_file(tmp_path / "a" / manifest["file"])
    key = next(iter(tensors))
    for value in (float("nan"), float("inf")):
        tensors[key].view(-1)[0] = value
        save_file(tensors, tmp_path / "a" / manifest["file"])
        manifest["sha256"] = _hash(tmp_path / "a" / manifest["file"])
        file.write_text(json.dumps(manifest | {"seal": _seal(manifest)}))
        model = make("llama")
        with pytest.raises(tt.CheckpointMismatch, match=f"{key} .*holds NaN or infinite"):
            tt.load(model, tmp_path / "a")
        assert "_trimtab_state" not in model.__dict__ or not model._trimtab_state.groups
    assert torch.isfinite(model(torch.arange(4)[None]).logits).all()
