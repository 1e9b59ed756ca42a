"""LLM-Adapters' comparison in miniature: LoRA, series, parallel and prefix on the small LLaMA of examples/tiny_lm.

``python bench/llm_adapters.py`` tunes each method on word problems (ASDiv) and on commonsense questions (BoolQ and PIQA together),
lets the result write its answers on the test questions, and reads them with the published rules and with corrected ones
(``trimtab.tasks.instructions.readers``). Sizes follow the paper's placements (arXiv 2304.01933): LoRA on query, key, value, up and
down; series behind the feed-forward; parallel beside up and down; ten prefix tokens. Rows without a method: the base as it is, and
training all of its linear layers. A method that this build lacks is left out, and said so.

The base is small: its word problems are rarely right and its commonsense is near that of a constant answer. What the bench shows
is the whole pipeline, its errors and its cost, not which method is best. Every run is a run of ``trimtab train`` in
``bench/.cache/llm_adapters``, so an interrupted bench goes on where it was. Writes ``bench/results/llm_adapters.json`` and
``.png``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from rich.console import Console

import trimtab as tt
from examples import tiny_lm
from trimtab import tasks
from trimtab.core import registry
from trimtab.core.table import Table
from trimtab.training.config import load_config
from trimtab.training.files import write_text

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "bench" / ".cache" / "llm_adapters"
RESULTS = ROOT / "bench" / "results" / "llm_adapters.json"
TASKS: dict[str, dict[str, Any]] = {
    "math": {"data": {"source": ["asdiv"], "max_length": 256}, "epochs": 3},
    "commonsense": {"data": {"source": ["boolq", "piqa"], "limit": 1000, "max_length": 320, "overlong": "drop"}, "epochs": 2},
}
LORA_PLACES = "attn.q | attn.k | attn.v | mlp.up | mlp.down"
#: name -> method, where it acts, learning rate (the paper's prefix rate is a hundred times the others', ours ten times)
METHODS: dict[str, dict[str, Any]] = {
    "base": {"method": None},
    "LoRA": {"method": {"name": "LoRA", "rank": 8}, "targets": LORA_PLACES, "learning_rate": 3e-3},
    "SeriesAdapter": {
        "method": {"name": "SeriesAdapter", "bottleneck": 64, "placement": "pfeiffer", "act": "tanh"}, "learning_rate": 3e-3,
    },
    "ParallelAdapter": {
        "method": {"name": "ParallelAdapter", "bottleneck": 16, "placement": "llm", "act": "tanh"}, "learning_rate": 3e-3,
    },
    "PrefixTuning": {"method": {"name": "PrefixTuning", "tokens": 10}, "learning_rate": 3e-2},
    "all linear layers": {"method": {"name": "Unfreeze"}, "targets": "linear", "learning_rate": 1e-3},
}  # fmt: skip


def settings(task: str, name: str, seed: int, limit: int, threads: int) -> dict[str, Any]:
    """The configuration of one run."""
    chosen = {key: value for key, value in METHODS[name].items() if key != "method" or value is not None}
    return {
        "task": "instruction-tuning",
        "model": str(tiny_lm.folder(show=True)),
        **TASKS[task],
        **chosen,
        "evaluation": {"limit": limit, "new_tokens": 24},
        "batch_size": 16,
        "seed": seed,
        "threads": threads,
        "output": str(CACHE / f"{task}-{name.replace(' ', '-')}-{seed}"),
    }


def one(task: str, name: str, seed: int, limit: int, threads: int, console: Console) -> dict[str, Any]:
    """Train (or take up, or look up) one run; its figures, and for each set whether each answer was right."""
    values = settings(task, name, seed, limit, threads)
    folder = Path(values["output"])
    row: dict[str, Any] = {"task": task, "method": name, "seed": seed, "settings": METHODS[name]}
    if METHODS[name]["method"] is None:
        config = load_config({**values, "method": "LoRA"})  # none is attached
        torch.set_num_threads(threads)
        runner = tasks.get(config.task)
        folder.mkdir(parents=True, exist_ok=True)
        found = runner.finish(config, runner.prepare(config), folder, console=console)
        row |= {"trainable": 0, "seconds": 0.0, "validation_loss": None}
    else:
        result = tt.train(values, console=console)
        found = {key: value for key, value in result.metrics.items() if key != "validation"}
        row |= {"trainable": result.trainable, "total": result.total, "seconds": round(result.seconds, 1)}
        row["validation_loss"] = result.metrics["validation"]["loss"]
    row["sets"] = found
    row["right"] = {
        key: [json.loads(line)["right"] for line in (folder / "predictions" / f"{key}.jsonl").read_text("utf-8").splitlines()]
        for key in found
    }
    return row


def paired(right: list[bool], reference: list[bool]) -> tuple[float, float]:
    """Mean difference of two methods on the same questions, and its standard error."""
    differences = [int(a) - int(b) for a, b in zip(right, reference, strict=True)]
    mean = sum(differences) / len(differences)
    variance = sum((d - mean) ** 2 for d in differences) / (len(differences) - 1)
    return mean, math.sqrt(variance / len(differences))


def table(rows: list[dict[str, Any]]) -> Table:
    """A line a method, set and seed; percent, +- one standard error over the test questions."""
    columns = ("set", "method", "seed", "learns", "accuracy %", "minus LoRA", "published %", "unread %", "constant %", "loss", "s")
    found = Table(columns, title="small LLaMA, 3.4 million parameters; errors are one standard error")
    lora = {(row["seed"], key): right for row in rows if row["method"] == "LoRA" for key, right in row["right"].items()}
    for key in dict.fromkeys(key for row in rows for key in row["sets"]):
        for row in rows:
            if key not in row["sets"]:
                continue
            figures, reference = row["sets"][key], lora.get((row["seed"], key))
            difference = ""
            if reference is not None and row["method"] != "LoRA":
                mean, error = paired(row["right"][key], reference)
                difference = f"{100 * mean:+.1f} +- {100 * error:.1f}"
            loss = "" if row["validation_loss"] is None else f"{row['validation_loss']:.3f}"
            found.add(
                key, row["method"], row["seed"], row["trainable"], _percent(figures, "accuracy"), difference,
                _percent(figures, "published"), f"{100 * figures['unread']:.1f}", f"{100 * figures['constant']:.1f}", loss,
                f"{row['seconds']:.0f}",
            )  # fmt: skip
    return found


def _percent(figures: dict[str, float], key: str) -> str:
    return f"{100 * figures[key]:.1f} +- {100 * figures[f'{key}_se']:.1f}"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy of every method on every set, seed 0, with one standard error and the constant answer as a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    first = [row for row in rows if row["seed"] == rows[0]["seed"]]
    keys = list(dict.fromkeys(key for row in first for key in row["sets"]))
    figure = Figure(figsize=(4 * len(keys), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
        here = [row for row in first if key in row["sets"]]
        names = [row["method"] for row in here]
        values = [100 * row["sets"][key]["accuracy"] for row in here]
        errors = [100 * row["sets"][key]["accuracy_se"] for row in here]
        axes.barh(names, values, xerr=errors, color="tab:blue", ecolor="black", capsize=3)
        axes.axvline(100 * here[0]["sets"][key]["constant"], color="tab:red", linestyle="--", label="constant answer")
        axes.set(title=key, xlabel="accuracy, %")
        axes.invert_yaxis()
        axes.legend(loc="lower right", fontsize=8)
    stage = path.with_name(f".{path.name}.part")
    figure.savefig(stage, format="png", dpi=120)
    stage.replace(path)


def write(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Replace the results by what is there so far; whether each single answer was right stays in the runs' folders."""
    record = json.loads((tiny_lm.folder() / "training.json").read_text("utf-8"))
    versions = {"python": platform.python_version(), "torch": torch.__version__, "trimtab": tt.__version__}
    kept = [{key: value for key, value in row.items() if key != "right"} for row in rows]
    values = {"base": record, "limit": args.limit, "threads": args.threads, "versions": versions, "runs": kept}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    write_text(RESULTS, json.dumps(values, indent=1) + "\n")
    plot(rows, RESULTS.with_suffix(".png"))


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--limit", type=int, default=500, help="test questions of each set")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    console = Console()
    rows = []
    for name in args.methods:
        method = METHODS[name]["method"]
        if method is not None and method["name"] not in registry.names():
            console.print(f"{name} is no method of this build; left out")
            continue
        for task in args.tasks:
            for seed in args.seeds:
                rows.append(one(task, name, seed, args.limit, args.threads, console))
                write(rows, args)
    print(table(rows))


if __name__ == "__main__":
    main()
