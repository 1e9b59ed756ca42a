"""Errors of configuration, data and runs; each message says what was asked, where, what was found, what to do."""

from __future__ import annotations

from trimtab.core.errors import TrimtabError

__all__ = ["ConfigError", "DataError", "RunError"]


class ConfigError(TrimtabError, ValueError):
    """A key or a value of a configuration that cannot be used."""


class DataError(TrimtabError, ValueError):
    """Rows, columns, labels or files that cannot be trained on."""


class RunError(TrimtabError, RuntimeError):
    """A run that cannot start, go on or be read: another run's folder, values that are not finite, no result."""
