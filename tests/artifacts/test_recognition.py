"""What lies at a path is recognised, or named in a sentence; a format's own options reach its reader."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import save_file
from test_diffusion_files import product
from test_foreign_files import Q, Unet, flat, kohya, low, update

import trimtab as tt
from trimtab.cli.inspect import command
from trimtab.core.checkpoint import inspect


@pytest.mark.parametrize("verb", ["load", "inspect", "convert", "command"])
@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("x.txt", b"hello", "starts with b'hello'"),
        ("x.gguf", b"GGUF\3\0\0\0", "it is a GGUF file"),
        ("x", b"", "it is empty"),
        ("manifest.json", b"{}", "is a part of an adapter"),
        ("adapter_config.json", b"{}", "is a part of an adapter"),
        ("x.safetensors", "tensors", "names are those of no adapter"),
        ("x.safetensors", b"\xff" * 20, "no safetensors file"),
        ("x.bin", b"\x80\x02}q\x00.", "cannot be read|no file of named tensors|no known adapter"),
        ("none", None, "does not exist"),
        ("folder", "folder", r"holds no trimtab adapter: there is no manifest.json \(found: nothing\)"),
        ("pipe", "pipe", "it is a pipe"),
        ("two", "two", "of several files of tensors, give the one that is meant"),
    ],
)  # fmt: skip
def test_what_is_no_adapter_is_named(verb, name, content, match, tmp_path) -> None:
    path = tmp_path / name
    if content == "tensors":
        save_file({"model.norm.weight": torch.ones(3)}, path)
    elif content in ("folder", "two"):
        path.mkdir()
        for part in ("a", "b") if content == "two" else ():
            save_file({"lora_unet_x.lora_up.weight": torch.ones(2, 2)}, path / f"{part}.safetensors")
    elif content == "pipe":
        os.mkfifo(path)
    elif content is not None:
        path.write_bytes(content)
    act = {
        "load": lambda: tt.load(Unet(), path), "inspect": lambda: inspect(path), "command": lambda: command(path),
        "convert": lambda: tt.convert(path, tmp_path / "o"),
    }  # fmt: skip
    with pytest.raises(tt.CheckpointMismatch, match=match):
        act[verb]()


def test_options_of_a_format_are_said_to_load_too(tmp_path) -> None:
    factors = low(12, 12, 2, 1.0)
    two = kohya(tmp_path, {flat(Q): factors, "lora_te_encoder_layers_0_q": factors})
    model = Unet()
    tt.load(model, two, part="lora_unet")
    torch.testing.assert_close(update(model, Q), product(factors, 0.5))
    with pytest.raises(tt.Unsupported, match="of the format kohya, of which prt cannot be said; nearest: part"):
        tt.load(Unet(), two, prt="lora_unet")
    tt.save(model, tmp_path / "own")
    with pytest.raises(tt.Unsupported, match="is trimtab's own; part cannot be said of it"):
        tt.load(Unet(), tmp_path / "own", part="lora_unet")


def test_the_command_says_the_options_of_both_formats(tmp_path) -> None:
    from safetensors.torch import load_file

    from trimtab.cli.convert import command as convert

    factors = low(12, 12, 2, 1.0)
    two = kohya(tmp_path, {flat(Q): factors, "lora_te_encoder_layers_0_q": factors})
    model = Unet()
    tt.load(model, two, part="lora_unet")
    tt.save(model, tmp_path / "own")
    convert(tmp_path / "own", tmp_path / "d", to="diffusers", component="unet")
    stored = load_file(tmp_path / "d" / "pytorch_lora_weights.safetensors")
    up, down = stored[f"unet.{Q}.lora_B.weight"], stored[f"unet.{Q}.lora_A.weight"]
    torch.testing.assert_close(up @ down, product(factors, 0.5))
    convert(tmp_path / "own", tmp_path / "p", to="peft", base_name="org/base")
    assert '"org/base"' in (tmp_path / "p" / "adapter_config.json").read_text()
