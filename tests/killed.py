"""Deaths of a process that writes: at every event of the file system in turn, or at a random moment."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

_EVENTS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate", "shutil.rmtree", "shutil.copyfile"}


def died_at(number: int, work: Callable[[], Any]) -> bool:
    """Run ``work`` in a forked process that ends, without any clean-up, before its ``number``-th change of the file system.

    Returns:
        Whether it came that far.
    """
    child = os.fork()
    if child == 0:
        seen = 0

        def watch(event: str, args: tuple) -> None:
            nonlocal seen
            writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if event in _EVENTS or writes:
                seen += 1
                if seen == number:
                    os._exit(9)

        sys.addaudithook(watch)
        try:
            work()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9), f"the work failed with {code}"
    return code == 9


def deaths(work: Callable[[], Any]) -> Iterator[int]:
    """1, 2, ... after each death of ``work`` at that event, until it comes to its end."""
    number = 1
    while died_at(number, work):
        yield number
        number += 1


def killed_after(seconds: float, work: Callable[[], Any]) -> None:
    """Run ``work``, which goes on for ever, in a forked process that gets SIGKILL after some time."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    time.sleep(seconds)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "the work ended by itself"


def moments(count: int, *, seed: int = 0, longest: float = 0.2) -> list[float]:
    """Random times to kill at."""
    draw = random.Random(seed)
    return [draw.uniform(0.0, longest) for _ in range(count)]
