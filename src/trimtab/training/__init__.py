"""Training: the run on transformers' Trainer, its data, its curve, evaluation. Imported by its first use."""

from __future__ import annotations

from typing import Any

__all__ = ["ConfigError", "DataError", "RunError", "RunResult", "TrainConfig", "evaluate", "load_config", "train"]

# imported by name, so that a configuration can be checked without loading transformers
_HOMES = {
    "ConfigError": "errors",
    "DataError": "errors",
    "RunError": "errors",
    "TrainConfig": "config",
    "load_config": "config",
    "RunResult": "run",
    "train": "run",
    "evaluate": "evaluation",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
