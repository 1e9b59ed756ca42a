"""Averages of a run's checkpoints: weighted by loss, step or score, uniform, and single ones.

``python bench/average.py`` (half an hour on one core, and the runs of ``supersense_runs.py`` and ``math_runs.py`` before it). For
every run of LoRA on WordNet supersenses, with the learning rate falling linearly to 0 and constant, and on word problems with the
small LLaMA, the checkpoints that were kept are averaged in each way, and the test accuracy of the result (word problems: of
the answer's tokens) is compared with that of the last checkpoint, of the best one by validation, and of the uniform average of
the last ten: mean difference over seeds, in points, with its standard error. Results go to ``bench/results/average.json`` after
every figure, and an interrupted run continues there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import math_runs
import trimtab as tt
from supersense_runs import SEEDS, run
from trimtab.artifacts.trials import alone
from trimtab.core.table import Table
from trimtab.training.files import write_text
from trimtab.training.scoring import scorer

RESULTS = Path(__file__).parent / "results" / "average.json"
MATH = "word problems"
GROUPS = ("LoRA", "LoRA, constant rate", MATH, "LoRA, full example")
SETTINGS: dict[str, dict[str, Any]] = {
    "last": {"scheme": "uniform", "last": 1},
    "best single": {"scheme": "uniform", "best": 1},
    "uniform, last 4": {"scheme": "uniform", "last": 4},
    "uniform, last 10": {"scheme": "uniform", "last": 10},
    "uniform, best 4": {"scheme": "uniform", "best": 4},
    "loss^0.5, last 10": {"strength": 0.5, "last": 10},
    "loss^0.7, last 10": {"strength": 0.7, "last": 10},
    "loss^3, last 10": {"strength": 3.0, "last": 10},
    "loss^0.7, last 4 of every 3rd": {"strength": 0.7, "last": 4, "stride": 3},
    "step^1, last 10": {"by": "step", "strength": 1.0, "last": 10},
    "step^1.05, last 10": {"by": "step", "strength": 1.05, "last": 10},
    "accuracy^1, last 10": {"by": "score", "strength": 1.0, "last": 10},
    "chosen on validation": {"strength": [0.0, 0.7, 3.0], "last": [1, 4, 10]},
}
BASELINES = ("last", "best single", "uniform, last 10")


def stored() -> dict[str, Any]:
    """The results so far."""
    return json.loads(RESULTS.read_text("utf-8")) if RESULTS.is_file() else {}


def store(value: dict[str, Any]) -> None:
    """Write all of them in one step."""
    write_text(RESULTS, json.dumps(value, indent=1) + "\n")


def one(folder: Path, given: dict[str, Any], model: Any, test: Any, judge: Any) -> dict[str, Any]:
    """The test accuracy of one average."""
    base, score = judge if isinstance(given.get("last"), list) else (None, None)
    with tempfile.TemporaryDirectory() as place:
        result = tt.average(folder, Path(place) / "out", model=base, score=score, **given)
        with alone(model, result.path):
            reached = test(model)  # a word problem's has its loss beside it
    figures = {"gap": result.gap, "weights": result.weights, "setting": result.setting, "trials": result.trials}
    return {**reached, "used": [path.name for path in result.used], **figures}


def figure(rows: dict[int, dict[str, Any]], key: str) -> Any:
    """A mean over seeds, blank where the runs have none."""
    return round(statistics.mean(row[key] for row in rows.values()), 4) if all(key in row for row in rows.values()) else ""


def tester(group: str, folder: Path) -> tuple[Any, Callable[[Any], dict[str, float]]]:
    """The base of a run, and what an adapter on it reaches on the test split."""
    if group == MATH:
        return math_runs.judge(folder, "test")
    model, score = scorer(folder, on="test")
    return model, lambda m: {"test": score(m)}


def summarise(rows: dict[str, Any]) -> Table:
    """Mean test accuracy over seeds, and the paired differences to the base lines in points, with standard errors."""
    table = Table(("run", "average", "seeds", "test", "loss", *(f"against {name}" for name in BASELINES)))
    table.limit = 100
    for group in GROUPS:
        for label in SETTINGS:
            found = {seed: rows[f"{group} | {seed} | {label}"] for seed in SEEDS if f"{group} | {seed} | {label}" in rows}
            if not found:
                continue
            cells = []
            for base in BASELINES:
                each = [
                    100 * (row["test"] - rows[f"{group} | {seed} | {base}"]["test"])
                    for seed, row in found.items() if f"{group} | {seed} | {base}" in rows
                ]  # fmt: skip
                error = statistics.stdev(each) / math.sqrt(len(each)) if len(each) > 1 else math.nan
                cells.append(f"{statistics.mean(each):+.2f} +- {error:.2f}" if each else "")
            table.add(group, label, len(found), *(figure(found, key) for key in ("test", "loss")), *cells)
    return table


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ready", action="store_true", help="take the runs that are there and train none")
    parser.add_argument("--runs", default=";".join(GROUPS), help="whose checkpoints, separated by semicolons")
    args = parser.parse_args()
    rows = stored().get("runs", {})
    for group in (name.strip() for name in args.runs.split(";")):
        for seed in SEEDS:
            folder = math_runs.run(seed, ready=args.ready) if group == MATH else run(group, seed, ready=args.ready)
            if folder is None:
                continue
            model, test = tester(group, folder)
            judge = None
            for label, given in SETTINGS.items():
                key = f"{group} | {seed} | {label}"
                if key in rows:
                    continue
                judge = judge or scorer(folder, on="validation", metric="token_accuracy" if group == MATH else None)
                scored = group == MATH and ("best" in given or given.get("by") == "score")
                more = {"metric": "eval_token_accuracy"} if scored else {}
                rows[key] = one(folder, given | more, model, test, judge)
                store({"runs": rows, "summary": summarise(rows).records()})
                print(key, rows[key]["test"], flush=True)
    print(summarise(rows))


if __name__ == "__main__":
    main()
