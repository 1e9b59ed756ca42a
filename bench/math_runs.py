"""Word problems (ASDiv) on the small LLaMA of examples/tiny_lm: the runs that ``bench/average.py`` averages, beside supersenses.

``python bench/math_runs.py`` trains what is missing, seeds 0, 1, 2: LoRA for three epochs, an evaluation and a kept adapter each
12 steps, two minutes a run on one core. ASDiv's training rows make training and validation (a fifth, the same for all
seeds), its test rows the test. The model rarely finds a right number; loss and accuracy of the answer's tokens are what tells.
The runs lie in ``bench/.cache/math``, and an interrupted one is resumed.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from torch import nn

import trimtab as tt
from examples import tiny_lm
from supersense_runs import SEEDS
from trimtab import tasks
from trimtab.tasks.instructions.public import load_public
from trimtab.training.config import load_config
from trimtab.training.files import json_lines, write_text
from trimtab.training.folder import CONFIG, INFO

FOLDER = Path(__file__).resolve().parent / ".cache" / "math"


def files() -> dict[str, Path]:
    """The three splits as files; written now if they are not there."""
    found = {name: FOLDER / f"{name}.jsonl" for name in ("train", "validation", "test")}
    if not all(file.is_file() for file in found.values()):
        FOLDER.mkdir(parents=True, exist_ok=True)
        rows = {name: [row.values for row in chosen] for name, chosen in load_public("asdiv").items()}
        random.Random(0).shuffle(rows["train"])
        cut = len(rows["train"]) // 5
        rows["validation"], rows["train"] = rows["train"][:cut], rows["train"][cut:]
        for name, file in found.items():
            write_text(file, json_lines(rows[name]))
    return found


def run(seed: int, *, ready: bool = False) -> Path | None:
    """The folder of one run; trained now if it is not there, or with ``ready`` None."""
    output = FOLDER / f"LoRA-{seed}"
    if ready:
        return output if (output / "result.json").is_file() else None
    splits = files()
    tt.train({
        "task": "instruction-tuning", "model": str(tiny_lm.folder(show=True)),
        "data": {"train": str(splits["train"]), "validation": str(splits["validation"])},
        "method": {"name": "LoRA", "rank": 8}, "targets": "linear", "learning_rate": 3e-3, "epochs": 3, "batch_size": 16,
        "eval_every": 12, "save_every": 12, "keep_adapters": 1000, "threads": 1, "seed": seed, "output": str(output),
    })  # fmt: skip
    return output


def judge(folder: Path, split: str) -> tuple[nn.Module, Callable[[nn.Module], dict[str, float]]]:
    """The base of a run, and a function from it to token accuracy and loss on a split."""
    config = load_config(folder / CONFIG)
    config = config.model_copy(update={"data": config.data.model_copy(update={"validation": str(files()[split])})})
    task = tasks.get(config.task)
    bundle = task.restore(config, json.loads((folder / INFO).read_text("utf-8")), "validation")

    def score(model: nn.Module) -> dict[str, float]:
        metrics, _ = task.evaluate(config, bundle, console=Console(quiet=True))
        return {"test": metrics["token_accuracy"], "loss": metrics["loss"]}

    return bundle.model, score


def main() -> None:
    """See the module."""
    for seed in SEEDS:
        print(run(seed).name, flush=True)


if __name__ == "__main__":
    main()
