"""Compressed files: damage is told by name and byte, an interrupted job continues, and nothing is half written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import trimtab as tt
from artifacts.pairs import adapter, write_pair
from core.small_net import IDS, net
from trimtab.artifacts import compress as compressing
from trimtab.artifacts import packed as packing
from trimtab.artifacts.coding import CODINGS
from trimtab.artifacts.expand import exchange
from trimtab.artifacts.packed import Packed, frames_of


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of several frames."""
    monkeypatch.setattr(packing, "ENTRIES", 100)
    adapter(tmp_path / "a")
    tt.compress(tmp_path / "a", tmp_path / "c.tern", density=0.2, keep=["layers.0.up_proj"])
    return tmp_path / "c.tern"


@pytest.mark.parametrize("coding", CODINGS)
def test_large_tensors_are_cut_at_rows_into_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, coding: str) -> None:
    rng = torch.Generator().manual_seed(0)
    shapes = {"a": (7, 30), "b": (250,), "c": (3, 4, 5), "d": (2, 300), "e": (0, 3), "f": (1,), "g": ()}
    tuned, base = write_pair(tmp_path, {key: torch.randn(shape, generator=rng) for key, shape in shapes.items()})
    whole = tt.compress(tuned, tmp_path / "whole.tern", density=0.3, reference=base, coding=coding)
    out = tt.expand(whole.path, tmp_path / "x", reference=base) / "base.safetensors"
    monkeypatch.setattr(packing, "ENTRIES", 100)
    cut = tt.compress(tuned, tmp_path / "cut.tern", density=0.3, reference=base, coding=coding)
    frames = Packed(cut.path).frames
    entries = Packed(cut.path).entries
    sizes = [sum(rows * columns for rows, columns in frame.shapes(entries)) for frame in frames]
    assert len(Packed(whole.path).frames) == len(frames) or len(frames) > 5
    assert max(sizes) <= 100 and sum(sizes) == sum(torch.Size(shape).numel() for shape in shapes.values())
    assert (tt.expand(cut.path, tmp_path / "y", reference=base) / "base.safetensors").read_bytes() == out.read_bytes()


def test_every_flipped_byte_is_refused_and_named(packed: Path) -> None:
    whole = packed.read_bytes()
    model = net()
    where = set()
    for at in range(0, len(whole), 7):
        packed.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        with pytest.raises(tt.CheckpointMismatch, match=r"c\.tern.* byte \d+") as caught:
            tt.load(model, packed)
        where.add("frame of" in str(caught.value))
    assert where == {True, False}  # the tensors of a damaged frame are named
    assert "_trimtab_state" not in model.__dict__


def test_every_truncation_is_refused(packed: Path) -> None:
    whole = packed.read_bytes()
    for size in [*range(0, len(whole), 11), len(whole) - 1]:
        packed.write_bytes(whole[:size])
        with pytest.raises(tt.CheckpointMismatch, match=r"byte \d+"):
            tt.load(net(), packed)
    packed.write_bytes(whole + b"x")
    with pytest.raises(tt.CheckpointMismatch, match=f"byte {len(whole)}: there are 1 bytes behind its end"):
        tt.load(net(), packed)


def test_frames_in_another_order_are_refused(packed: Path) -> None:
    whole, spans = packed.read_bytes(), []
    opened = Packed(packed)
    offsets = [offset for _, _, offset in opened.payloads()]
    spans = [whole[a:b] for a, b in zip(offsets, [*offsets[1:], len(whole) - packing.FRAME.size - 20 - 4], strict=True)]
    assert len(spans) > 3 and b"".join(spans) in whole
    spans[-1], spans[-2] = spans[-2], spans[-1]
    packed.write_bytes(whole[: offsets[0]] + b"".join(spans) + whole[offsets[0] + sum(map(len, spans)) :])
    with pytest.raises(tt.CheckpointMismatch, match="byte"):
        tt.load(net(), packed)


def test_foreign_and_later_files_are_refused(tmp_path: Path, packed: Path) -> None:
    foreign = tmp_path / "foreign.tern"
    foreign.write_bytes(b"PK\3\4 something else")
    for read in (Packed, lambda path: tt.load(net(), path), lambda path: tt.expand(path, tmp_path / "out")):
        with pytest.raises(tt.CheckpointMismatch, match=r"no compressed update: it starts with b'PK.* at byte 0"):
            read(foreign)
    with pytest.raises(tt.CheckpointMismatch, match="there is no compressed update"):
        tt.expand(tmp_path / "nothing.tern", tmp_path / "out")
    later = packed.read_bytes()
    packed.write_bytes(later[:8] + (99).to_bytes(4, "little") + later[12:])
    with pytest.raises(tt.CheckpointMismatch, match="version 99 at byte 8.*upgrade"):
        tt.load(net(), packed)
    with pytest.raises(tt.Unsupported, match="lose digits silently"):
        model = net()
        tt.attach(model, tt.LoRA(rank=2))
        tt.save(model, tmp_path / "x.tern", format="packed")


def test_an_interrupted_job_continues_to_the_same_bytes(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, source = packed.read_bytes(), packed.parent / "a"
    packed.unlink()
    real, made = compressing._frame, []
    count = len(frames_of(Packed_entries(whole, packed.parent)))

    def stops(*args: object) -> tuple[bytes, bytes]:
        made.append(args[3])
        if len(made) == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(compressing, "_frame", stops)
    options = {"density": 0.2, "keep": ["layers.0.up_proj"]}
    with pytest.raises(KeyboardInterrupt):
        tt.compress(source, packed, **options)
    assert not packed.exists() and (packed.parent / ".c.tern.part").exists()
    with open(packed.parent / ".c.tern.part", "ab") as stream:
        stream.write(b"half a frame")  # what a kill in the middle of a write leaves
    tt.compress(source, packed, **options)
    assert packed.read_bytes() == whole and len(made) == 4 + count - 3  # three frames were there already
    assert not (packed.parent / ".c.tern.part").exists()


def Packed_entries(whole: bytes, folder: Path) -> list:
    (folder / "copy.tern").write_bytes(whole)
    return Packed(folder / "copy.tern").entries


def test_another_job_does_not_continue_it_and_an_error_leaves_nothing(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, before = packed.parent / "a", packed.read_bytes()
    real, made = compressing._frame, []

    def fails(*args: object) -> tuple[bytes, bytes]:
        made.append(1)
        if len(made) == 3:
            raise (KeyboardInterrupt if stop else ValueError)
        return real(*args)

    monkeypatch.setattr(compressing, "_frame", fails)
    stop = False
    with pytest.raises(ValueError):
        tt.compress(source, packed, density=0.3)
    assert packed.read_bytes() == before and not list(packed.parent.glob(".*part"))
    stop = True
    made.clear()
    with pytest.raises(KeyboardInterrupt):
        tt.compress(source, packed, density=0.3)
    assert packed.read_bytes() == before
    monkeypatch.setattr(compressing, "_frame", real)
    tt.compress(source, packed, density=0.2, keep=["layers.0.up_proj"])
    assert packed.read_bytes() == before


def test_an_interrupted_expansion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned, base = write_pair(tmp_path / "p", {"w": torch.randn(40, generator=torch.Generator().manual_seed(0))})
    tt.compress(tuned, tmp_path / "c.tern", reference=base)
    from trimtab.artifacts import expand as expanding

    monkeypatch.setattr(expanding, "save_file", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        tt.expand(tmp_path / "c.tern", tmp_path / "out", reference=base)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.tern", "p"]


def test_values_are_exchanged_in_place(packed: Path, tmp_path: Path) -> None:
    adapter(tmp_path / "other", moved=8)
    tt.compress(tmp_path / "other", tmp_path / "o.tern", density=0.2)
    model, one, two = net(), net(), net()
    name = tt.load(model, packed)
    tt.load(one, packed)
    tt.load(two, tmp_path / "o.tern")
    before = [id(p) for p in model.parameters()]
    exchange(model, tmp_path / "o.tern", name=name)
    assert torch.equal(model(IDS), two(IDS)) and [id(p) for p in model.parameters()] == before
    exchange(model, packed, name=name)
    assert torch.equal(model(IDS), one(IDS)) and not torch.equal(one(IDS), two(IDS))
    adapter(tmp_path / "wide", tt.LoRA(rank=3))
    tt.compress(tmp_path / "wide", tmp_path / "w.tern")
    with pytest.raises(tt.ShapeMismatch, match=r"\(2, 16\) attached and \(3, 16\)"):
        exchange(model, tmp_path / "w.tern", name=name)
    assert torch.equal(model(IDS), one(IDS))


def test_compressed_adapters_are_merged_like_folders(packed: Path, tmp_path: Path) -> None:
    tt.expand(packed, tmp_path / "folder")
    for name, source in (("x", packed), ("y", tmp_path / "folder")):
        tt.combine([source, tmp_path / "a"], tmp_path / name, weights=[0.5, 0.5])
    one, two = net(), net()
    tt.load(one, tmp_path / "x")
    tt.load(two, tmp_path / "y")
    assert torch.equal(one(IDS), two(IDS))


def test_a_file_costs_little_beside_its_symbols(tmp_path: Path) -> None:
    """Header, seals and counts of a small adapter of 26,000 numbers."""
    model = net(width=64, depth=4)
    tt.attach(model, tt.LoRA(rank=4))
    with torch.no_grad():
        for value in tt.parameters(model):
            value.add_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(value.numel())))
    tt.save(model, tmp_path / "a")
    report = tt.compress(tmp_path / "a", tmp_path / "c.tern", density=0.1)
    assert report.bits <= 1.01 * report.bound
    assert report.bytes - report.bits * report.entries / 8 < 1500
    assert report.ratio == 2 * report.parameters / report.path.stat().st_size
