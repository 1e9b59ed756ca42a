"""What changes while training: which places learn, and how much of each. One file a schedule; the registry reads them all."""

from __future__ import annotations

from typing import Any

from trimtab.schedules.contract import Schedule
from trimtab.schedules.registry import entries, entry, from_dict, names, schedule, table
from trimtab.schedules.run import Run, scheduled

__all__ = ["Run", "Schedule", "entries", "entry", "from_dict", "names", "schedule", "scheduled", "table"]


def __getattr__(name: str) -> Any:
    """Schedules by their registered name."""
    if name[:1].isupper() and name in names():
        return entry(name).schedule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
