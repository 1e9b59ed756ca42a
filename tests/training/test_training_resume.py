"""A run that is killed anywhere and started again ends in the same bytes as one that was left alone."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from interrupted import Interrupted, interrupted_in
from tiny_text import settings
from trimtab.training import train

# 42 rows in batches of 4, two of them a step: 11 batches, 6 steps an epoch, the last one with a single batch
RUN = {"batch_size": 4, "accumulation": 2, "epochs": 2.5, "save_every": 4, "eval_every": 3, "dropout": 0.2, "warmup": 0.3,
       "learning_rate": 1e-2, "metric": "loss"}  # fmt: skip

KILLED = """
import os, signal, sys
from trimtab.training import train
from trimtab.training import trainer
where, step, config = sys.argv[1], int(sys.argv[2]), sys.argv[3]
name = {"step": "training_step", "save": "_save_rng_state"}[where]
original = getattr(trainer.AdapterTrainer, name)
def killed(self, *args, **kwargs):
    if self.state.global_step == step:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *args, **kwargs)
setattr(trainer.AdapterTrainer, name, killed)
train(config)
"""


def written(folder: Path) -> dict[str, bytes]:
    """Every tensor of the adapter, the curve, and the step of the best adapter, byte for byte."""
    (file,) = folder.joinpath("adapter").glob("*.safetensors")
    tensors = {key: value.numpy().tobytes() for key, value in load_file(file).items()}
    best = str(json.loads((folder / "result.json").read_text())["best_step"]).encode()
    return tensors | {"curve": (folder / "curve.json").read_bytes(), "best": best}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """The folder with model and data, and what an undisturbed run wrote."""
    folder = tmp_path_factory.mktemp("resume")
    train(settings(folder, **RUN))
    return folder, written(folder / "run")


@pytest.mark.parametrize("step", range(0, 15, 2))
def test_interrupted_at_any_step(undisturbed: tuple, tmp_path: Path, step: int):
    folder, expected = undisturbed
    config = settings(folder, **RUN, output=str(tmp_path / "run"))
    with interrupted_in(step):
        train(config)
    assert train(config).steps == 15
    assert written(tmp_path / "run") == expected


def test_a_checkpoint_names_no_folder_that_is_gone(undisturbed: tuple, tmp_path: Path):
    """Where the best evaluation is at a checkpoint, transformers notes that folder, and warns at the resumption if it has moved."""
    config = settings(undisturbed[0], **RUN | {"eval_every": 4}, output=str(tmp_path / "run"))
    with interrupted_in(5):
        train(config)
    state = json.loads((tmp_path / "run" / "checkpoints" / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["best_global_step"] == 4 and state["best_model_checkpoint"] is None


def test_interrupted_after_the_last_step(undisturbed: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, expected = undisturbed
    config = settings(folder, **RUN, output=str(tmp_path / "run"))

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr("trimtab.training.run._finish", interrupted)
        with pytest.raises(Interrupted):
            train(config)
    assert train(config).steps == 15
    assert written(tmp_path / "run") == expected


@pytest.mark.parametrize(("where", "step", "left"), [("step", 9, "checkpoint-8"), ("save", 8, "checkpoint-4")])
def test_killed_by_the_system(undisturbed: tuple, tmp_path: Path, where: str, step: int, left: str):
    folder, expected = undisturbed
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(settings(folder, **RUN, output=str(tmp_path / "run"))))
    script = [sys.executable, "-c", KILLED, where, str(step), str(config)]
    killed = subprocess.run(script, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [p.name for p in (tmp_path / "run" / "checkpoints").glob("checkpoint-*")] == [left]
    assert not (tmp_path / "run" / "result.json").exists()
    assert train(config).steps == 15
    assert written(tmp_path / "run") == expected
