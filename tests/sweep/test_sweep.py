"""Every model type of transformers that can be built tiny, with four methods, and peft's LoRA beside them.

Each model's rows are written to a file (``sweep.table`` makes the table of them all, ``make sweep`` runs both). A model fails
for a wrong result without an error, for an error that is not ours, and for a refusal that is not known (``sweep.known``).
"""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")
from sweep import known, table
from sweep.checks import METHODS, examine, peft_trains, trains_itself
from sweep.tiny_models import NotBuilt, build, model_types


@pytest.mark.parametrize("model_type", ["bert", "llava", "t5"])
def test_a_model_passes_every_check_with_lora(model_type: str) -> None:
    verdicts = examine(build(model_type), METHODS["LoRA"])
    assert all(verdict.startswith("ok") for verdict in verdicts.values()) and len(verdicts) == 6, verdicts


@pytest.mark.slow
@pytest.mark.parametrize("model_type", model_types())
def test_a_model_is_right_or_refused_with_a_known_reason(model_type: str) -> None:
    built = build(model_type)
    if isinstance(built, NotBuilt):
        table.write(model_type, {"not built": built.reason})
        pytest.skip(built.reason)
    rows: dict = {"class": built.class_name, "base": trains_itself(built), "peft": peft_trains(built)}
    for name, method in METHODS.items():
        rows[name] = examine(built, method)
    table.write(model_type, rows)
    assert known.faults(model_type, rows) == []
