"""A run's folder: whose it is, what of it a run wrote, and that nothing else is ever touched.

One process at a time works in it. Overwriting moves what the earlier run wrote to ``.previous/``, where it stays until the new
run is complete; an error before the first checkpoint brings it back. What a run did not write stays where it is.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trimtab.core.errors import Busy, TrimtabError
from trimtab.core.files import locked, sweep
from trimtab.training.config import TrainConfig, load_config
from trimtab.training.errors import RunError

__all__ = [
    "ADAPTER", "CHECKPOINTS", "CONFIG", "INFO", "PREDICTIONS", "RESULT", "STEPS", "check_folder", "claimed", "clear_up",
    "forget", "set_aside", "telling_of_disk", "tidy",
]  # fmt: skip

CONFIG, INFO, RESULT, ADAPTER, CHECKPOINTS = "config.yaml", "task.json", "result.json", "adapter", "checkpoints"
STEPS, PREDICTIONS, PREVIOUS = "steps", "predictions", ".previous"
#: what a run writes; a folder that matches is its own with all that is in it
_OWN = re.compile(
    r"(config\.yaml|task\.json|result\.json|curve\.json|curve\.png|adapter/(manifest\.json|adapter-[0-9a-f]+\.safetensors)|"
    r"checkpoints/(checkpoint|best)-\d+|steps/step-\d+|predictions/[^/]+\.jsonl)"
)
#: what is left of a write of one of these that was cut off; the name of what was written is the first group
_LEFT = re.compile(
    r"\.(config\.yaml|task\.json|result\.json|curve\.json|curve\.png|adapter|manifest\.json|(?:checkpoint|best|step)-\d+|"
    r"[^/]+\.jsonl)(\.[0-9a-f]+)?\.(part|old)"
)
_OF_DISK = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR, errno.EEXIST,
    errno.ENAMETOOLONG, errno.EISDIR,
}  # fmt: skip
_INNER = (ADAPTER, CHECKPOINTS, STEPS, PREDICTIONS)


def _entries(folder: Path) -> Iterator[Path]:
    """What lies in a run's folder and in the folders that a run makes there."""
    for inner in (folder, *(folder / name for name in _INNER)):
        if inner.is_dir() and not inner.is_symlink():
            yield from inner.iterdir()


def _own(folder: Path) -> list[Path]:
    """What a run wrote in ``folder``, relative to it."""
    found = [entry.relative_to(folder) for entry in _entries(folder)]
    return [path for path in found if _OWN.fullmatch(path.as_posix()) and (path.parts[0] != PREDICTIONS or _scored(folder / path))]


def _scored(file: Path) -> bool:
    """Whether a file of predictions is a run's: each of its lines says where its row stands."""
    try:
        return "where" in json.loads(file.read_text("utf-8").partition("\n")[0])
    except (OSError, ValueError, TypeError):
        return False


def _is_run(folder: Path) -> bool:
    """Whether a run wrote here: its configuration can be read, and beside it lies what its task noted."""
    try:
        load_config(folder / CONFIG)
        return isinstance(json.loads((folder / INFO).read_text("utf-8")), dict)
    except (TrimtabError, OSError, ValueError):
        return False


def _has_begun(folder: Path) -> bool:
    """Whether there is something of a run that another one must not take away: a checkpoint, or what it delivers."""
    return any(path.name in (RESULT, "manifest.json") or path.name.startswith(("checkpoint-", "step-")) for path in _own(folder))


def check_folder(output: Path, config: TrainConfig, *, overwrite: bool) -> None:
    """Refuse a folder with another run, unless it is to be overwritten, and one with something that is no run.

    Raises:
        RunError: with what is there.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not output.is_dir() or not _is_run(output):
        raise RunError(f"the output {output} exists and holds no trimtab run; choose another output, or empty it")
    if overwrite or not _has_begun(output):
        return
    earlier = load_config(output / CONFIG).model_dump()
    ours = config.model_dump()
    differing = [key for key in ours if key != "output" and ours[key] != earlier.get(key)]
    if differing:
        shown = ", ".join(f"{key} = {earlier.get(key)!r} there, {ours[key]!r} now" for key in differing)
        raise RunError(
            f"the output {output} holds a run with another configuration ({shown}); choose another output, or overwrite it"
        )


@contextmanager
def claimed(output: Path) -> Iterator[None]:
    """Work in a run's folder alone.

    Raises:
        RunError: another process works there, or nothing can be written there.
    """
    try:
        with telling_of_disk(output), locked(output, "trains into"):
            if (output / PREVIOUS).is_dir() and not (output / CONFIG).exists():
                _restore(output)  # a process was killed while it made room
            _sweep(output)
            yield
    except Busy as error:
        raise RunError(str(error)) from error


@contextmanager
def telling_of_disk(output: Path) -> Iterator[None]:
    """Errors of the disk as a sentence.

    Raises:
        RunError: instead of them.
    """
    try:
        yield
    except Exception as error:
        why = _of_disk(error)
        if why is None:
            raise
        raise RunError(
            f"the run in {output} cannot be written: {why}; make room or rights there, or choose another output, and start it "
            "again: it goes on from its last checkpoint"
        ) from error


def _of_disk(error: BaseException) -> str | None:
    """What the disk said; None for other errors. torch and safetensors have their own classes for it."""
    if isinstance(error, OSError) and error.errno in _OF_DISK:
        return f"{os.strerror(error.errno)}{f' ({error.filename})' if error.filename else ''}"
    text = str(error)
    if type(error).__name__ == "SafetensorError" and ("os error" in text or "I/O" in text):
        return text
    if isinstance(error, RuntimeError) and ("PytorchStreamWriter" in text or "unexpected pos" in text):
        return f"{os.strerror(errno.ENOSPC)}, it seems ({text.splitlines()[0]})"
    return None


def _sweep(output: Path) -> None:
    """Remove what a killed run left of writes that were cut off."""
    for path in list(_entries(output)) if _is_run(output) else ():
        left = _LEFT.fullmatch(path.name)
        if left and path.exists():
            sweep(path.with_name(left[1]))
            if left[2] is None and left[3] == "part":  # a name that all processes of a run knew
                _remove(path)


def set_aside(output: Path) -> None:
    """Make room for a new run: what an earlier one wrote goes to ``.previous``; of an earlier such move the older stays."""
    previous = output / PREVIOUS
    found = sorted(_own(output), key=lambda path: path.name != CONFIG)  # without it, the folder counts as not overwritten yet
    if previous.exists():  # the run in between never was complete
        for path in reversed(found):
            _remove(output / path)
    else:
        try:
            for path in found:
                (previous / path).parent.mkdir(parents=True, exist_ok=True)
                os.replace(output / path, previous / path)
        except OSError:
            if previous.is_dir():
                _restore(output)
            raise
    tidy(output)


def _restore(output: Path) -> None:
    previous = output / PREVIOUS
    for path in sorted(_own(previous), key=lambda path: path.name == CONFIG):
        _remove(output / path)
        (output / path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(previous / path, output / path)
    shutil.rmtree(previous)


def clear_up(output: Path) -> None:
    """The run is complete: its checkpoints go, and what it replaced."""
    for path in _own(output):
        if path.parts[0] == CHECKPOINTS:
            _remove(output / path)
    tidy(output)
    if (output / PREVIOUS).is_dir():
        shutil.rmtree(output / PREVIOUS)


def forget(output: Path) -> None:
    """After an error: take away what the run wrote if it came to no checkpoint, and bring back what it was to replace."""
    if any(path.parts[0] == CHECKPOINTS and path.name.startswith("checkpoint-") for path in _own(output)):
        return
    _sweep(output)
    for path in _own(output):
        _remove(output / path)
    if (output / PREVIOUS).is_dir():
        _restore(output)
    tidy(output)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def tidy(output: Path) -> None:
    """Take away folders that a run made and that are empty; the run's own too."""
    for name in (*_INNER, "."):
        with contextlib.suppress(OSError):
            (output / name).resolve().rmdir()
