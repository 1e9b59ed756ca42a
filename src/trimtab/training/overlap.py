"""Test texts that occur among training texts: word for word, with other numbers, or in long pieces.

Three strengths of a match, each of which the ones before imply:

- *exact*: equal letters and digits; case, punctuation and blanks do not count.
- *masked*: equal once every number, in digits or as a word up to a thousand, is the same sign: the same problem with other numbers.
- *pieces*: a training text holds at least a given share of the test text's sequences of ``n`` words.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["Match", "exact_key", "masked_key", "overlaps"]

_ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen"
_TENS = "nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand"
_NUMBER_WORDS = frozenset(f"{_ONES} {_TENS}".split())
_DIGITS = re.compile(r"\d+(?:[.,]\d+)*")


@dataclass(frozen=True)
class Match:
    """The strongest match of one test text.

    Attributes:
        where: of the test text.
        kind: ``exact``, ``masked``, ``pieces``, or None.
        share: of the test text's sequences of words that the closest training text holds; 1 for exact and masked matches.
        found: where the training text stands, or None.
    """

    where: str
    kind: str | None
    share: float
    found: str | None


def exact_key(text: str) -> str:
    """Letters and digits alone, in lower case: equal for texts that differ in case, punctuation and blanks."""
    return "".join(c for c in text.lower() if c.isalnum())


def masked_key(text: str) -> str:
    """As ``exact_key``, with every run of numbers a ``0``: equal for texts that differ in numbers besides."""
    return "".join(_masked_words(text))


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _masked_words(text: str) -> list[str]:
    found: list[str] = []
    for word in _words(_DIGITS.sub(" 0 ", text)):
        number = word == "0" or word in _NUMBER_WORDS
        if not (number and found[-1:] == ["0"]):  # twenty-five is one number
            found.append("0" if number else word)
    return found


def overlaps(
    train: Iterable[tuple[str, str]], tests: Sequence[tuple[str, str]], *, n: int | None = 8, share: float = 0.8
) -> list[Match]:
    """The strongest match of every test text among the training texts, which are read once.

    Args:
        train, tests: pairs of where a text stands and the text.
        n: words of a piece; shorter test texts have none. Numbers count as one sign in them. None looks for no pieces.
        share: of its pieces that one training text must hold.

    Raises:
        ValueError: ``n`` is below 1 or ``share`` not in (0, 1].
    """
    if (n is not None and n < 1) or not 0 < share <= 1:
        raise ValueError(f"pieces need n of at least 1 and a share above 0 and at most 1; found {n} and {share}")
    exact, masked, pieces, counts = _index([text for _, text in tests], n)
    best = [Match(where, None, 0.0, None) for where, _ in tests]
    strength = {"exact": 3, "masked": 2, "pieces": 1, None: 0}

    def note(test: int, kind: str | None, part: float, where: str) -> None:
        old = best[test]
        if (strength[kind], part) > (strength[old.kind], old.share):
            best[test] = Match(old.where, kind, part, where)

    for where, text in train:
        for test in exact.get(exact_key(text), ()):
            note(test, "exact", 1.0, where)
        words = _masked_words(text)
        for test in masked.get("".join(words), ()):
            note(test, "masked", 1.0, where)
        hits: Counter[int] = Counter()
        for piece in _pieces(words, n):
            hits.update(pieces.get(piece, ()))
        for test, hit in hits.items():
            part = hit / counts[test]
            note(test, "pieces" if part >= share else None, part, where)
    return best


def _pieces(words: list[str], n: int | None) -> set[tuple[str, ...]]:
    return set() if n is None else {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def _index(
    texts: list[str], n: int | None
) -> tuple[dict[str, list[int]], dict[str, list[int]], dict[tuple[str, ...], list[int]], list[int]]:
    """Tests by exact key, by masked key and by piece, and the number of different pieces of each."""
    exact: dict[str, list[int]] = {}
    masked: dict[str, list[int]] = {}
    pieces: dict[tuple[str, ...], list[int]] = {}
    counts = []
    for i, text in enumerate(texts):
        words = _masked_words(text)
        exact.setdefault(exact_key(text), []).append(i)
        masked.setdefault("".join(words), []).append(i)
        own = _pieces(words, n)
        counts.append(len(own))
        for piece in own:
            pieces.setdefault(piece, []).append(i)
    return exact, masked, pieces, counts
