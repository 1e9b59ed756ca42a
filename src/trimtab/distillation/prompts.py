"""The texts of a transfer: what a generator reads and writes, what a discriminator is asked.

Source: arXiv 2405.17258, Sec. 3.1, Fig. 7 and App. A. Only text crosses from one model to another, never token ids.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass

from trimtab.core.errors import Unsupported

__all__ = ["Prompts"]

_ITEM = re.compile(r"(?:^|\n)[ \t]*(\d+)[.)][ \t]*")


@dataclass(frozen=True)
class Prompts:
    """How one task is worded for the models.

    Args:
        name: the task, in a few words; underscores become spaces.
        template: what a model reads to answer an input, with the field ``{input}``; the answer follows it directly.
        wanted: how many items the generator is told of; with s seeds it writes the items s + 1 to ``wanted``.
        answers: the discriminator's two answers, for a real and a made input, as they stand after ``question``.

    Raises:
        Unsupported: an empty name, a template without ``{input}``, equal answers.
    """

    name: str
    template: str = "{input}\n"
    wanted: int = 10
    answers: tuple[str, str] = (" yes", " no")

    def __post_init__(self) -> None:
        fields = [field for _, field, _, _ in string.Formatter().parse(self.template) if field is not None]
        if not self.name.strip():
            raise Unsupported("a transfer needs the task's name in a few words, such as 'noun category'; found an empty one")
        if fields != ["input"]:
            raise Unsupported(f"the template must have the one field {{input}}, found {fields or 'none'} in {self.template!r}")
        if self.answers[0] == self.answers[1]:
            raise Unsupported(f"the discriminator's two answers are both {self.answers[0]!r}; it could not tell anything apart")

    def task(self, text: str) -> str:
        """What a model reads to answer ``text``."""
        return self.template.format(input=text)

    def generator(self, seeds: Sequence[str]) -> str:
        """The seeds as a numbered list that is left open after the next number.

        Raises:
            Unsupported: no seed, a seed that is no text, or as many seeds as items are wanted.
        """
        if not seeds or not all(isinstance(seed, str) and seed.strip() for seed in seeds):
            raise Unsupported(f"the generator needs at least one seed input, each a non-empty text; found {list(seeds)!r}")
        if len(seeds) >= self.wanted:
            raise Unsupported(f"{len(seeds)} seeds leave nothing to write of wanted={self.wanted} items; raise wanted")
        items = "".join(f"{number}. {_line(seed)}\n" for number, seed in enumerate(seeds, 1))
        return f"Here are {self.wanted} examples of {self._title}:\n\n{items}{len(seeds) + 1}."

    def parse(self, continuation: str, *, seeds: int) -> list[str]:
        """The items that a generator wrote after ``generator(seeds)``: ``seeds + 1`` to ``wanted``, in order.

        The last one counts only if something follows it: another number or an empty line; else it may be cut off.
        """
        body, *rest = re.split(r"\n[ \t]*\n", continuation, maxsplit=1)
        pieces = _ITEM.split(body)
        texts = [pieces[0]]
        for number, text in zip(pieces[1::2], pieces[2::2], strict=True):
            if int(number) != seeds + 1 + len(texts):
                break  # a number out of turn: the list has ended, or the model has lost count
            texts.append(text)
        else:
            if not rest and not body.endswith("\n"):
                texts.pop()
        return [text.strip() for text in texts[: self.wanted - seeds] if text.strip()]

    def question(self, text: str) -> str:
        """What the discriminator reads: the input and whether it is one of the task's."""
        return f"{_line(text)}\nIs the above question from {self._title} dataset?"

    @property
    def _title(self) -> str:
        return self.name.replace("_", " ").strip()


def _line(text: str) -> str:
    """On one line: a line break would end an item."""
    return " ".join(text.split())
