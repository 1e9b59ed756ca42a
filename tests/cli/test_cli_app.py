"""The command line: commands are found, errors are one sentence with exit code 2, --debug shows the traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tiny_text import settings
from trimtab.cli import commands, main
from trimtab.core.errors import TrimtabError


def test_every_file_is_a_command():
    import importlib

    assert {"train", "eval"} <= set(commands())
    for name, module in commands().items():
        assert (importlib.import_module(module).command.__doc__ or "").strip(), f"{name} has no help"


def test_help_lists_the_commands(capsys: pytest.CaptureFixture):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "train" in shown and "eval" in shown


def test_an_error_is_a_sentence_and_exit_code_2(capsys: pytest.CaptureFixture):
    assert main(["train", "no-such-file.yaml"]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("trimtab: there is no configuration file no-such-file.yaml") and shown.err.count("\n") == 1
    assert "Traceback" not in shown.err + shown.out


def test_debug_raises(capsys: pytest.CaptureFixture):
    with pytest.raises(TrimtabError):
        main(["train", "no-such-file.yaml", "--debug"])


def test_unknown_command_and_option(capsys: pytest.CaptureFixture):
    assert main(["trian"]) == 2
    assert main(["train", "--nope"]) == 2
    assert "trian" in capsys.readouterr().err


def test_train_here_then_eval_in_a_new_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings(tmp_path, epochs=1)))
    monkeypatch.chdir(tmp_path)
    assert main(["train", "c.yaml", "epochs=2", "method.rank=2"]) == 0
    shown = capsys.readouterr().out
    assert "rank: 2" in shown and "learning curve" in shown
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["epochs"] == 2
    command = [sys.executable, "-m", "trimtab.cli", "eval", "run", "--predictions", "p.jsonl"]
    evaluated = subprocess.run(command, capture_output=True, text=True, check=False)
    assert evaluated.returncode == 0, evaluated.stderr
    expected = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]["test"]["accuracy"]
    assert f"accuracy {expected:.4f}" in evaluated.stdout
    predictions = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert len(predictions) == 12 and set(predictions[0]) == {"label", "probability"}


def test_eval_predicts_texts_and_train_refuses_another_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings(tmp_path, epochs=1)))
    monkeypatch.chdir(tmp_path)
    assert main(["train", "c.yaml"]) == 0
    assert main(["eval", "c.yaml", "--text", "tree cat", "--text", "road blue"]) == 0
    shown = capsys.readouterr().out
    assert "tree cat" in shown and "road blue" in shown
    assert main(["train", "c.yaml", "epochs=3"]) == 2
    assert "epochs = 1.0 there, 3.0 now" in capsys.readouterr().err
    assert main(["train", "c.yaml", "epochs=3", "--overwrite"]) == 0


def test_schedules_and_the_page_of_one(capsys: pytest.CaptureFixture):
    assert main(["schedules"]) == 0
    listed = capsys.readouterr().out
    assert "IST" in listed and "LoRAPlus" in listed and "trainability" in listed
    assert main(["schedules", "IST"]) == 0
    assert "uniform" in capsys.readouterr().out
    assert main(["schedules", "--json"]) == 0
    assert '"schedule": "CheckpointAveraging"' in capsys.readouterr().out
    assert main(["schedules", "ISTT"]) == 2
    assert "nearest: IST" in capsys.readouterr().err


def test_a_methods_page_and_all_pages(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main(["methods", "LoRA"]) == 0
    shown = capsys.readouterr().out
    assert "2106.09685" in shown and "worth searching" in shown
    assert main(["methods", "--pages", str(tmp_path / "pages")]) == 0
    assert (tmp_path / "pages" / "LoRA.md").read_text().startswith("# LoRA\n")
    assert main(["methods", "LoRRA"]) == 2
    assert "nearest: LoRA" in capsys.readouterr().err
