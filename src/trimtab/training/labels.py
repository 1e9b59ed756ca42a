"""Class labels as they stand in data: which are one label written in several ways, and which cannot be told apart.

``" cat"`` is ``"cat"``, and the number 1 is the number 1.0; that is said in a warning, with the lines. Whether true and 1, or the
texts "1" and "1.0", are one class nobody can know: refused. Letters of another case are other labels, as ever, with a warning.
"""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Iterable, Sequence

from trimtab.core.errors import nearest
from trimtab.training.data import Row
from trimtab.training.errors import DataError

__all__ = ["check_known", "label_names", "label_of"]


def label_of(row: Row, column: str, known: Iterable[str] = ()) -> str:
    """The label of a row, in the one way that it is written.

    Args:
        known: labels of a finished run, which may be written as ``str`` writes them.

    Raises:
        DataError: it is NaN, or no text, number or truth value.
    """
    value = row.values[column]
    if not isinstance(value, str | int | float):
        raise DataError(f"{row.where}: a label is a text, a number, or true or false; found {value!r} in the column {column!r}")
    if isinstance(value, str):
        name = " ".join(unicodedata.normalize("NFC", value).split())
        if name.lower() == "nan":
            raise DataError(f"{row.where}: the label {value!r} is how missing values are written; drop the row, or name the class")
        return name if name in known or value not in known else value
    whole = isinstance(value, float) and value.is_integer() and str(value) not in known
    return str(int(value)) if whole else str(value)


def label_names(rows: Sequence[Row], column: str) -> list[str]:
    """The different labels of the training rows, sorted.

    Raises:
        DataError: labels that may or may not be one class, each with a line where it stands.
    """
    ways: dict[str, dict[str, Row]] = {}  # label -> how it is written -> the first row with it
    for row in rows:
        ways.setdefault(label_of(row, column), {}).setdefault(repr(row.values[column]), row)
    names = sorted(ways)
    first = {name: next(iter(found.values())) for name, found in ways.items()}
    _refuse_look_alikes(names, first, column)
    for name in names:
        if len(ways[name]) > 1:
            written = "; ".join(f"{way} ({row.where})" for way, row in list(ways[name].items())[:4])
            warnings.warn(f"the label {name!r} is written in {len(ways[name])} ways, taken for one: {written}", stacklevel=3)
    by_case: dict[str, list[str]] = {}
    for name in names:
        by_case.setdefault(name.casefold(), []).append(name)
    for alike in by_case.values():
        if len(alike) > 1:
            written = "; ".join(f"{name!r} ({first[name].where})" for name in alike)
            warnings.warn(f"labels that differ in the case of letters alone are different classes: {written}", stacklevel=3)
    return names


def _refuse_look_alikes(names: Sequence[str], first: dict[str, Row], column: str) -> None:
    numbers: dict[float, str] = {}
    truths = [name for name in names if isinstance(first[name].values[column], bool)]
    for name in names:
        number = _number(name)
        if number is None:
            continue
        if truths and number in (0, 1):
            raise DataError(
                f"the labels {truths[0]!r} ({first[truths[0]].where}) and {name!r} ({first[name].where}) may be one class or two; "
                "write truth values alike in all rows"
            )
        other = numbers.setdefault(number, name)
        if other != name:
            raise DataError(
                f"the labels {other!r} ({first[other].where}) and {name!r} ({first[name].where}) are the same number, and may be "
                "one class or two; write the number alike in all rows, or give the classes names"
            )


def _number(name: str) -> float | None:
    try:
        return float(name)
    except ValueError:
        return None


def check_known(rows: Sequence[Row], labels: Sequence[str], split: str, column: str) -> None:
    """Refuse labels that no training row has: the model could never be right on them."""
    known = set(labels)
    found = [(row, label_of(row, column, known)) for row in rows]
    strangers = [(row, label) for row, label in found if label not in known]
    if strangers:
        row, label = strangers[0]
        raise DataError(
            f"{row.where} ({split}): the label {label!r} is not in the training data{nearest(label, labels)}; "
            f"{len({label for _, label in strangers})} such labels on {len(strangers)} rows: correct them, or add training rows"
        )
