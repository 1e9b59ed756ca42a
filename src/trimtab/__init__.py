"""trimtab: plan, attach, train, search, shrink, merge, move, audit and serve the small part of a large frozen model."""

from __future__ import annotations

from typing import Any

from trimtab.core.activation import activate, disabled, effective_weight, named_parameters, parameters, routed, summary
from trimtab.core.attach import attach, detach
from trimtab.core.checkpoint import load, save
from trimtab.core.contracts import ActivationAdapter, MethodConfig, Reparameterization, Selection, Span, TokenAdapter
from trimtab.core.errors import (
    CheckpointMismatch,
    GradientMismatch,
    NoMatch,
    NotMergeable,
    ShapeMismatch,
    TrimtabError,
    Unsupported,
    WriteError,
)
from trimtab.core.merging import merge, unmerge
from trimtab.core.registry import get, method, names
from trimtab.core.site import Operation, Site

__version__ = "0.1.0"

__all__ = [
    "ActivationAdapter",
    "CheckpointMismatch",
    "GradientMismatch",
    "MethodConfig",
    "NoMatch",
    "NotMergeable",
    "Operation",
    "Reparameterization",
    "Selection",
    "Span",
    "ShapeMismatch",
    "Site",
    "TokenAdapter",
    "TrimtabError",
    "Unsupported",
    "WriteError",
    "activate",
    "attach",
    "detach",
    "disabled",
    "effective_weight",
    "load",
    "merge",
    "method",
    "methods",
    "named_parameters",
    "parameters",
    "routed",
    "save",
    "summary",
    "unmerge",
]

# verbs that need more than torch, safetensors and numpy; imported by their first use
_VERBS = {
    "search_weights": "trimtab.artifacts.lorahub",
    "convert": "trimtab.artifacts.convert",
    "project": "trimtab.artifacts.project",
    "merge_checkpoint": "trimtab.artifacts.merge_base",
    "combine": "trimtab.artifacts.combine",
    "merge_rule": "trimtab.artifacts.rules",
    "merge_rules": "trimtab.artifacts.rules",
    "average": "trimtab.artifacts.average",
    "compress": "trimtab.artifacts.compress",
    "expand": "trimtab.artifacts.expand",
    "methods": "trimtab.core.probe",
    "plan": "trimtab.training.plan",
    "spans": "trimtab.methods.additive.reft",
    "train": "trimtab.training",
    "transfer": "trimtab.distillation",
    "evaluate": "trimtab.training",
    "Schedule": "trimtab.schedules.contract",
    "schedule": "trimtab.schedules.registry",
    "scheduled": "trimtab.schedules.run",
    "load_base": "trimtab.training.models",
    "compress_base": "trimtab.artifacts.compress_base",
    "BaseSketch": "trimtab.artifacts.compress_base",
    "expand_base": "trimtab.artifacts.expand_base",
    "save_base": "trimtab.artifacts.expand_base",
}


def __getattr__(name: str) -> Any:
    """Methods and schedules by their registered name, and the verbs, each imported by its first use."""
    if name in _VERBS:
        from importlib import import_module

        return getattr(import_module(_VERBS[name]), name)
    if name[:1].isupper() and name in names():
        return get(name)
    if name[:1].isupper():
        from trimtab import schedules

        if name in schedules.names():
            return schedules.entry(name).schedule
    raise AttributeError(f"module 'trimtab' has no attribute {name!r}")


def __dir__() -> list[str]:
    from trimtab import schedules

    return sorted({*__all__, *names(), *schedules.names(), *_VERBS})
