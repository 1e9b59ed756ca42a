"""Tensors of every dtype in a base that is merged into on disk."""

from __future__ import annotations

import json

import pytest
from bases import make, save
from saved_adapters import adapter

import trimtab as tt

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("dtype", ["F8_E8M0", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F4", "F6_E2M3", "C64", "U16", "X7"])
def test_a_tensor_of_any_dtype_beside_those_that_change_is_copied(dtype, tmp_path) -> None:
    """Scales of block-quantised layers, packed four-bit weights, and what safetensors may learn to hold: by their bytes."""
    base = save(make("llama"), tmp_path / "base", shard="10MB")
    file = base / "model.safetensors"
    saved = adapter(tmp_path / "a", tt.LoRA(rank=2), 1, "attn.q", model=make("llama"))
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    bits = {"F4": 4, "F6_E2M3": 6, "C64": 64, "U16": 16, "X7": 7}.get(dtype, 8)
    added = bytes(i % 251 for i in range(8 * bits))  # 64 entries
    header["model.extra_scale"] = {"dtype": dtype, "shape": [8, 8], "data_offsets": [len(body), len(body) + len(added)]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + body + added)
    tt.merge_checkpoint(saved, base, out=tmp_path / "out")
    new = (tmp_path / "out" / "model.safetensors").read_bytes()
    length = int.from_bytes(new[:8], "little")
    entry = json.loads(new[8 : 8 + length])["model.extra_scale"]
    begin, end = entry["data_offsets"]
    assert new[8 + length + begin : 8 + length + end] == added and entry["dtype"] == dtype and entry["shape"] == [8, 8]
