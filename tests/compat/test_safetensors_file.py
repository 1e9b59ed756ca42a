"""safetensors files: read as the safetensors package reads them, written so that it reads them, refused by name and byte."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import trimtab as tt
from trimtab.compat.safetensors_file import DTYPES, dtype_name, read_header, read_tensor, write_file

VALUES = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3), "b": torch.randn(3, 4).bfloat16(), "none": torch.zeros(0, 5),
    "one": torch.tensor(3), "bytes": torch.arange(7, dtype=torch.uint8), "half": torch.randn(5).half(),
}  # fmt: skip


@pytest.fixture
def file(tmp_path):
    save_file(VALUES, tmp_path / "x.safetensors", metadata={"format": "pt"})
    return tmp_path / "x.safetensors"


def test_reads_what_the_package_wrote_and_the_other_way_round(file, tmp_path) -> None:
    header = read_header(file)
    assert set(header.entries) == set(VALUES) and header.metadata == {"format": "pt"}
    assert all(torch.equal(read_tensor(header, name), value) for name, value in VALUES.items())
    new = {"a": torch.full((2, 3), 7.0)}
    out = tmp_path / "y.safetensors"
    entries = [(e.name, e.dtype, e.shape) for e in header.entries.values()]
    write_file(out, entries, lambda name: new.get(name, (header, name)), metadata=header.metadata)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    found = load_file(out)
    assert all(torch.equal(found[name], new.get(name, value)) for name, value in VALUES.items()) and set(found) == set(VALUES)
    assert safe_open(out, "pt").metadata() == {"format": "pt"}
    assert {dtype_name(d) for d in DTYPES.values()} == set(DTYPES)
    with pytest.raises(tt.CheckpointMismatch, match="is torch.float64 .* where"):
        write_file(out, entries, lambda name: VALUES[name].double(), metadata={})


@pytest.mark.parametrize("size", [0, 5, 8, 100, -1])
def test_a_truncated_file_names_the_byte(file, size) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[:size])
    with pytest.raises(tt.CheckpointMismatch, match=rf"x\.safetensors .*byte {len(whole[:size])}"):
        read_header(file)


def change(file, edit) -> None:
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    content = json.loads(whole[8 : 8 + length])
    edit(content)
    raw = json.dumps(content).encode()
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + whole[8 + length :])


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda c: c["a"].update(shape=[2, 4]), r"'a' is F32 of shape \[2, 4\], 32 bytes, and has 24"),
        (lambda c: c["a"].update(data_offsets=[3, 1]), "what no tensor has"),
        (lambda c: c["a"].pop("dtype"), "what no tensor has"),
        (lambda c: c.pop("a"), r"damaged at byte \d+: .* should begin there"),
        (lambda c: c.pop("bytes"), "damaged"),
    ],
)  # fmt: skip
def test_a_damaged_header_is_refused(file, edit, match) -> None:
    change(file, edit)
    with pytest.raises(tt.CheckpointMismatch, match=match):
        read_header(file)


def test_foreign_files_are_refused(file, tmp_path) -> None:
    torch.save(VALUES, tmp_path / "p.safetensors")
    with pytest.raises(tt.CheckpointMismatch, match="no safetensors file: the header's length at byte 0"):
        read_header(tmp_path / "p.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:20] + b"\x00" + whole[21:])
    with pytest.raises(tt.CheckpointMismatch, match=r"no JSON at byte \d+"):
        read_header(file)
    file.write_bytes(whole + b"x")
    with pytest.raises(tt.CheckpointMismatch, match=f"tensors end at byte {len(whole)}, the file at byte {len(whole) + 1}"):
        read_header(file)
    with pytest.raises(tt.CheckpointMismatch, match="No such file"):
        read_header(tmp_path / "nothing")
