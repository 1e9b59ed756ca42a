"""One process and two (gloo): the same configuration gives the same losses, predictions and adapter, up to rounding."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file

import tiny_decoder
import tiny_text
from trimtab.training import processes, train
from trimtab.training.sampler import EpochSampler
from trimtab.training.trainer import AdapterTrainer

# 42 rows and 8 a step: the last step of an epoch has 2 rows, of which one process gets none or one
CASES: dict[str, dict[str, Any]] = {
    "instructions": {"batch_size": 4, "accumulation": 2, "save_every": 4, "eval_every": 3},
    "classification": {"batch_size": 8, "epochs": 1, "dropout": 0.0, "head_dropout": 0.0, "label_smoothing": 0.1},
}


def settings(case: str, folder: Path, output: str) -> dict[str, Any]:
    make = tiny_decoder.settings if case == "instructions" else tiny_text.settings
    return make(folder, **CASES[case], output=str(folder / output))


def work(rank: int, port: int, case: str, folder: str, killed: int | None) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    original = AdapterTrainer.training_step

    def interrupted(self: AdapterTrainer, *args: Any, **kwargs: Any) -> Any:
        if killed is not None and self.state.global_step == killed:
            os._exit(0)
        return original(self, *args, **kwargs)

    AdapterTrainer.training_step = interrupted
    train(settings(case, Path(folder), "two"))
    torch.distributed.destroy_process_group()


def two_processes(case: str, folder: Path, *, killed: int | None = None) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(work, args=(port, case, str(folder), killed), nprocs=2)


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = (folder / "adapter").glob("*.safetensors")
    return load_file(file)


def compare(case: str, folder: Path) -> None:
    one, two = folder / "one", folder / "two"
    train(settings(case, folder, "one"))
    curves = [json.loads((run / "curve.json").read_text()) for run in (one, two)]
    assert [entry["step"] for entry in curves[0]] == [entry["step"] for entry in curves[1]]
    for a, b in zip(*curves, strict=True):
        for key in {"loss", "eval_loss", "learning_rate"} & set(a):
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-4), (key, a["step"])
    a, b = adapter(one), adapter(two)
    assert a.keys() == b.keys()
    for key, value in a.items():
        torch.testing.assert_close(value, b[key], atol=2e-4, rtol=1e-3)
    metrics = [json.loads((run / "result.json").read_text())["metrics"] for run in (one, two)]
    assert metrics[0].keys() == metrics[1].keys()
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in two.iterdir())
    if case == "instructions":
        texts = [(run / "predictions" / "boolq.jsonl").read_text() for run in (one, two)]
        assert texts[0] == texts[1]


@pytest.mark.slow
@pytest.mark.parametrize("case", list(CASES))
def test_two_processes_equal_one(case: str, tmp_path: Path):
    settings(case, tmp_path, "one")  # writes model and data before two processes look for them
    two_processes(case, tmp_path)
    compare(case, tmp_path)


@pytest.mark.slow
def test_two_processes_resume(tmp_path: Path):
    settings("instructions", tmp_path, "one")
    two_processes("instructions", tmp_path, killed=6)
    assert not (tmp_path / "two" / "result.json").exists()
    (checkpoint,) = (tmp_path / "two" / "checkpoints").glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-4"
    assert {f"rng_state_{rank}.pth" for rank in (0, 1)} < {path.name for path in checkpoint.iterdir()}
    two_processes("instructions", tmp_path)
    compare("instructions", tmp_path)


def test_rows_without_labels_fill_the_last_step():
    plain = EpochSampler([3, 1, 2, 5, 4], batch_size=4, seed=0, bucket=True)
    filled = EpochSampler([3, 1, 2, 5, 4], batch_size=4, seed=0, bucket=True, fill=5)
    assert list(filled) == [*plain, 5, 5, 5] and len(filled) == 8 and len(plain) == 5


def test_steps_that_cannot_be_shared_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(processes, "world", lambda: 3)
    with pytest.raises(ValueError, match="3 processes cannot share the rows .* batch_size = 4 nor accumulation = 2"):
        train(settings("instructions", tmp_path, "run"))


def test_alone_every_row_is_done_here():
    assert processes.spread([1, 2, 3], lambda rows: [row * 2 for row in rows]) == [2, 4, 6]
    assert processes.is_main() and processes.world() == 1
