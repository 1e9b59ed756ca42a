"""What changes while training: which places learn, and how much of each."""

from trimtab.schedules.bilevel import BilevelCompetition
from trimtab.schedules.contract import Schedule

__all__ = ["BilevelCompetition", "Schedule"]
