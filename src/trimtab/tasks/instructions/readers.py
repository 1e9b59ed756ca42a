"""What a generated text answers: the readers that LLM-Adapters published, and corrected ones beside them.

The published rules (arXiv 2304.01933, official evaluation code) mislead in known ways, and results all over the literature stand on
them, so both are computed from the same text:

========  =========================================  ===============================================================
kind      published                                  corrected
========  =========================================  ===============================================================
number    commas out, then the last number           the number after the last "answer is", "####" or in a box, else the
                                                     last one; a comma is taken out only where it groups thousands, a
                                                     minus counts only as a sign ("10-5" ends in 5), "12%" and "3/4" are read
letter    the first capital A to E in the text       the last "(C)", else the last letter that stands alone
label     the first label in the text, in its case   whole words, any case; after the last "answer is", else the only one named
========  =========================================  ===============================================================

A first capital A is the article of most English sentences: that rule is at chance for five options. A text that names several
labels without an "answer is" is unread under the corrected rule, and so wrong. After "the answer is 4 + 3 = 7" comes 7.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from trimtab.core.errors import nearest
from trimtab.training.errors import ConfigError

__all__ = ["KINDS", "Reader", "reader_for"]

TOLERANCE = 1e-3
_PHRASE = re.compile(r"answer\s*(?:is|:|=)|####|\\boxed\{", re.IGNORECASE)
_MINUS = str.maketrans({"−": "-", "–": "-"})
_NUMBER = re.compile(r"(?<![\w.)])-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:\s*/\s*\d+)?|\d+(?:\.\d+)?|(?<![\w.])\.\d+")
_LETTERS = "ABCDE"


def published_number(text: str) -> float:
    """The last number once commas are out; infinity if there is none."""
    found = re.findall(r"-?\d+\.?\d*", text.replace(",", ""))
    return float(found[-1]) if found else math.inf


def corrected_number(text: str) -> float:
    """See the module; infinity if there is none."""
    text = text.translate(_MINUS)
    phrases = list(_PHRASE.finditer(text))
    if phrases:
        sentence = re.split(r"\.\s|\n", text[phrases[-1].end() :], maxsplit=1)[0]
        found = _NUMBER.findall(sentence.rpartition("=")[2]) or _NUMBER.findall(sentence)
        if found:
            return _value(found[0])
    found = _NUMBER.findall(text)
    return _value(found[-1]) if found else math.inf


def _value(written: str) -> float:
    number, _, below = written.replace(",", "").partition("/")
    if below and int(below) != 0:
        return float(Fraction(number.strip()) / int(below))
    return float(number)


def published_letter(text: str) -> str:
    """The first capital A to E anywhere."""
    found = re.search(r"[A-E]", text)
    return found[0] if found else ""


def corrected_letter(text: str) -> str:
    """The last parenthesised letter, else the last that stands alone."""
    found = re.findall(r"\(\s*([A-E])\s*\)", text)
    # "A" at the start of a sentence is an article, unless nothing follows it
    found = found or re.findall(r"\b([B-E]|A(?=[\s.):]*$|[).:]))(?![\w'])", text)
    return found[-1] if found else ""


def published_label(text: str, labels: Sequence[str]) -> str:
    """The first occurrence of any label, as it is written."""
    found = re.search("|".join(map(re.escape, labels)), text)
    return found[0] if found else ""


def corrected_label(text: str, labels: Sequence[str]) -> str:
    """The label after the last "answer is", else the only one that the text names."""
    words = re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, labels)) + r")(?!\w)", re.IGNORECASE)
    by_case = {label.lower(): label for label in labels}
    phrases = list(_PHRASE.finditer(text))
    if phrases:
        found = words.search(text, phrases[-1].end())
        if found:
            return by_case[found[0].lower()]
    named = {by_case[word.lower()] for word in words.findall(text)}
    return named.pop() if len(named) == 1 else ""


@dataclass(frozen=True)
class Reader:
    """How the texts of one data set are scored.

    Attributes:
        kind: number, letter, label, or text (the whole text, blanks and case aside, must equal the answer).
        labels: the allowed labels, for kind label.
        new_tokens: how many tokens a model may generate, in the published protocol.
    """

    kind: str
    labels: tuple[str, ...] = ()
    new_tokens: int = 32

    def read(self, text: str, *, published: bool = False) -> float | str:
        """What ``text`` answers; infinity or an empty string if it answers nothing."""
        if self.kind == "number":
            return (published_number if published else corrected_number)(text)
        if self.kind == "letter":
            return (published_letter if published else corrected_letter)(text)
        if self.kind == "label":
            return (published_label if published else corrected_label)(text, self.labels)
        return " ".join(text.split()).lower()

    def answer(self, written: str, where: str) -> float | str:
        """The right answer of a row, parsed.

        Raises:
            ConfigError: it does not parse; scoring against it would count every answer as wrong.
        """
        written = str(written).strip()
        if self.kind == "number":
            try:
                return float(written.replace(",", ""))
            except ValueError:
                raise ConfigError(f"{where}: the answer {written!r} is no number; drop the row, or choose another reader") from None
        allowed = {"label": self.labels, "letter": tuple(_LETTERS)}.get(self.kind, ())
        if allowed and written not in allowed:
            raise ConfigError(f"{where}: the answer {written!r} is none of {', '.join(allowed)}")
        return written if allowed else " ".join(written.split()).lower()

    def right(self, found: float | str, answer: float | str) -> bool:
        """Whether they agree; numbers within 0.001."""
        if self.kind == "number":
            return abs(float(found) - float(answer)) <= TOLERANCE
        return found == answer

    def unread(self, found: float | str) -> bool:
        """Whether nothing was found."""
        return found in ("", math.inf)

    def done(self, text: str) -> bool:
        """Whether more text cannot change what the published rule reads, so that generation may stop."""
        return self.kind == "label" and published_label(text, self.labels) != ""


def _numbered(tag: str, count: int) -> Reader:
    return Reader("label", tuple(f"{tag}{i}" for i in range(1, count + 1)))


_NUMBERS = Reader("number", new_tokens=256)
#: data set, in lower-case letters and digits alone -> reader; labels as in the release
_KNOWN: dict[str, Reader] = {
    **dict.fromkeys(["addsub", "multiarith", "singleeq", "gsm8k", "svamp", "mawps", "asdiv", "math10k"], _NUMBERS),
    **dict.fromkeys(["aqua"], Reader("letter", new_tokens=256)),
    **dict.fromkeys(["boolq"], Reader("label", ("true", "false"))),
    **dict.fromkeys(["piqa"], _numbered("solution", 2)),
    **dict.fromkeys(["siqa", "socialiqa", "arcchallenge", "arceasy", "arcc", "arce", "openbookqa", "obqa"], _numbered("answer", 5)),
    **dict.fromkeys(["hellaswag"], _numbered("ending", 4)),
    **dict.fromkeys(["winogrande"], _numbered("option", 2)),
}
KINDS: dict[str, Callable[[], Reader]] = {
    "number": lambda: _NUMBERS, "letter": lambda: Reader("letter", new_tokens=256), "text": lambda: Reader("text"),
}  # fmt: skip


def reader_for(name: str, asked: str | None = None) -> Reader:
    """The reader of the data set ``name``.

    Args:
        asked: number, letter, text, or labels as ``yes/no``; None: what the set's name says.

    Raises:
        ConfigError: the set is not known and nothing was asked, or ``asked`` is no reader.
    """
    if asked is None:
        key = "".join(c for c in name.lower() if c.isalnum())
        if key not in _KNOWN:
            raise ConfigError(
                f"how the answers of {name!r} are read is not known{nearest(key, _KNOWN)}; set readers.{name} to number, letter, "
                "text, or labels such as yes/no"
            )
        return _KNOWN[key]
    if asked in KINDS:
        return KINDS[asked]()
    if "/" in asked:
        return Reader("label", tuple(part.strip() for part in asked.split("/")))
    raise ConfigError(f"a reader is number, letter, text, or labels such as yes/no; found {asked!r} for {name!r}")
