"""Reading what somebody else wrote: bounds that hold before anything is parsed, decompressed, opened or followed."""

from __future__ import annotations

import json
import os
import time
import zipfile
import zlib

import pytest
import torch
from safetensors.torch import save_file

import trimtab as tt
from trimtab.compat.safetensors_file import read_header
from trimtab.compat.tensor_files import read_tensors
from trimtab.core.reading import check_fields, check_finite, check_pattern, inflate, inside, parse_json, read_json

HOSTILE = {
    "deep": (b"[" * 200_000 + b"]" * 200_000, "nested deeper than 64"),
    "deep objects": (b'{"a":' * 3000 + b"1" + b"}" * 3000, "nested deeper than 64"),
    "unclosed": (b"[" * 3_000_000, "nested deeper than 64"),
    "digits": (b'{"r": ' + b"9" * 5000 + b"}", "a number of 5,000 digits"),
    "less digits": (b'{"r": ' + b"9" * 4000 + b"}", "a number of 4,000 digits"),
    "large float": (b'{"r": 1e400}', "beyond all floating-point numbers"),
    "not a number": (b'{"r": NaN}', "NaN where a number is needed"),
    "infinite": (b'{"r": -Infinity}', "-Infinity where a number is needed"),
    "twice": (b'{"r": 1, "r": 2}', "says 'r' twice"),
    "half a pair": (rb'{"r": "\ud800"}', "half a surrogate pair"),
    "values": (b"[" + b"0," * 4_000_001 + b"0]", "values"),
    "no text": (b'{"r": "\xff"}', "no text at byte 7"),
    "cut": (b'{"r": 1', "no JSON at byte 7"),
    "empty": (b"", "no JSON at byte 0"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_json_is_refused_in_a_sentence(name: str) -> None:
    raw, match = HOSTILE[name]
    began = time.monotonic()
    with pytest.raises(tt.CheckpointMismatch, match=match):
        parse_json(raw, "x.json")
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_is_no_damage(encoding: str, tmp_path) -> None:
    content = {"r": 8, "größe": [1.5, None, True], "max": 1000000000000000019884624838656, "pair": "\U0001f600"}
    (tmp_path / "x.json").write_bytes(json.dumps(content).encode(encoding))
    assert read_json(tmp_path / "x.json") == content


def test_what_models_write_on_purpose_is_read() -> None:
    found = parse_json(b'{"time_step_limit": [0.0, Infinity]}', "config.json", finite=False)
    assert found == {"time_step_limit": [0.0, float("inf")]}


@pytest.mark.parametrize("kind", ["pipe", "directory", "nothing", "null byte"])
def test_only_regular_files_are_opened(kind: str, tmp_path) -> None:
    """A pipe would be waited for for ever."""
    path = tmp_path / ("x\0.json" if kind == "null byte" else "x.safetensors")
    if kind == "pipe":
        os.mkfifo(path)
    if kind == "directory":
        path.mkdir()
    for read in (read_json, read_header, read_tensors):
        with pytest.raises(tt.CheckpointMismatch, match="cannot be read"):
            read(path)


def test_a_small_stream_that_becomes_large_is_stopped() -> None:
    small = zlib.compress(bytes(50_000_000), 9)
    with pytest.raises(tt.CheckpointMismatch, match="becomes more than 1,000"):
        inflate(small, "x", most=1000)
    whole = zlib.compress(b"abc")
    assert inflate(whole, "x") == b"abc"
    for bad, match in ((whole[:-1], "not the whole"), (whole + b"x", "not the whole"), (b"xx", "cannot be decompressed")):
        with pytest.raises(tt.CheckpointMismatch, match=match):
            inflate(bad, "x")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "..\\x", "C:\\x", "", None, 5, "a\0b"])
def test_no_name_leads_out_of_its_folder(name, tmp_path) -> None:
    with pytest.raises(tt.CheckpointMismatch, match="nothing outside of it is read"):
        inside(tmp_path, name, tmp_path / "index.json")


def test_a_name_inside_may_have_folders_and_links(tmp_path) -> None:
    assert inside(tmp_path, "unet/a..b.safetensors", tmp_path) == tmp_path / "unet" / "a..b.safetensors"


def test_values_and_types_are_told_all_at_once() -> None:
    with pytest.raises(tt.CheckpointMismatch, match="(?s)2 problems.*a in f holds NaN.*c in f holds NaN"):
        check_finite({"a": torch.tensor([1.0, float("nan")]), "b": torch.ones(2), "c": torch.tensor(float("-inf"))}, "f")
    with pytest.raises(tt.CheckpointMismatch, match="(?s)2 problems.*r='8', where an integer.*s=True, where a number"):
        check_fields({"r": "8", "s": True, "t": None, "u": 1}, {"r": int, "s": (int, float), "t": str, "u": (int, float)}, "f")


# -- files of tensors


@pytest.fixture
def pickled(tmp_path):
    torch.save({"a": torch.randn(300, 7), "b": torch.arange(5), "c": torch.randn(4).half()}, tmp_path / "x.bin")
    return tmp_path / "x.bin"


def test_every_flipped_byte_of_a_zip_is_noticed_or_changes_nothing(pickled) -> None:
    whole, good, refused = pickled.read_bytes(), read_tensors(pickled), 0
    for at in range(0, len(whole), 11):
        pickled.write_bytes(whole[:at] + bytes([whole[at] ^ 0x08]) + whole[at + 1 :])
        try:
            found = read_tensors(pickled)
        except tt.CheckpointMismatch:
            refused += 1
            continue
        assert found.keys() == good.keys() and all(torch.equal(found[k], good[k]) for k in good)
    assert refused > len(whole) / 11 * 0.8


def test_a_zip_that_becomes_large_is_refused(pickled, tmp_path) -> None:
    with zipfile.ZipFile(pickled) as old, zipfile.ZipFile(tmp_path / "y.bin", "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.namelist():
            new.writestr(entry, bytes(50_000_000) if entry.endswith("data/0") else old.read(entry))
    with pytest.raises(tt.CheckpointMismatch, match="is compressed"):
        read_tensors(tmp_path / "y.bin")


def test_tensors_that_claim_more_than_the_file_holds_are_refused(tmp_path) -> None:
    torch.save({"a": torch.zeros(1).expand(1 << 40)}, tmp_path / "x.bin")
    with pytest.raises(tt.CheckpointMismatch, match="its tensors claim 4,398,046,511,104"):
        read_tensors(tmp_path / "x.bin")


def test_files_of_old_torch_are_read_and_a_tensor_with_two_names_stays_one(tmp_path) -> None:
    a = torch.randn(8, 3)
    torch.save({"a": a, "b": a, "c": a.half()}, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    found = read_tensors(tmp_path / "x.bin")
    assert torch.equal(found["a"], a) and torch.equal(found["c"], a.half().float())
    torch.save({"a": [a]}, tmp_path / "x.bin")
    with pytest.raises(tt.CheckpointMismatch, match="no file of named tensors alone"):
        read_tensors(tmp_path / "x.bin")


def test_nothing_but_tensors_is_unpickled(tmp_path) -> None:
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    for zipped in (True, False):
        torch.save({"a": Harm()}, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
        with pytest.raises(tt.CheckpointMismatch, match="cannot be read"):
            read_tensors(tmp_path / "x.bin")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [1 << 62, 1 << 62]}, {"shape": [1] * 5000}, {"shape": [True, 6]}, {"shape": 6}, {"shape": ["2", 3]}, {"dtype": 5},
        {"dtype": None}, {"data_offsets": [0, 24.0]}, {"data_offsets": [0]}, {"data_offsets": [-24, 0]}, {"data_offsets": {}},
        {"shape": [0, 1 << 62, 4]}, {"shape": [2.0, 3]},
    ],
)  # fmt: skip
def test_odd_headers_are_refused(change, tmp_path) -> None:
    save_file({"a": torch.zeros(2, 3)}, tmp_path / "x.safetensors")
    whole = (tmp_path / "x.safetensors").read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    raw = json.dumps({"a": header["a"] | change}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + whole[8 + size :])
    with pytest.raises(tt.CheckpointMismatch, match="what no tensor has"):
        read_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(.*)*x", "(?:a|b*)*", "(", "[", "(?P<", "a{99999999999}", ".*" * 9 + "x", "(" * 3000]
)
def test_patterns_that_are_none_or_take_for_ever_are_refused(pattern) -> None:
    with pytest.raises(tt.CheckpointMismatch, match="no regular expression|take for ever"):
        check_pattern(pattern, "f")


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.(q_proj|v_proj)", "q_proj", r"model\.layers\.\d+\.self_attn\..*", r"^attn1\.to_k", "(.*\\.)?x",
        r"(?:.*?(?:vision|image).*?(?:attn|mlp).*?(?:q_proj|o_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:mlp)\.(?:(?:up_proj)))",
    ],
)  # fmt: skip
def test_patterns_that_people_write_are_fine(pattern) -> None:
    check_pattern(pattern, "f")
