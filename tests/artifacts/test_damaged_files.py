"""Damaged and hostile files, for every reader: a sentence or the same weights; no raw error, no hang, little memory."""

from __future__ import annotations

import random
import shutil
import signal
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import trimtab as tt
from artifacts.damage import damage
from artifacts.readers import READERS

SECONDS = 20  # of one reading
CONSTANT = 128 << 20  # bytes of memory beside twice the file


@contextmanager
def limited(what: str) -> Iterator[None]:
    """Fail if the block takes too long."""

    def late(*_: object) -> None:
        raise AssertionError(f"{what}: took more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def resident(kind: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) * 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def copy_of(source: Path, target: Path) -> Path:
    (shutil.copytree if source.is_dir() else shutil.copyfile)(source, target)
    return target


def size_of(path: Path) -> int:
    return sum(p.lstat().st_size for p in path.rglob("*")) if path.is_dir() else path.lstat().st_size


def attack(name: str, count: int, tmp_path: Path, *, seed: int = 0) -> tuple[Counter, list[str]]:
    """What became of ``count`` damaged copies, and what should not have."""
    reader = READERS[name]
    (tmp_path / "good").mkdir()
    good = reader.write(tmp_path / "good")
    expected = reader.read(good)
    assert expected and all(torch.isfinite(value).all() for value in expected.values())
    outcomes: Counter = Counter()
    wrong: list[str] = []
    for number in range(count):
        target = copy_of(good, tmp_path / f"bad{good.suffix}")
        what, resealed = damage(target, random.Random(f"{name} {seed} {number}"), reseal=reader.reseal)
        what = f"{name} {seed} {number}: {what}"
        size = size_of(target) if target.exists() else 0
        reset_peak()
        before = resident("VmRSS")
        try:
            with limited(what):
                found = reader.read(target)
        except tt.TrimtabError as error:
            outcomes[type(error).__name__] += 1
            if not str(error).strip():
                wrong.append(f"{what}: an error without a word")
        except AssertionError as error:
            wrong.append(str(error))
        except BaseException as error:
            frames = traceback.extract_tb(error.__traceback__)
            at = [f"{Path(f.filename).name}:{f.lineno}" for f in frames if "trimtab" in f.filename]
            wrong.append(f"{what}: {type(error).__name__}: {str(error)[:150]} at {' '.join(at[-3:])}")
        else:
            outcomes["read"] += 1
            if not all(torch.isfinite(value).all() for value in found.values()):
                wrong.append(f"{what}: values that are not finite were read")
            same = found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in expected)
            if reader.sealed and not resealed and not same:
                wrong.append(f"{what}: other weights were read, and nobody noticed")
        grown = resident("VmHWM") - before
        if grown > 2 * size + CONSTANT:
            wrong.append(f"{what}: {grown:,} bytes of memory for a file of {size:,}")
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)
    return outcomes, wrong


@pytest.mark.parametrize("name", READERS)
def test_damage_is_told_in_a_sentence(name: str, tmp_path: Path) -> None:
    outcomes, wrong = attack(name, 40, tmp_path)
    assert not wrong, f"{len(wrong)} of 40, {dict(outcomes)}:\n" + "\n".join(wrong[:20])
    assert sum(count for kind, count in outcomes.items() if kind != "read") > 10


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_three_thousand_damaged_files_a_reader(name: str, tmp_path: Path) -> None:
    outcomes, wrong = attack(name, 3000, tmp_path, seed=1)
    assert not wrong, f"{len(wrong)} of 3000, {dict(outcomes)}:\n" + "\n".join(wrong[:40])
