"""The few errors that trimtab raises. Every message is a sentence: what was asked, where, what was found, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "Busy",
    "CheckpointMismatch",
    "GradientMismatch",
    "NoMatch",
    "NotMergeable",
    "ShapeMismatch",
    "TooSmall",
    "TrimtabError",
    "Unsupported",
    "WriteError",
    "nearest",
    "raise_all",
]


class TrimtabError(Exception):
    """Base of all errors that trimtab raises on purpose."""


class NoMatch(TrimtabError, LookupError):
    """A name, role, pattern or layer that matches nothing."""


class ShapeMismatch(TrimtabError, ValueError):
    """A hyperparameter or a tensor whose size does not fit the place."""


class TooSmall(ShapeMismatch):
    """A place whose matrix is smaller than what a hyperparameter asks for; the default targets pass such places by."""


class NotMergeable(TrimtabError, RuntimeError):
    """The update cannot be written into the base weight as asked."""


class CheckpointMismatch(TrimtabError, ValueError):
    """A saved adapter that is damaged, foreign, or made for another base."""


class Unsupported(TrimtabError, NotImplementedError):
    """A combination that has no defined meaning, or that trimtab cannot do."""


class Busy(TrimtabError, RuntimeError):
    """A place on the disk that another process is writing to."""


class GradientMismatch(TrimtabError, RuntimeError):
    """At the first optimizer step, other parameters than the declared ones had received gradients."""


class WriteError(TrimtabError, OSError):
    """The disk is full, a folder is read-only, or the like: nothing new was written, and what was there is left as it is."""


def nearest(word: str, known: Iterable[str], *, n: int = 3) -> str:
    """A clause ``; nearest: a, b, c`` with the ``n`` known names most like ``word``, or nothing if there are none."""
    names = list(dict.fromkeys(known))
    found = difflib.get_close_matches(word, names, n=n, cutoff=0.3) or names[:n]
    return f"; nearest: {', '.join(found)}" if found else ""


def raise_all(problems: list[TrimtabError]) -> None:
    """Raise the collected ``problems`` as one error of the first one's type; do nothing for an empty list."""
    if not problems:
        return
    if len(problems) == 1:
        raise problems[0]
    lines = "\n".join(f"  {i}. {problem}" for i, problem in enumerate(problems, 1))
    raise type(problems[0])(f"{len(problems)} problems:\n{lines}")
