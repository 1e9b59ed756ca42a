"""The runs on WordNet supersenses that ``bench/compress.py`` and ``bench/average.py`` work on.

``python bench/supersense_runs.py`` trains what is missing, with seeds 0, 1, 2 each: half an epoch (125 steps) at the rates that
``bench/quality.py`` found, for LoRA, MiSS, and LoRA at a constant rate, one to two minutes a run on one core; and the whole
of examples/supersense.yaml, ten minutes a run. The runs of LoRA have an evaluation and a checkpoint each 12 or 50 steps, whose
adapter is kept. The runs lie in ``bench/.cache/supersense``, and an interrupted one is resumed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import trimtab as tt

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "supersense.yaml"
FOLDER = ROOT / "bench" / ".cache" / "supersense"
SEEDS = (0, 1, 2)
SHORT = {"epochs": 0.5, "head_learning_rate": 1e-3}


def _kept(steps: int) -> dict[str, Any]:
    return {"eval_every": steps, "save_every": steps, "keep_adapters": 1000}


#: name of a group of runs -> changes to the example
RUNS: dict[str, dict[str, Any]] = {
    "LoRA": {**SHORT, **_kept(12), "learning_rate": 4.64e-3},
    "MiSS": {**SHORT, "method": {"name": "MiSS"}, "learning_rate": 1e-3},
    "LoRA, constant rate": {**SHORT, **_kept(12), "learning_rate": 4.64e-3, "schedule": "constant"},
    "LoRA, full example": _kept(50),
}


def run(name: str, seed: int, *, ready: bool = False) -> Path | None:
    """The folder of one run; trained now if it is not there, or with ``ready`` None."""
    output = FOLDER / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
    if ready:
        return output if (output / "result.json").is_file() else None
    tt.train(EXAMPLE, overrides={**RUNS[name], "threads": 1, "seed": seed, "output": str(output)})
    return output


def main() -> None:
    """See the module."""
    for name in RUNS:
        for seed in SEEDS:
            print(run(name, seed).name, flush=True)


if __name__ == "__main__":
    main()
