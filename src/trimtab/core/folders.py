"""Folders that hold an artifact: one writer at a time, old or new at every moment, and nothing of anybody else's lost."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from trimtab.core.errors import Busy, TrimtabError, Unsupported, WriteError
from trimtab.core.files import _begun, exchange, locked, stage_of, sweep, sync

__all__ = ["apart", "absent", "recover", "renewed", "steady", "tensors_in", "waiting", "writing"]

PATIENCE = 600.0  # seconds that a writer waits for another one
DRAFT = "adapter"  # what drafts of tensors are named after
T = TypeVar("T")


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


def apart(out: str | os.PathLike, inputs: Iterable[str | os.PathLike | object]) -> Path:
    """``out`` as a path, which is none of ``inputs``, by no name: writing there would overwrite what is read.

    Args:
        inputs: paths; what is none (a model in memory, None) is passed over.

    Raises:
        Unsupported: it is one of them.
    """
    target = Path(out)
    for each in inputs:
        if not isinstance(each, str | os.PathLike):
            continue
        there = Path(each)
        same = os.path.realpath(there) == os.path.realpath(target)
        if same or (target.exists() and there.exists() and os.path.samefile(target, there)):
            raise Unsupported(f"{target} is one of the inputs, and writing there would overwrite it; choose another place")
    return target


def absent(out: Path) -> bool:
    """Whether there is nothing at ``out``; the lock of a writer that was killed after its last step is taken away."""
    if not os.path.lexists(out):
        return True
    with contextlib.suppress(Busy, OSError), locked(out, "writes"):
        pass
    return False


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


def steady(paths: Collection[Path], read: Callable[[], T]) -> T:
    """What ``read`` gives, of files of one and the same save: it is called again where another process replaced one meanwhile.

    Args:
        paths: the files that it reads, and their folder.
    """
    while True:
        before = [_mark(path) for path in paths]
        try:
            found = read()
        except (TrimtabError, OSError):
            if [_mark(path) for path in paths] == before:
                raise
            continue
        if [_mark(path) for path in paths] == before:
            return found


def _mark(path: Path) -> tuple[int, ...] | None:
    """Tells a file or folder from another one of the same name."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return (found.st_dev, found.st_ino) if path.is_dir() else (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size)


@contextmanager
def tensors_in(folder: Path, tensors: dict[str, Tensor], **more: str) -> Iterator[Path]:
    """A safetensors file beside its final place in ``folder``, to be renamed within the block; gone after it if it was not.

    safetensors writes to a temporary file of its own next to it, so that the file stands in a folder that ``sweep`` knows.

    Args:
        more: entries of the file's metadata.
    """
    draft = stage_of(folder / DRAFT)
    draft.mkdir()
    try:
        save_file(tensors, draft / "tensors", metadata={"format": "pt", **more})
        if more:
            _sort_metadata(draft / "tensors")
        sync(draft / "tensors")
        yield draft / "tensors"
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _sort_metadata(file: Path) -> None:
    """Of several entries safetensors writes now one first, now the other: the same content shall be the same bytes."""
    with open(file, "r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        stream.seek(8)
        stream.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size))


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
