"""Published figures on the files of the LLM-Adapters release; runs where TRIMTAB_LLM_ADAPTERS names a checkout of it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from trimtab.audit.contamination import contamination
from trimtab.tasks.instructions.readers import reader_for

RELEASE = Path(os.environ.get("TRIMTAB_LLM_ADAPTERS", "nowhere"))
pytestmark = pytest.mark.skipif(not RELEASE.is_dir(), reason="TRIMTAB_LLM_ADAPTERS names no checkout of LLM-Adapters")
COLUMNS = ("instruction", "original_text")


@pytest.mark.parametrize(
    ("name", "published", "corrected"),
    [("gsm8k", 58.5, 58.4), ("SVAMP", 80.3, 80.4), ("AddSub", 93.7, 93.7), ("MultiArith", 93.3, 93.3), ("SingleEq", 95.3, 95.3),
     ("AQuA", 42.9, 48.4)],
)  # fmt: skip
def test_readers_on_the_teachers_outputs(name: str, published: float, corrected: float):
    rows = json.loads((RELEASE / "dataset" / name / "test.json").read_text("utf-8"))
    reader = reader_for(name)
    for rule, expected in ((True, published), (False, corrected)):
        right = [reader.right(reader.read(r["output"], published=rule), reader.answer(r["answer"], name)) for r in rows]
        assert 100 * sum(right) / len(right) == pytest.approx(expected, abs=0.05)


def test_mawps_holds_most_of_three_test_sets():
    tests = [RELEASE / "dataset" / name / "test.json" for name in ("AddSub", "MultiArith", "SingleEq", "SVAMP", "mawps")]
    found = contamination([RELEASE / "dataset" / "mawps" / "trainset.json"], tests, columns=COLUMNS)
    assert found.contaminated() == {"AddSub": 327, "MultiArith": 490, "SingleEq": 436, "SVAMP": 0, "mawps": 28}


def test_the_older_training_set_holds_svamp():
    found = contamination([RELEASE / "ft-training_set" / "math_data.json"], [RELEASE / "dataset" / "SVAMP" / "test.json"])
    assert found.contaminated() == {"SVAMP": 800}
