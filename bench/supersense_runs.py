"""The runs on WordNet supersenses that ``bench/compress.py`` and ``bench/average.py`` work on.

``python bench/supersense_runs.py`` trains what is missing: examples/supersense.yaml with seeds 0, 1, 2 as it stands, with another
method, and at a constant rate. The runs to average have an evaluation and a checkpoint each 50 steps, whose adapter is kept. It
takes about ten minutes a run on one core; the runs lie in ``bench/.cache/supersense``, and an interrupted one is resumed.
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
KEEP = {"eval_every": 50, "save_every": 50, "keep_adapters": 1000}
#: name of a group of runs -> changes to the example
RUNS: dict[str, dict[str, Any]] = {
    "LoRA": KEEP,
    "MiSS": {"method": {"name": "MiSS"}},
    "LoRA, constant rate": {**KEEP, "schedule": "constant"},
}


def run(name: str, seed: int) -> Path:
    """The folder of one run; trained now if it is not there."""
    output = FOLDER / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
    tt.train(EXAMPLE, overrides={**RUNS[name], "threads": 1, "seed": seed, "output": str(output)})
    return output


def main() -> None:
    """See the module."""
    for name in RUNS:
        for seed in SEEDS:
            print(run(name, seed).name, flush=True)


if __name__ == "__main__":
    main()
