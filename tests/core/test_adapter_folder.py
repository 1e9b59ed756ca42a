"""Saving to a folder: nothing lost by kills, by other writers, or by a full disk; nothing of anybody else's removed."""

from __future__ import annotations

import errno
import itertools
import json
import multiprocessing
import os
import random
from pathlib import Path

import pytest
import torch
from small_net import IDS, net, shake

import trimtab as tt
from killed import deaths, killed_after, moments
from trimtab.core import files, folders
from trimtab.core.adapter_folder import seal_of

FORMATS = ("trimtab", "peft")
#: what a folder of one adapter holds
KINDS = {"trimtab": {"manifest.json", "adapter-*.safetensors"}, "peft": {"adapter_config.json", "adapter_model.safetensors"}}


def adapted(seed: int, rank: int = 2):
    model = net()
    tt.attach(model, tt.LoRA(rank=rank), name="default")
    torch.manual_seed(seed)
    shake(model)
    return model


def output(path: Path) -> torch.Tensor:
    model = net()
    tt.load(model, path)
    return model(IDS).detach()


def names(folder: Path) -> set[str]:
    return {"adapter-*.safetensors" if n.startswith("adapter-") else n for n in os.listdir(folder)}


@pytest.fixture(params=FORMATS)
def pair(request, tmp_path):
    """A format, a folder with the first of two adapters, both models, and what they put out."""
    models = [adapted(0), adapted(1, rank=3)]
    for i, model in enumerate(models):
        tt.save(model, tmp_path / f"only-{i}", format=request.param)
    return (
        request.param,
        tt.save(models[0], tmp_path / "a", format=request.param),
        models,
        [output(tmp_path / f"only-{i}") for i in (0, 1)],
    )


@pytest.mark.parametrize("way", ["exchange", "two renames"])
def test_a_save_that_dies_anywhere_leaves_the_old_or_the_new_and_the_next_one_cleans_up(way, pair, tmp_path, monkeypatch) -> None:
    format, folder, models, wanted = pair
    if way == "two renames":  # as on systems that cannot exchange two names
        if format == "trimtab":
            pytest.skip("its folder keeps its name")
        monkeypatch.setattr(folders, "exchange", lambda one, other: False)
    (folder / "notes.txt").write_text("mine")
    (folder / "more").mkdir()
    (folder / "more" / "x").write_text("mine too")
    for number in deaths(lambda: tt.save(models[1], folder, format=format)):
        if way == "exchange":
            assert folder.is_dir(), number
        assert any(torch.equal(output(folder), each) for each in wanted), number
        tt.save(models[0], folder, format=format)
        assert torch.equal(output(folder), wanted[0])
        assert names(folder) == KINDS[format] | {"notes.txt", "more"} and (folder / "more" / "x").read_text() == "mine too"
        assert sorted(os.listdir(tmp_path)) == ["a", "only-0", "only-1"], number
    assert number > 8 and torch.equal(output(folder), wanted[1])


def test_the_first_save_that_dies_leaves_nothing_or_all_of_it(pair, tmp_path) -> None:
    format, _, models, wanted = pair
    folder = tmp_path / "new" / "b"
    for _number in deaths(lambda: tt.save(models[1], folder, format=format)):
        if (folder / "manifest.json").exists() or (folder / "adapter_config.json").exists():
            assert torch.equal(output(folder), wanted[1])
    assert names(folder) == KINDS[format] and os.listdir(folder.parent) == ["b"]


def test_files_of_others_stay_whatever_their_names(pair) -> None:
    format, folder, models, wanted = pair
    foreign = [
        "adapter-mine.safetensors",
        "adapter-0123456789ab.safetensors",
        "adapter_model.bin.txt",
        ".hidden.part",
        "x.old",
        "y.tmp",
    ]
    for name in foreign:
        (folder / name).write_text(name)
    for i in (1, 0, 0, 1):
        tt.save(models[i], folder, format=format)
    assert all((folder / name).read_text() == name for name in foreign)
    for name in foreign:  # a reader of peft's form refuses tensors beside the adapter, which may belong to it
        (folder / name).unlink()
    assert torch.equal(output(folder), wanted[1])


def test_a_manifest_that_lies_removes_nothing(tmp_path) -> None:
    """Only what a save has named is removed: an unsealed manifest, or one that names another sort of file, is no save's."""
    model = adapted(0)
    tt.save(model, tmp_path / "a")
    keep = tmp_path / "a" / "adapter-ffffffffffff.safetensors"
    keep.write_text("mine")
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    for name in (keep.name, "../b.txt"):
        (tmp_path / "a" / "manifest.json").write_text(json.dumps(manifest | {"file": name}))
        (tmp_path / "b.txt").write_text("mine")
        tt.save(model, tmp_path / "a")
        assert keep.read_text() == "mine" and (tmp_path / "b.txt").read_text() == "mine"


def test_the_same_adapter_gives_the_same_bytes(pair, tmp_path) -> None:
    format, _, models, _ = pair
    for i in range(6):
        tt.save(models[0], tmp_path / f"s{i}", format=format)
    for name in os.listdir(tmp_path / "s0"):
        assert len({(tmp_path / f"s{i}" / name).read_bytes() for i in range(6)}) == 1, name


# -- several writers


def _save_often(models, folder: Path, format: str, times: int, start) -> None:
    start.wait()
    for i in range(times):
        tt.save(models[i % 2], folder, format=format)


def _together(models, folder: Path, format: str, processes: int, times: int) -> None:
    context = multiprocessing.get_context("fork")
    start = context.Barrier(processes)
    crowd = [
        context.Process(target=_save_often, args=(models[:: 1 - 2 * (i % 2)], folder, format, times, start))
        for i in range(processes)
    ]
    for process in crowd:
        process.start()
    seen = 0
    while any(process.is_alive() for process in crowd):
        if (folder / "manifest.json").exists() or (folder / "adapter_config.json").exists():
            output(folder)  # whole at every moment
            seen += 1
    for process in crowd:
        process.join()
        assert process.exitcode == 0
    assert seen


@pytest.mark.parametrize("times", [2, pytest.param(25, marks=pytest.mark.slow)])
def test_writers_at_the_same_time_come_one_after_the_other(times, pair, tmp_path) -> None:
    """4 processes that save 2 or 25 times each, while this one reads."""
    format, folder, models, wanted = pair
    _together(models, folder, format, 4, times)
    assert any(torch.equal(output(folder), each) for each in wanted)
    assert names(folder) == KINDS[format] and sorted(os.listdir(tmp_path)) == ["a", "only-0", "only-1"]


@pytest.mark.slow
def test_a_hundred_processes_save_to_one_folder(pair, tmp_path) -> None:
    format, _, models, wanted = pair
    _together(models, tmp_path / "new", format, 100, 1)
    assert any(torch.equal(output(tmp_path / "new"), each) for each in wanted) and names(tmp_path / "new") == KINDS[format]


@pytest.mark.slow
def test_forty_kills_lose_nothing(pair, tmp_path) -> None:
    format, folder, models, wanted = pair

    def work() -> None:
        for i in itertools.count():
            tt.save(models[i % 2], folder, format=format)

    for moment in moments(40):
        killed_after(moment, work)
        assert any(torch.equal(output(folder), each) for each in wanted)
    tt.save(models[0], folder, format=format)
    assert names(folder) == KINDS[format] and sorted(os.listdir(tmp_path)) == ["a", "only-0", "only-1"]


# -- what stands against it


def test_a_full_disk_is_a_sentence_and_the_old_adapter_stays(pair, monkeypatch, tmp_path) -> None:
    format, folder, models, wanted = pair
    def full(tensors, path, metadata=None):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(folders, "save_file", full)
    with pytest.raises(tt.WriteError, match=r"a cannot be written: No space left on device; what was there is left as it was"):
        tt.save(models[1], folder, format=format)
    assert torch.equal(output(folder), wanted[0]) and names(folder) == KINDS[format]
    assert sorted(os.listdir(tmp_path)) == ["a", "only-0", "only-1"]


def test_a_file_in_the_way_and_a_device_are_sentences(pair, tmp_path) -> None:
    format, _, models, _ = pair
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/x/a")):
        with pytest.raises(tt.WriteError, match="cannot be written"):
            tt.save(models[0], path, format=format)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder_is_a_sentence(pair, tmp_path) -> None:
    format, folder, models, wanted = pair
    folder.chmod(0o500)
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(tt.WriteError, match="cannot be written: Permission denied"):
            tt.save(models[1], folder, format=format)
        assert torch.equal(output(folder), wanted[0])
    finally:
        tmp_path.chmod(0o700)


def test_a_busy_folder_is_waited_for_and_then_said(tmp_path, monkeypatch) -> None:
    with files.locked(tmp_path / "a", "saves"), pytest.raises(tt.TrimtabError, match="another process .*saves"):
        with folders.waiting(tmp_path / "a", "saves", patience=0.05):
            raise AssertionError


# -- manifests that were sealed with odd entries

ODD = (None, True, 5, -1, 2**70, 1.5, "x", "", [], [1, "a"], {}, {"a": {}}, [[]], "../../x", "\ud800", float("inf"))


def leaves(value, path=()):
    """Every place in a JSON value."""
    yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in list(entries)[:4]:
        yield from leaves(below, (*path, key))


@pytest.mark.parametrize("count", [250, pytest.param(3200, marks=pytest.mark.slow)])
def test_odd_entries_are_refused_in_words_and_leave_the_model_alone(count, tmp_path) -> None:
    model = net()
    tt.attach(model, tt.LoRA(rank=2), name="default")
    tt.attach(model, tt.BitFit(), targets="mlp.down", name="default")
    tt.save(model, tmp_path / "a")
    file = tmp_path / "a" / "manifest.json"
    manifest = json.loads(file.read_text())
    places = [path for path in leaves(manifest) if path and path[0] != "seal"]
    draw = random.Random(0)
    fresh = net()
    before, keys = fresh(IDS), list(fresh.state_dict())
    for _ in range(count):
        changed = json.loads(json.dumps(manifest))
        *way, last = draw.choice(places)
        there = changed
        for key in way:
            there = there[key]
        if draw.random() < 0.1:
            del there[last]
        else:
            there[last] = draw.choice(ODD)
        file.write_text(json.dumps(changed | {"seal": seal_of(changed)}))
        try:
            name = tt.load(fresh, tmp_path / "a", trainable=True)
        except tt.TrimtabError as error:
            assert str(error)
        else:  # it says something else that is right, such as another role
            tt.detach(fresh, name)
        assert list(fresh.state_dict()) == keys and "_trimtab_state" not in fresh.__dict__
        assert all(parameter.requires_grad for parameter in fresh.parameters())
    assert torch.equal(fresh(IDS), before)


def test_a_load_that_fails_while_mounting_leaves_the_model_as_it_was(saved, monkeypatch) -> None:
    from trimtab.core import attach

    model, calls, real = net(), [], attach.mount

    def mount(*args):
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("in the middle")
        return real(*args)

    monkeypatch.setattr(attach, "mount", mount)
    with pytest.raises(RuntimeError, match="in the middle"):
        tt.load(model, saved, trainable=True)
    assert list(model.state_dict()) == list(net().state_dict()) and "_trimtab_state" not in model.__dict__
    assert all(parameter.requires_grad for parameter in model.parameters())
