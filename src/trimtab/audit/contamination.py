"""Contamination: which test questions a model has been trained on.

LLM-Adapters' authors withdrew three of their six mathematics tests for this reason (README of the release): most questions of
AddSub, MultiArith and SingleEq are in MAWPS, which Math10K contains. ``contamination`` finds that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from trimtab.core.table import Table
from trimtab.tasks.instructions import sources
from trimtab.training.config import load_config
from trimtab.training.data import Row, load_rows
from trimtab.training.errors import DataError
from trimtab.training.overlap import Match, overlaps

__all__ = ["Contamination", "contamination", "contamination_of_run"]


@dataclass
class Contamination:
    """What was found.

    Attributes:
        matches: for each test set, the strongest match of each of its rows, in order.
        n, share: words of a piece, and the share of pieces that makes a match.
        training: number of training rows.
    """

    matches: dict[str, list[Match]]
    n: int
    share: float
    training: int

    def table(self) -> Table:
        """A row a test set: how many of its rows are matched at least so strongly, and how many not at all."""
        columns = ("test set", "rows", "exact", "or other numbers", "or in pieces", "clean", "contaminated %")
        title = f"against {self.training:,} training rows; a piece is {self.n} words, a match {self.share:.0%} of them in one row"
        table = Table(columns, title=title)
        for name, found in self.matches.items():
            kinds = [match.kind for match in found]
            exact, masked, pieces = (kinds.count(kind) for kind in ("exact", "masked", "pieces"))
            dirty = exact + masked + pieces
            table.add(name, len(found), exact, exact + masked, dirty, len(found) - dirty, f"{100 * dirty / max(1, len(found)):.1f}")
        return table

    def contaminated(self, *, at_least: str = "exact") -> dict[str, int]:
        """Rows of each test set that are matched ``exact``, ``masked`` or more, or ``pieces`` or more."""
        kinds = ["exact", "masked", "pieces"]
        wanted = kinds[: kinds.index(at_least) + 1]
        return {name: sum(match.kind in wanted for match in found) for name, found in self.matches.items()}

    def to_json(self) -> str:
        """Everything, as JSON."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"


def contamination(
    train: Sequence[str | Path],
    tests: Sequence[str | Path],
    *,
    columns: Sequence[str] = ("instruction",),
    n: int = 8,
    share: float = 0.8,
) -> Contamination:
    """Search the rows of test files among those of training files.

    Args:
        train, tests: .jsonl, .json, .csv or .parquet files.
        columns: what makes up a row's text, those that the row has (MAWPS has ``original_text``, the others ``instruction``).
        n, share: see ``training.overlap.overlaps``.

    Raises:
        DataError: a file that cannot be read, or one without any of ``columns``.
    """
    rows = [row for path in train for row in _rows(Path(path), columns)]
    named: dict[str, list[Row]] = {}
    for path in map(Path, tests):
        name = sources.set_name(str(path))
        if name in named:
            raise DataError(f"two test files are named {name!r}, the second is {path}; rename it")
        named[name] = _rows(path, columns)
    return _search(rows, named, columns, n=n, share=share)


def contamination_of_run(config: str | Path, *, n: int = 8, share: float = 0.8) -> Contamination:
    """The same for a configuration of instruction tuning, or the folder of its run: its test sets among its training rows.

    Raises:
        DataError, ConfigError: as training would.
    """
    path = Path(config)
    found = load_config(path / "config.yaml" if path.is_dir() else path)
    if found.task != "instruction-tuning":
        raise DataError(f"{config} is a configuration of {found.task}; this audit reads those of instruction-tuning, or files")
    rows = sources.load(found.data, found.template, seed=found.seed)
    columns = found.template.columns()[0]
    return _search(rows.train + rows.validation, rows.tests, columns, n=n, share=share)


def _search(train: list[Row], tests: Mapping[str, list[Row]], columns: Sequence[str], *, n: int, share: float) -> Contamination:
    pairs = [(row.where, _text(row, columns)) for row in train]
    flat = [(row.where, _text(row, columns)) for rows in tests.values() for row in rows]
    found = overlaps(pairs, flat, n=n, share=share)
    matches, at = {}, 0
    for name, rows in tests.items():
        matches[name] = found[at : at + len(rows)]
        at += len(rows)
    return Contamination(matches, n, share, len(train))


def _rows(path: Path, columns: Sequence[str]) -> list[Row]:
    rows = load_rows(path, (), optional=columns)
    for row in rows:
        if all(row.values[column] in (None, "") for column in columns):
            raise DataError(f"{row.where} has no text in the columns {', '.join(columns)}; name others with columns")
    return rows


def _text(row: Row, columns: Sequence[str]) -> str:
    return " ".join(str(row.values[column]) for column in columns if row.values.get(column) not in (None, ""))
