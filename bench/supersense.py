"""The defaults of examples/supersense.yaml: how they were found, and what they reach.

``python bench/supersense.py`` trains the example with seeds 0, 1, 2 and measures the test split; it takes about nine minutes on
two cores. ``python bench/supersense.py --search`` runs the search below instead, one seed, on the validation split alone,
and takes about forty. Both print a table and write ``bench/results/supersense_defaults.json``, each its own part of it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from rich.console import Console
from rich.table import Table

import trimtab as tt

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "supersense.yaml"
RESULTS = ROOT / "bench" / "results" / "supersense_defaults.json"
SEEDS = (0, 1, 2)
#: changes to the example, one line each; the empty one is the example itself
SEARCH: tuple[dict[str, Any], ...] = (
    {},
    {"pooling": "cls"},
    {"pooling": "own"},
    {"dropout": None},
    {"label_smoothing": 0.0},
    {"learning_rate": 5e-4},
    {"learning_rate": 2e-3},
    {"method.alpha": 32},
    {"epochs": 3},
)


def one(changes: dict[str, Any], seed: int) -> dict[str, Any]:
    """Train the example with ``changes``; its figures as a row."""
    with tempfile.TemporaryDirectory() as folder:
        result = tt.train(EXAMPLE, overrides={**changes, "seed": seed, "output": f"{folder}/run"})
    return {
        "changes": changes,
        "seed": seed,
        "trainable": result.trainable,
        "share": result.trainable / result.total,
        "adapter_bytes": result.adapter_bytes,
        "seconds": round(result.seconds, 1),
        "best_step": result.best_step,
        "validation": result.metrics["validation"]["accuracy"],
        "test": result.metrics["test"]["accuracy"],
        "versions": result.versions,
    }


def write(part: str, value: Any) -> None:
    """Replace one part of the results file."""
    stored = json.loads(RESULTS.read_text("utf-8")) if RESULTS.is_file() else {}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(stored | {part: value}, indent=1) + "\n", "utf-8")


def search(console: Console) -> None:
    """One seed for each change; validation accuracy alone is looked at."""
    rows = []
    table = Table("change", "validation accuracy", "training, s", title="search on the validation split, seed 0")
    for changes in SEARCH:
        row = one(changes, seed=0)
        del row["test"]  # the search does not see it
        rows.append(row)
        console.print(changes, row["validation"])
        table.add_row(str(changes or "the example"), f"{row['validation']:.4f}", f"{row['seconds']:.0f}")
        write("search", rows)
    console.print(table)


def final(console: Console) -> None:
    """Seeds 0, 1, 2 of the example on the test split, with mean and standard deviation."""
    rows = [one({}, seed) for seed in SEEDS]
    table = Table("seed", "trainable", "share", "validation", "test", "training, s", title="examples/supersense.yaml")
    for row in rows:
        accuracies = f"{row['validation']:.4f}", f"{row['test']:.4f}"
        table.add_row(str(row["seed"]), f"{row['trainable']:,}", f"{row['share']:.2%}", *accuracies, f"{row['seconds']:.0f}")
    tests = [row["test"] for row in rows]
    summary = {"mean": statistics.mean(tests), "standard_deviation": statistics.stdev(tests), "lowest": min(tests)}
    console.print(table)
    console.print("test accuracy: " + ", ".join(f"{key.replace('_', ' ')} {value:.4f}" for key, value in summary.items()))
    write("final", {"runs": rows, "test": summary})


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--search", action="store_true", help="run the search instead of the final figures")
    (search if parser.parse_args().search else final)(Console())


if __name__ == "__main__":
    main()
