"""What writing files safely needs: whole or not at all, one writer at a time, and nothing left of those who were killed."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trimtab.core.errors import Busy

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there, and nothing swept
    fcntl = None  # type: ignore[assignment]

__all__ = ["exchange", "locked", "put_in_place", "stage_of", "staged", "sweep", "sync"]

_EXCHANGE, _HERE = 2, -100  # RENAME_EXCHANGE, AT_FDCWD


def sync(path: Path) -> None:
    """Push a file's bytes, or a folder's entries, to the disk, so that a rename never precedes them."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# -- one writer at a time


def _hold(path: Path) -> int | None:
    """A descriptor that holds the lock of a file or folder until it is closed; None: somebody else holds it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    except OSError:  # a file system without locks
        pass
    return handle


@contextmanager
def locked(target: Path, doing: str) -> Iterator[None]:
    """Hold the lock of ``target``, which need not exist; a process that is killed lets go of it.

    Args:
        doing: what is done with it, for the message of whoever comes second: ``"trains into"``.

    Raises:
        Busy: another process, or another thread of this one, holds it.
    """
    file = target.with_name(f".{target.name}.lock")
    made = [folder for folder in file.parents if not folder.exists()]
    file.parent.mkdir(parents=True, exist_ok=True)
    while True:
        os.close(os.open(file, os.O_CREAT | os.O_WRONLY, 0o666))
        try:
            handle = _hold(file)
        except FileNotFoundError:  # the one who held it has just taken it away
            continue
        if handle is None:
            who = file.read_text("utf-8", errors="replace").strip() if file.exists() else ""
            raise Busy(f"another process{f' ({who})' if who else ''} {doing} {target}; wait for its end, or choose another place")
        try:
            same = os.path.samestat(os.fstat(handle), os.stat(file))
        except FileNotFoundError:
            same = False
        if same:
            break
        os.close(handle)
    try:
        file.write_text(f"process {os.getpid()} on {socket.gethostname()}", "utf-8")
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(handle)
        for folder in made:  # made for the lock alone
            with contextlib.suppress(OSError):
                folder.rmdir()


# -- whole or not at all


def stage_of(path: Path, ending: str = "part") -> Path:
    """A name beside ``path`` that nobody else uses, for what becomes ``path`` (``part``) or was it (``old``)."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{ending}")


def sweep(path: Path) -> None:
    """Remove what killed writers of ``path`` left beside it; a folder that one of them had moved aside comes back.

    Whoever writes holds the lock of the stage, so that nothing of a living writer is touched.
    """
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.(part|old)")
    left = [each for each in path.parent.iterdir() if pattern.fullmatch(each.name)] if path.parent.is_dir() else []
    for each in left:
        with contextlib.suppress(FileNotFoundError, PermissionError):
            handle = _hold(each) if fcntl is not None else None
            if handle is None:
                continue
            if each.suffix == ".old" and not path.exists():
                os.replace(each, path)
            elif each.is_dir():
                shutil.rmtree(each)
            else:
                each.unlink()
            os.close(handle)


@contextmanager
def staged(path: Path, *, folder: bool, stage: Path | None = None) -> Iterator[Path]:
    """A file or folder beside ``path`` to write; it becomes ``path`` when the block ends, and vanishes if it raises.

    At every moment ``path`` is the old one or the whole new one.

    Args:
        stage: its name, where others must know it.
    """
    sweep(path)
    if stage is not None and stage.is_dir():
        shutil.rmtree(stage)
    stage, handle = _begun(path, folder, stage)
    try:
        yield stage
        for file in stage.rglob("*") if folder else (stage,):
            if file.is_file():
                sync(file)
        put_in_place(stage, path)
    finally:
        os.close(handle)
        if folder:
            shutil.rmtree(stage, ignore_errors=True)
        else:
            stage.unlink(missing_ok=True)


def _begun(path: Path, folder: bool, name: Path | None) -> tuple[Path, int]:
    """An empty stage and a descriptor that holds its lock; anew where a sweep came between the two."""
    while True:
        stage = name or stage_of(path)
        if folder:
            stage.mkdir(parents=True)
        else:
            stage.touch()
        with contextlib.suppress(FileNotFoundError):
            handle = _hold(stage)
            if handle is not None and stage.exists() and os.path.samestat(os.fstat(handle), os.stat(stage)):
                return stage, handle
            if handle is not None:
                os.close(handle)


def put_in_place(stage: Path, path: Path) -> None:
    """Rename ``stage`` to ``path``; what was there is removed. Where a folder replaces a folder, both change names at once."""
    if not path.is_dir() or path.is_symlink():
        try:
            os.replace(stage, path)
        except OSError:
            if not (stage.is_dir() and path.is_dir()):
                raise
            put_in_place(stage, path)  # another writer made it a moment ago
            return
    elif exchange(stage, path):
        shutil.rmtree(stage)
    else:
        aside = stage_of(path, "old")  # ``sweep`` brings it back if this is as far as we come
        os.replace(path, aside)
        os.replace(stage, path)
        shutil.rmtree(aside)
    with contextlib.suppress(OSError):
        sync(path.parent)


def exchange(one: Path, other: Path) -> bool:
    """Let two paths change names in one step; False where the system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    return rename is not None and rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0
