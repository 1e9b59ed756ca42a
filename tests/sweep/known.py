"""Refusals that are right, with their reasons. What is not here and is not passed is a fault."""

from __future__ import annotations

import re
from typing import Any

__all__ = ["REASONS", "faults"]

#: method -> sentences that a refusal may be, and why each is right
REASONS: dict[str, tuple[tuple[str, str], ...]] = {
    "LoRA": (),
    "ParallelAdapter": (),
    "PrefixTuning": (),
    "PromptTuning": (),
}


def faults(model_type: str, rows: dict[str, Any]) -> list[str]:
    """What is wrong with one model's rows: wrong results, raw errors, refusals without a known reason, and where peft is better.

    Where the base itself cannot be trained on its inputs, a failing step is the base's.
    """
    found = []
    base = rows["base"].startswith("ok")
    for method, reasons in REASONS.items():
        for check, verdict in rows[method].items():
            if verdict.startswith("ok") or (check in ("gradient", "steps") and not base and not verdict.startswith("WRONG")):
                continue
            if verdict.startswith("refused") and any(re.search(pattern, verdict) for pattern, _ in reasons):
                continue
            found.append(f"{model_type}, {method}, {check}: {verdict}")
    if rows["peft"].startswith("ok") and not rows["LoRA"].get("steps", "").startswith("ok") and not found:
        found.append(f"{model_type}: peft trains it, and LoRA does not: {rows['LoRA']}")
    return found
