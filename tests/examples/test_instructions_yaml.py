"""examples/instructions.yaml runs as it is written, on a toy model and toy rows."""

from __future__ import annotations

from pathlib import Path

from tiny_decoder import settings
from trimtab.training import train

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "instructions.yaml"


def test_the_example_trains_and_scores(tmp_path: Path):
    toy = settings(tmp_path)
    changes = {"model": toy["model"], "data.source": toy["data"]["source"], "output": toy["output"], "epochs": 1, "threads": 1}
    result = train(EXAMPLE, overrides=changes)
    assert result.metrics["boolq"]["rows"] == 12 and (tmp_path / "run" / "predictions" / "boolq.jsonl").is_file()
