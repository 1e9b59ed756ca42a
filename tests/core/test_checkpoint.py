"""Saved adapters: strict, sealed, written so that no interruption loses anything."""

from __future__ import annotations

import json
import os

import pytest
import torch
from small_net import IDS, net, shake

import trimtab as tt


def tensors_file(folder):
    return next(folder.glob("*.safetensors"))


def test_base_weights_are_never_inside(saved) -> None:
    from safetensors.torch import load_file

    base = set(net().state_dict())
    assert not base & set(load_file(tensors_file(saved)))


def test_an_adapter_for_another_base_is_refused(saved) -> None:
    with pytest.raises(tt.CheckpointMismatch, match="another base"):
        tt.load(net(seed=1), saved)
    with pytest.raises(tt.ShapeMismatch, match="made for"):
        tt.load(net(width=32), saved)
    with pytest.raises(tt.NoMatch, match=r"layers\.1"):
        tt.load(net(depth=1), saved)
    assert tt.load(net(seed=1), saved, check_base=False) == "default"
    assert tt.load(net().to(torch.bfloat16), saved) == "default"


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_truncated_file_is_refused(saved, size) -> None:
    file = tensors_file(saved)
    file.write_bytes(file.read_bytes()[:size])
    model = net()
    with pytest.raises(tt.CheckpointMismatch, match=file.name):
        tt.load(model, saved)
    assert list(model.state_dict()) == list(net().state_dict())


def test_a_tampered_byte_and_a_tampered_manifest_are_refused(saved) -> None:
    file = tensors_file(saved)
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(tt.CheckpointMismatch, match="SHA-256"):
        tt.load(net(), saved)
    file.write_bytes(whole)
    manifest = json.loads((saved / "manifest.json").read_text())
    manifest["places"][0]["method"]["rank"] = 4
    (saved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(tt.CheckpointMismatch, match="changed"):
        tt.load(net(), saved)
    (saved / "manifest.json").write_text("{")
    with pytest.raises(tt.CheckpointMismatch, match="damaged"):
        tt.load(net(), saved)


def test_unknown_and_missing_tensors_are_refused(saved) -> None:
    from safetensors.torch import load_file, save_file

    from trimtab.core.checkpoint import _hash, _seal

    def rewrite(tensors) -> None:
        file = tensors_file(saved)
        save_file(tensors, file)
        manifest = json.loads((saved / "manifest.json").read_text())
        manifest["sha256"] = _hash(file)
        manifest["seal"] = _seal(manifest)
        (saved / "manifest.json").write_text(json.dumps(manifest))

    tensors = load_file(tensors_file(saved))
    rewrite(tensors | {"stranger": torch.zeros(1)})
    with pytest.raises(tt.CheckpointMismatch, match="stranger"):
        tt.load(net(), saved)
    key = next(iter(tensors))
    rewrite({k: v for k, v in tensors.items() if k != key})
    with pytest.raises(tt.CheckpointMismatch, match="lacks"):
        tt.load(net(), saved)


def test_an_interrupted_save_leaves_the_old_adapter_whole(saved, monkeypatch) -> None:
    model = net()
    tt.load(model, saved)
    expected = model(IDS)
    other = net()
    tt.attach(other, tt.LoRA(rank=3))
    real = os.replace
    for stop_at in (1, 2):
        calls = []

        def replace(a, b, calls=calls, stop_at=stop_at):
            calls.append(b)
            if len(calls) == stop_at:
                raise KeyboardInterrupt
            real(a, b)

        monkeypatch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            tt.save(other, saved)
        monkeypatch.setattr(os, "replace", real)
        again = net()
        tt.load(again, saved)
        assert torch.equal(again(IDS), expected)
    tt.save(other, saved)
    assert len(list(saved.glob("*.safetensors"))) == 1


@pytest.mark.parametrize("name", ["lora", "a.b", "weight", "forward", "ß 適", "trimtab", "%2E", "0"])
def test_any_name_works(name, tmp_path) -> None:
    model = net()
    tt.attach(model, tt.LoRA(rank=2), name=name)
    shake(model, name)
    tt.save(model, tmp_path / "x", name=name)
    fresh = net()
    assert tt.load(fresh, tmp_path / "x") == name
    assert torch.equal(fresh(IDS), model(IDS))
    tt.detach(fresh, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_round_trip(dtype, tmp_path) -> None:
    model = net()
    tt.attach(model, tt.LoRA(rank=2), dtype=dtype)
    tt.save(model, tmp_path)
    fresh = net()
    tt.load(fresh, tmp_path)
    state = fresh.__dict__["_trimtab_state"]
    assert {p.dtype for a in state.groups["default"].adapters for p in a.parameters()} == {dtype}


def test_loaded_tensors_are_aligned_as_torch_allocates(tmp_path) -> None:
    """The order of vectorised sums depends on the address, and with it the last bits of a resumed run."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 7))
    tt.attach(model, tt.DoRA(rank=3), targets=["0", "1"])
    tt.save(model, tmp_path / "a")
    tt.detach(model, "default")
    tt.load(model, tmp_path / "a", trainable=True)
    assert all(p.data_ptr() % 64 == 0 for p in tt.parameters(model))
