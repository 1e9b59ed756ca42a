"""A small table: rows that a program can read, text that a person can."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

__all__ = ["Table"]


class Table:
    """Rows under named columns; ``str(table)`` aligns them, ``table.records()`` gives dictionaries.

    Args:
        columns: names.
        title: printed above.
        sums: columns that a last line adds up.
        limit: rows printed before the middle is left out; ``records`` always has all.

    Attributes:
        notes: sentences printed below the rows.
    """

    def __init__(self, columns: tuple[str, ...], *, title: str = "", sums: tuple[str, ...] = (), limit: int = 40):
        self.columns, self.title, self.sums, self.limit = columns, title, sums, limit
        self.rows: list[tuple[Any, ...]] = []
        self.notes: list[str] = []

    def add(self, *row: Any) -> None:
        """Append one row, a value a column."""
        if len(row) != len(self.columns):
            raise ValueError(f"a row of {len(row)} values for {len(self.columns)} columns {self.columns}")
        self.rows.append(row)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.records())

    def records(self) -> list[dict[str, Any]]:
        """One dictionary a row."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]

    def column(self, name: str) -> list[Any]:
        """All values of one column."""
        index = self.columns.index(name)
        return [row[index] for row in self.rows]

    def total(self, name: str) -> Any:
        """Sum of a column."""
        return sum(self.column(name))

    def __str__(self) -> str:
        shown = [tuple(map(_text, row)) for row in self.rows]
        if len(shown) > self.limit:
            half = self.limit // 2
            gap = (f"... {len(shown) - 2 * half} more", *[""] * (len(self.columns) - 1))
            shown = [*shown[:half], gap, *shown[-half:]]
        if self.sums and self.rows:
            shown.append(
                tuple(_text(self.total(c)) if c in self.sums else ("total" if i == 0 else "") for i, c in enumerate(self.columns))
            )
        lines = [self.columns, *shown]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        numeric = [bool(self.rows) and all(isinstance(v, (int, float)) for v in self.column(c)) for c in self.columns]
        text = [
            "  ".join(
                cell.rjust(w) if right else cell.ljust(w) for cell, w, right in zip(line, widths, numeric, strict=True)
            ).rstrip()
            for line in lines
        ]
        text.insert(1, "  ".join("-" * w for w in widths))
        return "\n".join(([self.title] if self.title else []) + text + self._notes())

    def _notes(self) -> list[str]:
        half = self.limit // 2
        cut = len(self.notes) - 2 * half
        return self.notes if cut <= 0 else [*self.notes[:half], f"... {cut} more", *self.notes[-half:]]

    __repr__ = __str__


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)
