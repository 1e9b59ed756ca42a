"""Several processes of one run (``torchrun``, ``accelerate launch``): who writes, and when the others may read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import distributed

from trimtab.training.files import new_directory

__all__ = ["barrier", "is_main", "shared_directory", "spread", "world"]


def _joined() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def world() -> int:
    """Number of processes; before they have met, what the launcher says."""
    return distributed.get_world_size() if _joined() else int(os.environ.get("WORLD_SIZE", "1"))


def _rank() -> int:
    return distributed.get_rank() if _joined() else int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    return _rank() == 0


def barrier() -> None:
    """Wait for all processes; alone, do nothing."""
    if _joined() and world() > 1:
        distributed.barrier()


@contextmanager
def shared_directory(path: Path) -> Iterator[Path]:
    """As ``files.new_directory``, for a folder that all processes write into; all leave the block together."""
    shared = path.with_name(f".{path.name}.part")
    if world() == 1:
        with new_directory(path) as stage:
            yield stage
    elif is_main():
        with new_directory(path, stage=shared) as stage:
            barrier()  # it is there
            yield stage
            barrier()  # everybody has written
        barrier()  # it has its name
    else:
        barrier()
        yield shared
        barrier()
        barrier()


def spread(rows: Sequence[Any], work: Callable[[Sequence[Any]], list[Any]]) -> list[Any]:
    """``work(rows)``, one result a row, each process doing its share; every process gets all of them."""
    count = world()
    if not _joined() or count == 1:
        return work(rows)
    parts: list[list[Any]] = [[] for _ in range(count)]
    mine = rows[_rank() :: count]
    distributed.all_gather_object(parts, work(mine) if mine else [])
    found: list[Any] = [None] * len(rows)
    for i, part in enumerate(parts):
        found[i::count] = part
    return found
