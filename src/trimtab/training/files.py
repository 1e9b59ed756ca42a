"""Writing so that a reader sees either the old content or the whole new one, whenever the process is killed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from trimtab.core.files import staged

__all__ = ["append_lines", "cache_folder", "json_lines", "new_directory", "new_file", "write_text"]


def cache_folder() -> Path:
    """Where downloads are kept: ``$TRIMTAB_CACHE``, or ``trimtab`` in the user's cache folder."""
    own = os.environ.get("TRIMTAB_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "trimtab"


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write; it becomes ``path`` when the block ends, and vanishes if it raises."""
    with staged(path, folder=False) as stage:
        yield stage


def json_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def append_lines(stream: TextIO, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows to an open .jsonl file, and push them to the disk."""
    stream.write(json_lines(rows))
    stream.flush()
    os.fsync(stream.fileno())


def write_text(path: Path, text: str) -> None:
    """Write ``text`` (UTF-8) to ``path`` in one step."""
    with new_file(path) as stage:
        stage.write_text(text, encoding="utf-8")


@contextmanager
def new_directory(path: Path, *, stage: Path | None = None) -> Iterator[Path]:
    """A folder beside ``path`` to write into; it becomes ``path`` when the block ends, and vanishes if it raises.

    A ``path`` that exists already is replaced, in one step.

    Args:
        stage: the name of that folder, where other processes must know it.
    """
    with staged(path, folder=True, stage=stage) as made:
        yield made
