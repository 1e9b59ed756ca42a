"""Folders that hold an artifact: one writer at a time, old or new at every moment, and nothing of anybody else's lost."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from trimtab.core.errors import Busy, WriteError
from trimtab.core.files import _begun, exchange, locked, stage_of, sweep, sync

__all__ = ["recover", "renewed", "waiting", "writing"]

PATIENCE = 600.0  # seconds that a writer waits for another one


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say in a sentence what stands against writing to ``path``: a full disk, a read-only folder, a file in the way.

    Raises:
        WriteError: in the place of what the system, or safetensors, raised.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, WriteError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise WriteError(f"{path} cannot be written: {reason}; what was there is left as it was") from error


@contextmanager
def waiting(target: Path, doing: str, *, patience: float = PATIENCE) -> Iterator[None]:
    """Hold the lock of ``target`` as ``files.locked`` does, after waiting for whoever holds it.

    Raises:
        Busy: it was not free within ``patience`` seconds.
    """
    end, pause = time.monotonic() + patience, 0.002
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(locked(target, doing))
                break
            except Busy:
                if time.monotonic() > end:
                    raise
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
        yield


@contextmanager
def renewed(folder: Path, ours: Collection[str]) -> Iterator[Path]:
    """An empty folder to write an artifact's new version into; it takes the place of ``folder`` when the block ends.

    Both change names in one step where the system can do that, so that ``folder`` is the old or the whole new version at every
    moment; elsewhere a killed writer's old version comes back by ``recover``. Whatever else stands in ``folder`` stays there. To be
    used under the folder's lock.

    Args:
        ours: names that the artifact may have in the folder; the new version has them or nobody has.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    sweep(folder)
    stage, handle = _begun(folder, True, None)
    try:
        yield stage
        for file in stage.rglob("*"):
            if file.is_file():
                sync(file)
        _carry(folder, stage, ours)
        _exchange(stage, folder, ours)
        with contextlib.suppress(OSError):
            sync(folder.parent)
    finally:
        os.close(handle)
        shutil.rmtree(stage, ignore_errors=True)


def _carry(folder: Path, stage: Path, ours: Collection[str]) -> None:
    """Give the new version all that is not the artifact's, as further names of the same files."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        target = stage / entry.name
        if entry.name in ours or target.exists():
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, target, symlinks=True, copy_function=_link)
        else:
            _link(entry, target)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target, follow_symlinks=False)


def _exchange(stage: Path, folder: Path, ours: Collection[str]) -> None:
    if not folder.exists():
        os.replace(stage, folder)
        return
    old = stage
    if not exchange(stage, folder):
        old = stage_of(folder, "old")
        os.replace(folder, old)
        os.replace(stage, folder)
    for entry in old.iterdir():  # what came while the new version was written
        if entry.name not in ours and not os.path.lexists(folder / entry.name):
            os.replace(entry, folder / entry.name)
    shutil.rmtree(old)


def recover(path: Path) -> None:
    """Bring back the old version of a folder whose writer was killed between two renames; does nothing where there is none."""
    if path.exists() or not path.parent.is_dir():
        return
    if any(each.name.startswith(f".{path.name}.") and each.suffix == ".old" for each in path.parent.iterdir()):
        with waiting(path, "writes"):
            sweep(path)
