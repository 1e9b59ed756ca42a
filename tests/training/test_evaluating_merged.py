"""A model that a run was merged into gives the run's figures and predictions, by the run's data or by a file alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab as tt
from tiny_text import rows, settings, write_data, write_jsonl
from trimtab.cli import main
from trimtab.training import RunError, evaluate, train

TEXTS = ["tree cat", "house red house", "flat road", "dog fish"]


@pytest.fixture(scope="module", params=["mean", "cls", "own"])
def merged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run, and ``m`` beside it, the base that it was merged into."""
    folder = tmp_path_factory.mktemp(request.param)
    write_data(folder / "data", train=60)
    config = settings(folder, pooling=request.param, epochs=4, learning_rate=1e-2)
    result = train(config)
    assert main(["merge", str(folder / "run" / "adapter"), "--base", config["model"], "--out", str(folder / "m")]) == 0
    return folder, result


def test_the_merged_model_gives_the_run_s_figures(merged: tuple[Path, Any]):
    folder, result = merged
    for split in ("validation", "test"):
        found = evaluate(folder / "m", on=split, like=folder / "run").metrics
        assert found == pytest.approx(result.metrics[split], abs=1e-4)
    chances = [each["probability"] for each in evaluate(folder / "m", on="test", like=folder / "run").predictions]
    assert max(chances) > 0.4  # of three classes; what a head reads that nobody trained is near a third


def test_a_file_alone_is_enough(merged: tuple[Path, Any], tmp_path: Path):
    folder, _ = merged
    file = write_jsonl(tmp_path / "more.jsonl", rows(15, seed=42))
    run, alone = evaluate(folder / "run", on=str(file)), evaluate(folder / "m", on=str(file))
    assert alone.metrics == pytest.approx(run.metrics, abs=1e-4)
    assert [each["label"] for each in alone.predictions] == [each["label"] for each in run.predictions]


def test_texts_are_predicted_without_any_data(merged: tuple[Path, Any]):
    folder, _ = merged
    run, alone = evaluate(folder / "run", inputs=TEXTS), evaluate(folder / "m", inputs=TEXTS)
    for mine, theirs in zip(alone.predictions, run.predictions, strict=True):
        assert mine["label"] == theirs["label"] and mine["probability"] == pytest.approx(theirs["probability"], abs=1e-4)


def test_the_command_line_reads_it(merged: tuple[Path, Any], capsys: pytest.CaptureFixture):
    folder, result = merged
    assert main(["eval", str(folder / "m"), "--like", str(folder / "run")]) == 0
    printed = " ".join(capsys.readouterr().out.split())  # a long path breaks the line somewhere
    assert f"accuracy {result.metrics['test']['accuracy']:.4f}" in printed
    assert main(["eval", str(folder / "m")]) == 2
    assert "has no data of its own, and 'test' is no file: name a file, or the run" in capsys.readouterr().err


def test_what_does_not_go_together_is_refused(merged: tuple[Path, Any], tmp_path: Path):
    folder, _ = merged
    with pytest.raises(RunError, match="is no merged model, and a run knows its own data"):
        evaluate(folder / "run", like=folder / "run")
    shutil.copytree(folder / "run", tmp_path / "other")
    (tmp_path / "other" / "task.json").write_text(json.dumps({"labels": ["animal", "colour", "taste"]}))
    with pytest.raises(RunError, match="it was not merged from that run"):
        evaluate(folder / "m", like=tmp_path / "other")


def test_a_bare_base_is_no_merged_classifier(tmp_path: Path):
    config = settings(tmp_path, pooling="own", epochs=1)
    train(config)
    with pytest.raises(RunError, match="is no merged classifier: it has no values for .*classifier"):
        evaluate(config["model"], like=tmp_path / "run")
    with pytest.raises(RunError, match="does not name its classes"):
        evaluate(config["model"], inputs=TEXTS)


def test_a_merged_decoder_gives_the_run_s_figures(tmp_path: Path):
    import tiny_decoder

    config = tiny_decoder.settings(tmp_path, epochs=1, evaluation={"new_tokens": 2})
    result = train(config)
    run = Path(config["output"])
    tt.merge_checkpoint(run / "adapter", config["model"], out=tmp_path / "m")
    found = evaluate(tmp_path / "m", on="validation", like=run).metrics
    assert found == pytest.approx({key: result.metrics["validation"][key] for key in found}, rel=1e-4)
    assert torch.isfinite(torch.tensor(found["loss"]))
