"""Rows from packaged sets, files and the Hub, each carrying where it came from, so that an error can name the line.

A row is ``Row(values, where)``: the needed columns alone, and ``where`` such as ``train.jsonl, line 17``.
"""

from __future__ import annotations

import csv
import io
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.core.errors import nearest
from trimtab.training.config import DataConfig
from trimtab.training.errors import DataError
from trimtab.training.strict import check_characters, parse_json, read_text

__all__ = ["PACKAGED", "SPLITS", "Row", "hold_out", "load_rows", "load_source", "load_splits", "no_value", "packaged_path"]

SPLITS = ("train", "validation", "test")
PACKAGED = Path(__file__).resolve().parent.parent / "data"
_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_ALIASES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}


@dataclass(frozen=True)
class Row:
    """One example: the needed columns, and the file and line (or the split and index) that it stands at."""

    values: dict[str, Any]
    where: str


def packaged_path(name: str) -> Path | None:
    """Folder of the data set that ships with trimtab under ``name``, or None."""
    folder = PACKAGED / name
    return folder if "/" not in name and name not in ("", ".", "..") and folder.is_dir() else None


def load_splits(config: DataConfig, columns: Sequence[str], *, seed: int = 0) -> dict[str, list[Row]]:
    """The splits that ``config`` names, as ``{"train": rows, "validation": rows, "test": rows}`` (test may be absent).

    Args:
        columns: names of the columns that every row must have, with values that are not null.
        seed: draws the rows held out where there is no validation split.

    Raises:
        DataError: no such data, an empty or malformed file, or a missing column or value; with file and line.
    """
    found: dict[str, list[Row]] = {}
    if config.source is not None:
        found = load_source(config.source, columns)
    for split in SPLITS:
        path = getattr(config, split)
        if path is not None:
            found[split] = load_rows(Path(path), columns)
    if "train" not in found:
        raise DataError(f"the data {config.source!r} has no training split; found {', '.join(found) or 'nothing'}")
    if "validation" not in found:
        found["train"], found["validation"] = hold_out(found["train"], config.validation_fraction, seed)
    return {split: found[split] for split in SPLITS if split in found}


def load_rows(path: Path, columns: Sequence[str], *, optional: Sequence[str] = ()) -> list[Row]:
    """All rows of one .jsonl, .json (a list of objects), .csv or .parquet file, in its order.

    Args:
        columns: names of the columns that every row must have, with a value.
        optional: further columns; a row that lacks one gets None.

    Raises:
        DataError: no such file, another suffix, nothing in it, a malformed line, or a missing column or value.
    """
    if not path.is_file():
        raise DataError(f"there is no data file {path}")
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    if path.suffix not in readers:
        raise DataError(f"{path} has the suffix {path.suffix!r}; trimtab reads {', '.join(_SUFFIXES)}")
    rows = list(_checked(readers[path.suffix](path), columns, optional))
    if not rows:
        raise DataError(f"{path} is empty; give a file with at least one row")
    return rows


def no_value(value: Any) -> bool:
    """Whether a value is none: null, NaN, or a text of blanks alone."""
    return value is None or (isinstance(value, float) and math.isnan(value)) or (isinstance(value, str) and not value.strip())


def _checked(rows: Iterable[Row], columns: Sequence[str], optional: Sequence[str] = ()) -> Iterator[Row]:
    """Rows cut to ``columns`` and ``optional``; the first row that lacks one of ``columns`` is an error."""
    for row in rows:
        for column in columns:
            if column not in row.values:
                hint = nearest(column, row.values)
                raise DataError(f"{row.where} has no column {column!r}; found {sorted(map(str, row.values))}{hint}")
            if no_value(row.values[column]):
                found = f" (found {row.values[column]!r})" if row.values[column] not in (None, "") else ""
                raise DataError(f"{row.where} has no value in the column {column!r}{found}; fill it in or drop the row")
        kept = {column: row.values.get(column) for column in (*columns, *optional)}
        check_characters(kept, row.where)
        yield Row(kept, row.where)


def _jsonl(path: Path) -> Iterator[Row]:
    for number, line in enumerate(io.StringIO(read_text(path)), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        values = parse_json(line, where)
        if not isinstance(values, dict):
            raise DataError(f"{where} must be a JSON object; found {type(values).__name__}")
        yield Row(values, where)


def _json(path: Path) -> Iterator[Row]:
    entries = parse_json(read_text(path), str(path))
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(f"{path} must be a JSON list of objects, one a row; a file with one object a line is named .jsonl")
    for index, values in enumerate(entries, 1):
        yield Row(values, f"{path}, entry {index}")


def _csv(path: Path) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(read_text(path, newline=""), newline=""), strict=True)
    try:
        header = next(reader, [])
        _refuse_twice(header, f"{path}, line 1")
        for fields in reader:
            where = f"{path}, line {reader.line_num}"
            if not fields:  # an empty line
                continue
            if len(fields) != len(header):
                raise DataError(f"{where} has not the {len(header)} fields of the header, but {len(fields)}")
            yield Row(dict(zip(header, fields, strict=True)), where)
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num} is no CSV: {error}") from error


def _refuse_twice(header: Sequence[str], where: str) -> None:
    """Refuse columns of one name, blanks around it aside; columns without a name are nobody's."""
    names = [name.strip() for name in header]
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise DataError(f"{where}: the column {twice[0]!r} is there {names.count(twice[0])} times; rename or drop all but one")


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        _refuse_twice(pyarrow.parquet.read_schema(path).names, str(path))
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is no Parquet file that can be read: {error}") from error
    for index, values in enumerate(table.to_pylist(), 1):
        yield Row(values, f"{path}, row {index}")


def load_source(source: str, columns: Sequence[str], *, optional: Sequence[str] = ()) -> dict[str, list[Row]]:
    """All splits of a packaged set, a folder with train / validation / test files, one file (the training split), or a Hub id.

    Args:
        source: a Hub id may name a configuration behind a colon, as in ``gsm8k:main``.
        columns, optional: see ``load_rows``.

    Raises:
        DataError: no such data, or rows that cannot be used.
    """
    path = packaged_path(source) or Path(source)
    if path.is_dir():
        return _from_folder(path, columns, optional)
    if path.is_file():
        return {"train": load_rows(path, columns, optional=optional)}
    if path.suffix in _SUFFIXES or source.startswith((".", "/")):
        raise DataError(f"there is no data file or folder {source}")
    return _from_hub(source, columns, optional)


def _from_folder(folder: Path, columns: Sequence[str], optional: Sequence[str]) -> dict[str, list[Row]]:
    found = {}
    for split, aliases in _ALIASES.items():
        files = [folder / (alias + suffix) for alias in aliases for suffix in _SUFFIXES]
        files = [file for file in files if file.is_file()]
        if len(files) > 1:
            raise DataError(f"{folder} has several files for {split}: {', '.join(f.name for f in files)}; keep one of them")
        if files:
            found[split] = load_rows(files[0], columns, optional=optional)
    if not found:
        raise DataError(f"{folder} has no train, validation or test file with one of the suffixes {', '.join(_SUFFIXES)}")
    return found


def _from_hub(source: str, columns: Sequence[str], optional: Sequence[str]) -> dict[str, list[Row]]:
    import datasets

    packaged = sorted(entry.name for entry in PACKAGED.iterdir() if entry.is_dir())
    try:
        name, _, configuration = source.partition(":")
        loaded = datasets.load_dataset(name, configuration or None)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"the data {source!r} is no packaged set ({', '.join(packaged)}), no file or folder here, and cannot be loaded "
            f"from the Hub: {error}"
        ) from error
    found = {}
    for split, aliases in _ALIASES.items():
        for alias in aliases:
            if alias in loaded:
                rows = (Row(values, f"{source}, {alias}, row {i}") for i, values in enumerate(_named(loaded[alias]), 1))
                found[split] = list(_checked(rows, columns, optional))
                break
    return found


def _named(split: Any) -> Iterator[dict[str, Any]]:
    """Rows of a ``datasets`` split, class numbers replaced by the class names that the split declares."""
    names = {key: feature.names for key, feature in split.features.items() if hasattr(feature, "names")}
    for values in split:
        # -1 is the Hub's sign for a hidden label
        yield {k: (names[k][v] if v >= 0 else None) if k in names and v is not None else v for k, v in values.items()}


def hold_out(rows: list[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Training rows, and a share of them for validation, drawn by ``seed``; both in the order of ``rows``.

    Raises:
        DataError: there is one row alone.
    """
    if len(rows) < 2:
        raise DataError(f"{rows[0].where} is the only training row; give a validation split, or at least two rows")
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    cut = max(1, round(len(rows) * fraction))
    held = set(order[:cut])
    return [r for i, r in enumerate(rows) if i not in held], [r for i, r in enumerate(rows) if i in held]
