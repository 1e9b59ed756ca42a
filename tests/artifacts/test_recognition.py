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
    ],
)  # fmt: skip
def test_what_is_no_adapter_is_named(verb, name, content, match, tmp_path) -> None:
    path = tmp_path / name
    if content == "tensors":
        save_file({"model.norm.weight": torch.ones(3)}, path)
    elif content == "folder":
        path.mkdir()
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
