"""What every method's config is: a frozen dataclass of hyperparameters, with the checks that they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from trimtab.core.errors import ShapeMismatch

if TYPE_CHECKING:
    from trimtab.core.contracts import Adapter

__all__ = ["MethodConfig", "Span"]


@dataclass(frozen=True)
class Span:
    """A continuous range of a hyperparameter, both ends included; searched on a logarithmic axis if ``log``."""

    low: float
    high: float
    log: bool = False


@dataclass(frozen=True)
class MethodConfig:
    """Base of all configs: a frozen dataclass with under ten fields; what a user writes as ``tt.LoRA(rank=8)``.

    Once registered, values are checked against the fields' annotations (``core.fieldtypes``) before ``__post_init__`` runs.

    Class attributes:
        search: fields worth searching: for each either a tuple of choices, in order, or a ``Span``.
        learning_rate: where Adam's learning rate for this method's parameters is worth searching.
    """

    adapter_class: ClassVar[type[Adapter]]
    search: ClassVar[Mapping[str, tuple[Any, ...] | Span]] = {}
    learning_rate: ClassVar[Span] = Span(1e-4, 1e-2, log=True)

    def require(self, ok: bool, message: str) -> None:
        """Raise ``ShapeMismatch`` with the config in the message unless ``ok``; for ``__post_init__``."""
        if not ok:
            raise ShapeMismatch(f"{self}: {message}")

    def require_rank(self, rank: Any) -> None:
        """``rank`` must be an integer of at least 1."""
        self.require(
            isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1,
            f"the rank must be an integer of at least 1, found {rank!r}",
        )

    def require_count(self, *names: str, optional: bool = False) -> None:
        """The named fields must be integers of at least 1, or None where ``optional``."""
        for name in names:
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            self.require(
                whole or (optional and value is None),
                f"{name} must be {'None or ' * optional}an integer of at least 1, found {value!r}",
            )

    def require_choice(self, name: str, known: Sequence[str]) -> None:
        """The named field must be one of ``known``."""
        value = getattr(self, name)
        self.require(value in known, f"{name} must be one of {', '.join(known)}, found {value!r}")

    def require_probability(self, name: str, p: float) -> None:
        """``p`` must lie in [0, 1)."""
        self.require(0 <= p < 1, f"{name} must be at least 0 and below 1, found {p!r}")
