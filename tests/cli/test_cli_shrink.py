"""compress, expand and average on the command line: from a run's folder to files that load, with what was tried printed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import trimtab as tt
from tiny_text import settings, write_data
from trimtab.cli import main
from trimtab.training import train
from trimtab.training.scoring import scorer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 18 steps with the adapters of four checkpoints."""
    folder = tmp_path_factory.mktemp("shrink")
    write_data(folder / "data")
    train(settings(folder, epochs=3, learning_rate=1e-2, save_every=3, eval_every=3, keep_adapters=4))
    return folder / "run"


def test_compress_tries_settings_on_validation_data(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "small.tern"
    options = ["--density", "20%,100%", "--alpha", "fit,1", "--rest", "int8", "--tolerance", "0"]
    assert main(["compress", str(run), "--out", str(out), *options]) == 0
    shown = capsys.readouterr().out
    record = json.loads((tmp_path / "small.tern.json").read_text())
    assert '"density": ["20%", "100%"]' in shown and "as it was" in shown and "times smaller than 16 bits" in shown
    assert record["settings"]["rest"] == "int8" and len(record["trials"]) in (3, 5)
    model, score = scorer(run)
    tt.load(model, out)
    chosen = max(row["score"] for row in record["trials"][1:] if row["density"] == record["density"])
    assert score(model) == pytest.approx(chosen, abs=1 / 12)  # the trial's head was not rounded
    reached = score(model)
    assert main(["expand", str(out), "--out", str(tmp_path / "back")]) == 0
    model, score = scorer(run)
    tt.load(model, tmp_path / "back")
    assert score(model) == reached


def test_compress_fits_scales_to_training_batches(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "fitted.tern"
    assert main(["compress", str(run), "--out", str(out), "--density", "10%", "--fit", "3"]) == 0
    record = json.loads((tmp_path / "fitted.tern.json").read_text())
    assert record["settings"]["fit"] == 3 and record["density"] == 0.1
    assert main(["compress", str(run / "adapter"), "--out", str(out), "--fit", "3"]) == 2
    assert "no run's folder" in capsys.readouterr().err


def test_average_of_a_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "mean"
    assert main(["average", str(run), "--out", str(out), "--strength", "0,0.7", "--last", "2,all"]) == 0
    shown = capsys.readouterr().out
    record = json.loads((out / "average.json").read_text())
    assert len(record["trials"]) == 4 and "of equal weight" in shown and record["gap"] is not None
    model, score = scorer(run)
    tt.load(model, out)
    assert score(model) == max(row["score"] for row in record["trials"])
    steps = [str(run / "steps" / f"step-{step}") for step in (15, 18)]
    assert main(["average", *steps, "--out", str(tmp_path / "two"), "--by", "step", "--strength", "1"]) == 0
    assert json.loads((tmp_path / "two" / "average.json").read_text())["weights"] == pytest.approx([15 / 33, 18 / 33])


def test_errors_are_sentences(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = str(tmp_path / "x")
    for arguments, said in (
        (["compress", str(run), "--out", out, "--alpha", "much"], "alpha is a number or fit; found 'much'"),
        (["compress", str(run), "--out", out, "--density", "20"], "at most 1"),
        (["compress", str(run / "adapter"), "--out", out, "--density", "0.1,0.2"], "no run's folder"),
        (["expand", str(run / "config.yaml"), "--out", out], "is no compressed update"),
        (["average", str(tmp_path), "--out", out], "keep_adapters"),
        (["average", str(run), "--out", out, "--last", "few"], "found 'few'"),
    ):
        assert main(arguments) == 2
        assert said in capsys.readouterr().err
    assert not Path(out).exists()
