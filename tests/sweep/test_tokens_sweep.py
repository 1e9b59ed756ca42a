"""Learned tokens in every causal architecture of transformers that can be built tiny.

``causal_tokens.json`` says of each: equal to the same computed by hand, or refused with this reason. In tests,
``python -m sweep.test_tokens_sweep`` writes the file.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")
import transformers.models.auto.modeling_auto as auto

from sweep.tiny_models import NotBuilt, build
from sweep.tokens import found, short

FILE = Path(__file__).with_name("causal_tokens.json")
KNOWN: dict[str, dict[str, str]] = json.loads(FILE.read_text()) if FILE.exists() else {}
CLASSES = {kind: name if isinstance(name, str) else name[0] for kind, name in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()}


def verdicts(kind: str) -> dict[str, str] | None:
    built = build(kind, CLASSES[kind])
    return None if isinstance(built, NotBuilt) else {name: short(verdict) for name, verdict in found(built).items()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", CLASSES)
def test_prompts_and_prefixes_are_right_or_refused_with_the_known_reason(kind: str) -> None:
    rows = verdicts(kind)
    if rows is None:
        assert kind not in KNOWN
        pytest.skip("not built")
    assert rows == KNOWN.get(kind), f"{kind} is not what the table says; look at it, then write the table again"


def test_the_table_has_no_wrong_result_and_no_crash() -> None:
    assert len(KNOWN) >= 160
    bad = {kind: rows for kind, rows in KNOWN.items() if any(verdict.startswith(("WRONG", "CRASH")) for verdict in rows.values())}
    assert bad == {}
    assert sum(rows["prompt"] == "equal" for rows in KNOWN.values()) >= 150
    assert sum(rows["prefix"] == "equal" for rows in KNOWN.values()) >= 140


if __name__ == "__main__":
    table = {kind: rows for kind in CLASSES if (rows := verdicts(kind)) is not None}
    FILE.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n")
