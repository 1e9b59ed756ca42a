"""Compressed adapters: how small, how fast, and what it costs in accuracy.

``python bench/compress.py --part coding`` (a minute): bits an entry and speed, by processor time of one thread, of every coding
on 4 million independent entries, and on the factors of a LoRA whose components have unequal densities, against the empirical
entropy and the paper's bound. ``python bench/compress.py`` (an hour on one core, and the runs of ``supersense_runs.py``): adapters
trained on WordNet supersenses, at densities of 5, 10, 20 and 50 % with the scale of least error, with scales fitted to 60
training batches, and at the smallest density that costs at most a quarter of a point on the validation split; test accuracy of
each. Ratios are those of the whole file, header and head (int8) included, to 16 bits a number. Both write
``bench/results/compress.json``, and an interrupted run continues there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

import trimtab as tt
from supersense_runs import SEEDS, run
from trimtab.artifacts.coding import CODINGS, bound, decode, encode
from trimtab.artifacts.trials import alone
from trimtab.core.table import Table
from trimtab.training.files import write_text
from trimtab.training.scoring import scorer, training_losses

RESULTS = Path(__file__).parent / "results" / "compress.json"
DENSITIES = (0.05, 0.1, 0.2, 0.5)
BATCHES, TOLERANCE = 60, 0.0025
METHODS = ("LoRA", "MiSS", "LoRA, full example")


def stored() -> dict[str, Any]:
    """The results so far."""
    return json.loads(RESULTS.read_text("utf-8")) if RESULTS.is_file() else {}


def store(part: str, value: Any) -> None:
    """Replace one part of them, in one step."""
    write_text(RESULTS, json.dumps(stored() | {part: value}, indent=1) + "\n")


# -- coding


def independent(k: float, n: int = 4_000_000) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """``n`` entries, each kept with probability ``k``."""
    rng = np.random.default_rng(0)
    return np.where(rng.random(n) < k, rng.choice(np.array([-1, 1], np.int8), n), 0).astype(np.int8), [(n // 4000, 4000)]


def unequal(k: float, width: int = 2048, rank: int = 16, layers: int = 61) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """The k largest entries of synthetic factors, 4 million: B smaller than A, components of log-normal size."""
    rng = np.random.default_rng(0)
    parts, shapes = [], []
    for _ in range(layers):
        spread = np.exp(rng.normal(0, 0.8, rank))
        parts.append(rng.normal(0, 1, (rank, width)) * spread[:, None])
        parts.append(rng.normal(0, 0.6, (width, rank)) * spread * rng.uniform(0.3, 1.2))
        shapes += [(rank, width), (width, rank)]
    flat = np.concatenate([part.ravel() for part in parts])
    level = np.partition(np.abs(flat), -int(k * len(flat)))[-int(k * len(flat))]
    return (np.sign(flat) * (np.abs(flat) >= level)).astype(np.int8), shapes


def entropy(symbols: np.ndarray, shapes: list[tuple[int, int]]) -> float:
    """Bits an entry at the entropy of every tensor's own counts."""
    total, at = 0.0, 0
    for rows, columns in shapes:
        part = symbols[at : at + rows * columns]
        counts = np.array([np.count_nonzero(part == s) for s in (-1, 0, 1)], float)
        total -= float((counts[counts > 0] * np.log2(counts[counts > 0] / part.size)).sum())
        at += rows * columns
    return total / len(symbols)


def coding_part() -> None:
    """See the module."""
    rows = []
    table = Table(("data", "density", "coding", "bits", "over entropy, %", "over the bound, %", "encode, M/s", "decode, M/s"))
    for name, draw in (("independent", independent), ("unequal", unequal)):
        for k in DENSITIES:
            symbols, shapes = draw(k)
            own, paper = entropy(symbols, shapes), bound(np.count_nonzero(symbols) / len(symbols))
            for coding in CODINGS:
                times: dict[str, list[float]] = {"encode": [], "decode": []}
                for _ in range(5):
                    start = time.process_time()
                    payload = encode(symbols, shapes, coding)
                    times["encode"].append(time.process_time() - start)
                    start = time.process_time()
                    back = decode(payload, shapes, coding)
                    times["decode"].append(time.process_time() - start)
                assert np.array_equal(back, symbols)
                bits = 8 * len(payload) / len(symbols)
                speed = {key: round(len(symbols) / statistics.median(t) / 1e6, 1) for key, t in times.items()}
                row = {"data": name, "density": k, "coding": coding, "entries": len(symbols), "bits": bits}
                row |= {"entropy": own, "bound": paper}
                rows.append(row | {f"{key}_million_a_second": v for key, v in speed.items()})
                over = (100 * (bits / own - 1), 100 * (bits / paper - 1))
                table.add(name, k, coding, round(bits, 4), *(round(v, 2) for v in over), speed["encode"], speed["decode"])
    table.limit = 100
    print(table)
    store("coding", rows)


# -- adapters


def settings() -> dict[str, dict[str, Any]]:
    """What is tried on every adapter."""
    formula = {f"{k:.0%}": {"density": k} for k in DENSITIES}
    fitted = {f"{k:.0%}, fitted": {"density": k, "fit": True} for k in DENSITIES[1:]}
    chosen = {"chosen, fitted": {"density": [0.1, 0.2, 0.35, 0.5], "fit": True, "tolerance": TOLERANCE}}
    return {**formula, **fitted, **chosen}


def adapters_part(methods: list[str], *, ready: bool) -> None:
    """See the module."""
    rows: dict[str, Any] = stored().get("adapters", {})
    for method in methods:
        for seed in SEEDS:
            folder = run(method, seed, ready=ready)
            if folder is None:
                continue
            validation, judge = None, None
            model, test = scorer(folder, on="test")
            losses = training_losses(folder, BATCHES)
            for label, given in {"original": {}, **settings()}.items():
                key = f"{method} | {seed} | {label}"
                if key in rows:
                    continue
                if label.startswith("chosen"):
                    validation, judge = scorer(folder, on="validation")
                row = one(folder / "adapter", given, model, test, losses, validation, judge)
                rows[key] = row | {"method": method, "seed": seed}
                store("adapters", rows)
                print(key, rows[key], flush=True)
    summary = summarise(rows)
    store("summary", summary.records())
    print(summary)


def one(adapter: Path, given: dict[str, Any], model: Any, test: Any, losses: Any, validation: Any, judge: Any) -> dict[str, Any]:
    """One file: its size, and the test accuracy of what is in it."""
    if not given:
        with alone(model, adapter):
            return {"label": "original", "test": test(model)}
    options = {key: value for key, value in given.items() if key != "fit"} | {"rest": "int8"}
    if given.get("fit"):
        options["losses"] = losses
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        base = model if judge is None else validation
        report = tt.compress(adapter, Path(folder) / "c.tern", model=base, score=judge, **options)
        seconds = time.perf_counter() - started
        expanded = tt.expand(report.path, Path(folder) / "out")
        with alone(model, expanded):
            reached = test(model)
    kept = ("density", "entries", "kept", "parameters", "bytes", "plain_bytes", "bits", "bound", "entropy", "error", "trials")
    figures = {name: getattr(report, name) for name in kept}
    return {"label": "", "test": reached, "ratio": report.ratio, "seconds": round(seconds, 1), **figures}


def summarise(rows: dict[str, Any]) -> Table:
    """Mean over seeds: ratio, bits, and the paired difference of the test accuracy with its standard error, in points."""
    table = Table(("method", "setting", "seeds", "ratio", "bits", "entropy", "bound", "test", "points lost", "standard error"))
    table.limit = 100
    for method in METHODS:
        for label in settings():
            pairs = [(rows.get(f"{method} | {s} | original"), rows.get(f"{method} | {s} | {label}")) for s in SEEDS]
            pairs = [(a, b) for a, b in pairs if a and b]
            if not pairs:
                continue
            lost = [100 * (a["test"] - b["test"]) for a, b in pairs]
            mean = lambda name, pairs=pairs: round(statistics.mean(b[name] for _, b in pairs), 4)  # noqa: E731
            error = statistics.stdev(lost) / math.sqrt(len(lost)) if len(lost) > 1 else math.nan
            figures = [mean(name) for name in ("ratio", "bits", "entropy", "bound", "test")]
            table.add(method, label, len(pairs), *figures, round(statistics.mean(lost), 3), round(error, 3))
    return table


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=("adapters", "coding"), default="adapters")
    parser.add_argument("--runs", default=";".join(METHODS), help="whose adapters, separated by semicolons")
    parser.add_argument("--ready", action="store_true", help="take the runs that are there and train none")
    given = parser.parse_args()
    if given.part == "coding":
        coding_part()
    else:
        adapters_part([name.strip() for name in given.runs.split(";")], ready=given.ready)


if __name__ == "__main__":
    main()
