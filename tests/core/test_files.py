"""Writing: whole or not at all, one writer at a time, and nothing left of those who were killed."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

import trimtab.core.files as files
from trimtab.core.errors import Busy
from trimtab.core.files import exchange, locked, stage_of, staged, sweep


def process(code: str, *arguments: Path) -> subprocess.Popen:
    """A Python process that runs ``code`` with ``arguments`` and is waited for until it says that it is ready."""
    lead = "import sys, time\nfrom pathlib import Path\nfrom trimtab.core.files import *\npath = Path(sys.argv[1])\n"
    command = [sys.executable, "-c", lead + code, *map(str, arguments)]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert started.stdout.readline() == "ready\n"
    return started


def kill(started: subprocess.Popen) -> None:
    started.kill()
    started.wait()
    started.stdout.close()


def names(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


HOLD = "with locked(path, 'works in'):\n    print('ready', flush=True)\n    time.sleep(60)\n"
WRITE = "with staged(path, folder={}) as stage:\n    print('ready', flush=True)\n    time.sleep(60)\n"


def test_a_second_holder_is_refused_and_a_killed_one_lets_go(tmp_path: Path):
    first = process(HOLD, tmp_path / "made" / "run")
    message = rf"another process \(process {first.pid} on .*\) works in .*run"
    with pytest.raises(Busy, match=message), locked(tmp_path / "made" / "run", "works in"):
        pass
    kill(first)
    with locked(tmp_path / "made" / "run", "works in"), pytest.raises(Busy), locked(tmp_path / "made" / "run", "works in"):
        pass  # nor may a second thread of one process
    assert names(tmp_path / "made") == []


def test_nothing_is_left_of_a_lock_nor_of_folders_made_for_it(tmp_path: Path):
    with locked(tmp_path / "a" / "b" / "run", "works in"):
        assert names(tmp_path / "a" / "b") == [".run.lock"]
    assert names(tmp_path) == []


@pytest.mark.parametrize("folder", [True, False])
def test_what_a_killed_writer_left_is_swept_by_the_next_and_a_living_ones_is_not(tmp_path: Path, folder: bool):
    path = tmp_path / "out"
    first, second = (process(WRITE.format(folder), path) for _ in range(2))
    assert len(names(tmp_path)) == 2
    kill(first)
    with staged(path, folder=folder) as stage:
        assert len(names(tmp_path)) == 2  # this one's and the living one's
        (stage / "x" if folder else stage).write_text("new")
    assert (path / "x" if folder else path).read_text() == "new"
    kill(second)
    sweep(path)
    assert names(tmp_path) == ["out"]


def test_what_merely_looks_alike_is_left_alone(tmp_path: Path):
    for name in (".out.part", ".out.old", ".out.notes.part", ".other.0123abcd.part", "out.0123abcd.part"):
        (tmp_path / name).write_text("mine")
    with staged(tmp_path / "out", folder=False) as stage:
        stage.write_text("new")
    assert len(names(tmp_path)) == 6


@pytest.mark.parametrize("swaps", [True, False])
def test_a_folder_is_replaced_whole_and_an_error_leaves_the_old_one(tmp_path: Path, swaps: bool, monkeypatch: pytest.MonkeyPatch):
    if not swaps:
        monkeypatch.setattr(files, "exchange", lambda one, other: False)
    path = tmp_path / "out"
    for content in ("old", "new"):
        with staged(path, folder=True) as stage:
            (stage / content).write_text(content)
    assert names(path) == ["new"]
    with pytest.raises(KeyError), staged(path, folder=True) as stage:
        (stage / "half").write_text("half")
        raise KeyError
    assert names(path) == ["new"] and names(tmp_path) == ["out"]


def test_a_folder_that_was_moved_aside_comes_back(tmp_path: Path):
    path = tmp_path / "out"
    aside = stage_of(path, "old")  # where exchange is not to be had, a kill between the two renames leaves this
    aside.mkdir()
    (aside / "x").write_text("all I have")
    sweep(path)
    assert (path / "x").read_text() == "all I have" and names(tmp_path) == ["out"]


def test_a_reader_always_finds_a_whole_folder(tmp_path: Path):
    if not exchange(*(Path(tmp_path / name) for name in ("a", "b") if (tmp_path / name).mkdir() is None)):
        pytest.skip("this file system cannot let two folders change names at once")
    path, missing, over = tmp_path / "out", [], threading.Event()

    def read() -> None:
        while not over.is_set():
            if not (path / "x").exists():
                missing.append(1)

    with staged(path, folder=True) as stage:
        (stage / "x").write_text("0")
    reader = threading.Thread(target=read)
    reader.start()
    for i in range(200):
        with staged(path, folder=True) as stage:
            (stage / "x").write_text(str(i))
    over.set()
    reader.join()
    assert not missing and (path / "x").read_text() == "199"


@pytest.mark.slow
def test_many_writers_at_once_lose_nothing(tmp_path: Path):
    code = (
        "print('ready', flush=True)\n"
        "for i in range(60):\n"
        "    with staged(path, folder=True) as stage:\n"
        "        (stage / 'x').write_text(str(i) * 1000)\n"
        "    assert len((path / 'x').read_text()) in (1000, 2000)\n"
    )
    writers = [process(code, tmp_path / "out") for _ in range(4)]
    assert [writer.wait() for writer in writers] == [0] * 4
    for writer in writers:
        writer.stdout.close()
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["x"]
