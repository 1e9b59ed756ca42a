"""A run's folder: what is deleted, who may write, and what errors and kills leave behind."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from interrupted import Interrupted, interrupted_in
from tiny_text import settings
from trimtab.core.files import locked, staged
from trimtab.training import ConfigError, RunError, train
from trimtab.training.folder import claimed, set_aside
from trimtab.training.trainer import AdapterTrainer


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException, step: int = 0) -> None:
    """Training raises ``error`` in ``step``."""
    original = AdapterTrainer.training_step

    def training_step(self: AdapterTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step:
            raise error
        return original(self, *args, **kwargs)

    monkeypatch.setattr(AdapterTrainer, "training_step", training_step)


# -- what is deleted

MINE = ("notes.txt", "adapter/README.md", "predictions/mine.jsonl", "steps/step-x/a", "checkpoints/checkpoint-old/a",
        "checkpoints/checkpoint-2-copy/a", "checkpoints/best-mine/a", ".notes.old", "src/main.py", ".config.yaml.swp")  # fmt: skip


def test_overwriting_deletes_only_what_a_run_wrote(tmp_path: Path):
    run = tmp_path / "run"
    train(settings(tmp_path, epochs=1, keep_adapters=2, save_every=2))
    assert (run / "steps" / "step-6").is_dir()
    for name in MINE:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text('{"mine": 1}')
    train(settings(tmp_path, epochs=1, seed=5), overwrite=True)
    found = content(run)
    assert all(found.pop(name) == b'{"mine": 1}' for name in MINE)
    assert sorted(p for p in found if not p.startswith("adapter/")) == [
        "config.yaml", "curve.json", "curve.png", "result.json", "task.json",
    ]  # fmt: skip
    assert len([p for p in found if p.startswith("adapter/")]) == 2 and yaml.safe_load(found["config.yaml"])["seed"] == 5


@pytest.mark.parametrize(
    "files",
    [
        {"config.yaml": "database: postgres\nport: 5432\n"},
        {"config.yaml": "data: wordnet-supersense\n"},  # one's own configuration, written by hand
        {"config.yaml": "data: wordnet-supersense\n", "task.json": "[1]"},
        {"config.yaml": "data: [", "task.json": "{}"},
        {"config.yaml": "name: game\n", "task.json": "{}", "result.json": "{}", "adapter/manifest.json": "{}"},
    ],
)
def test_a_folder_that_no_run_wrote_is_left_alone(tmp_path: Path, files: dict[str, str]):
    run = tmp_path / "run"
    for name, text in (files | {"src/main.py": "years of work"}).items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(text)
    before = content(run)
    for overwrite in (True, False):
        with pytest.raises(RunError, match="holds no trimtab run"):
            train(settings(tmp_path), overwrite=overwrite)
    assert content(run) == before


def test_the_project_folder_as_output_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    project = tmp_path / "project"
    project.mkdir()
    (project / "config.yaml").write_text(yaml.safe_dump(settings(tmp_path, output=".")))
    (project / "thesis.tex").write_text("years of work")
    monkeypatch.chdir(project)
    before = content(project)
    with pytest.raises(RunError, match="holds no trimtab run"):
        train("config.yaml", overwrite=True)
    assert content(project) == before


def test_an_overwritten_run_comes_back_where_the_new_one_comes_to_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    train(settings(tmp_path, epochs=1, keep_adapters=1))
    before = content(tmp_path / "run")
    with monkeypatch.context() as patch:
        failing(patch, RuntimeError("no memory"))
        with pytest.raises(RuntimeError, match="no memory"):
            train(settings(tmp_path, epochs=1, seed=5), overwrite=True)
    assert content(tmp_path / "run") == before
    with interrupted_in(3):  # a kill: the earlier run waits
        train(settings(tmp_path, epochs=1, seed=5), overwrite=True)
    kept = {key.removeprefix(".previous/"): v for key, v in content(tmp_path / "run").items() if key.startswith(".previous/")}
    assert kept == before
    assert train(settings(tmp_path, epochs=1, seed=5)).steps == 6
    assert not (tmp_path / "run" / ".previous").exists()


def test_a_kill_while_room_is_made_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    train(settings(tmp_path, epochs=1))
    run = tmp_path / "run"
    before, original, count = content(run), os.replace, [0]

    def replace(*args: Any) -> None:
        count[0] += 1
        if count[0] == 3:
            raise Interrupted
        original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(Interrupted):
            set_aside(run)
    assert content(run) != before
    with claimed(run):
        assert content(run) == before


# -- one at a time


def trainer(folder: Path, config: dict[str, Any]) -> subprocess.Popen:
    (folder / "c.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "trimtab.cli", "train", str(folder / "c.yaml")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def until(ready: Callable[[], bool], process: subprocess.Popen) -> None:
    for _ in range(1200):
        if ready():
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    pytest.fail("it takes too long")


def test_a_second_run_into_one_output_is_refused_at_the_start_and_a_killed_one_goes_on(tmp_path: Path):
    config = settings(tmp_path, max_steps=100_000, save_every=5)
    first = trainer(tmp_path, config)
    until(lambda: any((tmp_path / "run" / "checkpoints").glob("checkpoint-*")), first)
    second = trainer(tmp_path, config)
    shown = second.communicate(timeout=120)[0]
    assert second.returncode == 2 and f"another process (process {first.pid} on" in shown and "trains into" in shown
    with pytest.raises(RunError, match="another process"):
        train(config | {"seed": 3}, overwrite=True)
    assert first.poll() is None
    first.send_signal(signal.SIGKILL)
    first.wait()
    first.stdout.close()
    reached = max(int(p.name[11:]) for p in (tmp_path / "run" / "checkpoints").glob("checkpoint-*"))
    with interrupted_in(reached + 2):  # the same run takes it up where the other was
        train(config)
    assert not list(tmp_path.glob(".*.lock"))


def test_a_finished_run_is_shown_while_nobody_may_write(tmp_path: Path):
    first = train(settings(tmp_path, epochs=1))
    with locked(tmp_path / "run", "works in"):
        assert train(settings(tmp_path, epochs=1)).metrics == first.metrics


# -- what kills leave


def test_the_next_run_sweeps_what_a_kill_left_and_nothing_else(tmp_path: Path):
    config = settings(tmp_path, save_every=2)
    with interrupted_in(5):
        train(config)
    run = tmp_path / "run"
    left = [".curve.png.0123abcd.part", ".result.json.part", "checkpoints/.checkpoint-6.0123abcd.part/a",
            "checkpoints/.best-6.part/a", "steps/.step-4.89abcdef.part/a", "checkpoints/.checkpoint-4.0123abcd.old/a"]  # fmt: skip
    mine = [".notes.old", "checkpoints/.mine.0123abcd.part", ".curve.part", "adapter/.x.tmp"]
    for name in left + mine:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("x")
    with staged(run / "curve.json", folder=False) as alive:  # a writer that lives
        with interrupted_in(7):
            train(config)
        assert alive.exists()
        alive.write_text("x")
    found = content(run)
    assert not [name for name in left if name in found] and all(name in found for name in mine)
    (run / "curve.json").unlink()
    train(config)
    assert not [name for name in content(run) if name.endswith((".part", ".old")) and name not in mine]


# -- what errors leave

SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in (ValueError, KeyError, MemoryError, AssertionError)]
ERRORS = [RuntimeError, KeyboardInterrupt, *SLOW]


@pytest.mark.parametrize("kind", ERRORS)
def test_any_error_before_the_first_checkpoint_leaves_nothing(
    tmp_path: Path, kind: type[BaseException], monkeypatch: pytest.MonkeyPatch
):
    config = settings(tmp_path)
    with monkeypatch.context() as patch:
        failing(patch, kind("raw"), step=2)
        with pytest.raises(kind, match="raw"):
            train(config)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "model"]
    assert train(config | {"learning_rate": 1e-4, "max_steps": 2}).steps == 2  # corrected, it is another run


def test_a_kill_before_the_first_checkpoint_blocks_no_other_run(tmp_path: Path):
    with interrupted_in(2):
        train(settings(tmp_path))
    assert (tmp_path / "run" / "config.yaml").exists()
    assert train(settings(tmp_path, seed=4, max_steps=2)).steps == 2


def test_a_full_disk_is_told_and_the_run_goes_on_when_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = train(settings(tmp_path, save_every=4, output=str(tmp_path / "whole")))
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "run" / "x"))
    with monkeypatch.context() as patch:
        failing(patch, full, step=6)
        message = "the run in .*run cannot be written: No space left on device .*goes on from its last checkpoint"
        with pytest.raises(RunError, match=message):
            train(settings(tmp_path, save_every=4))
    again = train(settings(tmp_path, save_every=4))
    assert again.metrics == whole.metrics
    files = [next((tmp_path / name / "adapter").glob("*.safetensors")) for name in ("whole", "run")]
    assert all(torch.equal(*(load_file(file)[key] for file in files)) for key in load_file(files[0]))


@pytest.mark.parametrize(
    ("kind", "message"),
    [(errno.EROFS, "Read-only file system"), (errno.EACCES, "Permission denied"), (errno.ENOSPC, "No space left on device")],
)
def test_a_place_that_cannot_be_written_is_told_before_anything_else(
    tmp_path: Path, kind: int, message: str, monkeypatch: pytest.MonkeyPatch
):
    config, original = settings(tmp_path), os.open

    def refuse(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_CREAT and str(path).startswith(str(tmp_path)):
            raise OSError(kind, os.strerror(kind), str(path))
        return original(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(RunError, match=f"the run in .*run cannot be written: {message}"):
        train(config)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "model"]


def test_an_output_below_a_file_is_told(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="cannot be written: (Not a directory|File exists)"):
        train(settings(tmp_path, output=str(tmp_path / "file" / "run")))
    with pytest.raises(RunError, match="exists and holds no trimtab run"):
        train(settings(tmp_path, output=str(tmp_path / "file")), overwrite=True)
    assert (tmp_path / "file").read_text() == "x"


# -- what is told before anything is written

REFUSED = [
    ({"threads": 1_000_000}, "threads = 1000000 is more than this machine"),
    ({"seed": 2**70}, "seed: input should be less than 4294967296"),
    ({"epochs": float("inf")}, "epochs: input should be a finite number"),
    ({"learning_rate": float("nan")}, "learning_rate: input should be a finite number"),
    ({"epochs": 1e300}, "ask for .* optimizer steps, and a run has at most"),
    ({"batch_size": True}, "batch_size must be a number, found True"),
    ({"layers": [True]}, "layers must be a number, found"),
    ({"adapter": "\ud800"}, "holds half a character"),
    ({"output": "runs/\udcff"}, "holds half a character"),
    ({"method": {"name": "LoRA", "alpha": "16"}}, "LoRA: alpha must be a number or None, found '16'"),
    ({"method": {"name": "LoRA", "dropout": "0.1"}}, "LoRA: dropout must be a number, found '0.1'"),
    ({"schedules": [{"name": "IST", "interval": "10"}]}, "IST: interval must be an integer, found '10'"),
    ({"schedules": [{"name": "BudgetSchedule"}]}, "gives out the ranks of AdaLoRA adapters"),
    ({"schedules": [{"name": "IST", "updated": 1, "candidates": 50}]}, "schedules: there are 2 sets of 1 of 2 layers"),
    ({"schedules": [{"name": "LISA", "sampled": 7}]}, "schedules: sampled = 7 means 7 of 2 layers"),
    ({"schedules": [{"name": "LightPEFT", "heads": 9}]}, "schedules: heads=9 would take all of the 4"),
    ({"schedules": [{"name": "LightPEFT", "estimate": 2}]}, "first of which has a learning rate of zero.* at least 3 here"),
    ({"schedules": [{"name": "LightPEFT"}], "max_steps": 2, "warmup": 0}, "LightPEFT needs a run of at least 3 steps"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[str(n) for n in range(len(REFUSED))])
def test_what_cannot_work_is_told_and_leaves_nothing(tmp_path: Path, changes: dict, message: str):
    with pytest.raises((ConfigError, NotImplementedError), match=message):
        train(settings(tmp_path, **changes))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "model"]


@pytest.mark.parametrize("pooling", ["mean", "own"])
def test_rows_longer_than_the_models_positions_are_told(tmp_path: Path, pooling: str):
    from tiny_text import write_jsonl

    config = settings(tmp_path, pooling=pooling, epochs=1)
    long = [{"text": "red cat " * n, "label": "ab"[n % 2]} for n in range(1, 30)]
    write_jsonl(tmp_path / "data" / "train.jsonl", long)
    for split in ("validation", "test"):
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", long[:4])
    with pytest.raises(ConfigError, match="has positions for about 32 tokens, and the longest text has 60; lower data.max_length"):
        train(config)
    assert not (tmp_path / "run").exists()
    assert train(config, overrides={"data.max_length": 32}).steps == 4  # the corrected run is not blocked


def test_light_peft_trains_with_its_defaults_in_a_short_run(tmp_path: Path):
    config = settings(tmp_path, max_steps=29, schedules=["LightPEFT"], targets="attention | mlp")
    result = train(config)
    assert result.steps == 29 and result.model.bert.encoder.layer[0].attention.self.query.out_features == 24


@pytest.mark.parametrize(
    ("schedule", "message"),
    [({"name": "IST", "updated": 1, "candidates": 2}, "IST updates its scores every 10 steps, and so never in this run of 6 steps"),
     ({"name": "LISA", "sampled": 1}, "LISA draws other layers every 20 steps"),
     ({"name": "ReLoRA"}, "ReLoRA restarts every 1000 steps"),
     ({"name": "CheckpointAveraging", "every": 6}, "CheckpointAveraging takes a checkpoint before the last step every 6 steps")],
)  # fmt: skip
def test_what_never_happens_in_a_run_is_told(tmp_path: Path, schedule: dict, message: str):
    with pytest.warns(UserWarning, match=message):
        train(settings(tmp_path, epochs=1, schedules=[schedule]))


def test_layers_may_be_one_number(tmp_path: Path):
    result = train(settings(tmp_path, epochs=1, layers=0))
    assert result.trainable == (4 * 4 * (32 + 32) + 2 * 4 * (32 + 64)) + 3 * 32 + 3
