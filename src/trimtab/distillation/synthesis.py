"""Draw inputs from a generator until enough of them pass a filter; a file that says what was drawn, and resumes.

Rejection sampling of arXiv 2405.17258, Algorithm 1: ``s <- generate(seeds)``, kept if ``accept(s)``, until ``target`` are kept.
Repetitions of a seed or of an earlier draw are dropped before they are judged: raw samples collapse otherwise.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import numpy as np

from trimtab.core.errors import TrimtabError, Unsupported
from trimtab.training.files import append_lines

__all__ = ["Draws", "TooFewAccepted", "draw"]

_BINS = 128

Generate = Callable[[Sequence[str], int], list[str]]
Score = Callable[[Sequence[str]], list[float]]


class TooFewAccepted(TrimtabError):
    """The filter lets too little through to reach the target."""


@dataclass(frozen=True)
class Draws:
    """What came of it.

    Attributes:
        accepted: the inputs that passed, in the order of their draws.
        drawn: different inputs that were judged.
        repeated: draws that were a seed or an earlier draw, or nearly so.
    """

    accepted: list[str]
    drawn: int
    repeated: int

    @property
    def acceptance(self) -> float:
        """Share of the judged inputs that passed."""
        return len(self.accepted) / max(self.drawn, 1)


def draw(
    generate: Generate,
    score: Score | None,
    seeds: Sequence[str],
    *,
    target: int,
    file: Path,
    seed: int = 0,
    shown: int | None = None,
    cap: int = 50,
    overlap: float = 0.7,
    progress: Callable[[int], None] | None = None,
) -> Draws:
    """Draw until ``target`` inputs are accepted.

    Args:
        generate: ``(seeds, call)`` to inputs; the seeds come in an order of their own for every call.
        score: inputs to margins, accepted above 0; None accepts every input.
        seeds: the task's real inputs that may be shown.
        target: how many are wanted, exactly.
        file: one JSON line a judged input (``text, margin, call``), appended as they come; a run that was cut off goes on
            behind the last whole call.
        seed: of the orders of the seeds.
        shown: how many seeds a call shows; None: all.
        cap: give up after ``cap * target`` judged or repeated draws, or calls without any.
        overlap: an input is a repetition if its longest common subsequence of words with an earlier one is at least this share
            of the longer of the two (1: only the same words).
        progress: called with the number accepted so far.

    Raises:
        Unsupported: a target below 1, no seeds.
        TooFewAccepted: at the cap; the message has the observed share and samples.
    """
    if target < 1 or not seeds:
        raise Unsupported(f"a synthesis needs a target and seeds, at least 1 of each; found target={target}, {len(seeds)} seeds")
    judged, calls = _earlier(file)
    pool = _Pool([*seeds, *(row["text"] for row in judged)], overlap)
    accepted = [row["text"] for row in judged if row["margin"] > 0][:target]
    repeated, call = 0, calls
    with file.open("a", encoding="utf-8") as stream:
        while len(accepted) < target:
            if max(len(judged) + repeated, call) >= cap * target:
                raise TooFewAccepted(_complaint(accepted, judged, repeated, call, target))
            order = random.Random(f"{seed}-{call}").sample(list(seeds), shown or len(seeds))
            fresh = []
            for text in generate(order, call):
                if pool.add(text):
                    fresh.append(text)
                else:
                    repeated += 1
            margins = [float("inf")] * len(fresh) if score is None else score(fresh) if fresh else []
            rows = [{"text": t, "margin": m, "call": call} for t, m in zip(fresh, margins, strict=True)]
            append_lines(stream, [*rows, {"end of call": call}])
            judged += rows
            accepted += [row["text"] for row in rows if row["margin"] > 0]
            call += 1
            if progress is not None:
                progress(min(len(accepted), target))
    return Draws(accepted[:target], len(judged), repeated)


def _earlier(file: Path) -> tuple[list[dict], int]:
    """Rows of whole calls in ``file``, and their number; what a cut-off call left is taken off the file."""
    if not file.is_file():
        return [], 0
    rows, pending, calls, whole = [], [], 0, 0
    content = file.read_bytes()
    end = 0
    for line in content.splitlines(keepends=True):
        end += len(line)
        try:
            row = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            row = None
        if row is None:
            break
        if "end of call" in row:
            rows, pending, calls, whole = rows + pending, [], row["end of call"] + 1, end
        else:
            pending.append(row)
    if whole < len(content):
        with file.open("r+b") as stream:
            stream.truncate(whole)
    return rows, calls


class _Pool:
    """Inputs so far, by their words; ``add`` is False for a repetition.

    Words are counted in ``_BINS`` bins: what two texts share there bounds their common subsequence, and few pairs pass.
    """

    def __init__(self, texts: Sequence[str], overlap: float):
        self.overlap, self.words = overlap, []
        self.known: set[tuple[str, ...]] = set()
        self.bins = np.zeros((256, _BINS), np.uint16)
        for text in texts:
            self._remember(tuple(text.lower().split()))

    def _remember(self, words: tuple[str, ...]) -> None:
        self.known.add(words)
        if len(self.words) == len(self.bins):
            self.bins = np.concatenate([self.bins, np.zeros_like(self.bins)])
        self.bins[len(self.words)] = _binned(words)
        self.words.append(words)

    def add(self, text: str) -> bool:
        words = tuple(text.lower().split())
        if not words or words in self.known or any(self._close(words, self.words[i]) for i in self._near(words)):
            return False
        self._remember(words)
        return True

    def _near(self, words: tuple[str, ...]) -> list[int]:
        """The numbers of the texts that share enough words to be close, whatever their order."""
        bins = self.bins[: len(self.words)]
        lengths = np.maximum(bins.sum(1), len(words))
        return np.flatnonzero(np.minimum(bins, _binned(words)).sum(1) >= self.overlap * lengths).tolist()

    def _close(self, a: tuple[str, ...], b: tuple[str, ...]) -> bool:
        return _common(a, b) >= self.overlap * max(len(a), len(b))


def _binned(words: Sequence[str]) -> np.ndarray:
    return np.bincount([crc32(word.encode()) % _BINS for word in words], minlength=_BINS).astype(np.uint16)


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            above = row[j]
            row[j] = diagonal + 1 if x == y else max(above, row[j - 1])
            diagonal = above
    return row[-1]


def _complaint(accepted: list[str], judged: list[dict], repeated: int, calls: int, target: int) -> str:
    share = len(accepted) / max(len(judged), 1)
    samples = "; ".join(repr(row["text"][:60]) for row in judged[-3:]) or "none"
    return (
        f"after {calls} calls, {len(judged)} different inputs and {repeated} repetitions only {len(accepted)} of {target} were "
        f"accepted ({100 * share:.1f} % of those judged); the last ones: {samples}. Give more seeds, another generator, or "
        "transfer without the filter"
    )
