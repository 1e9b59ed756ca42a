"""Accuracy of every registered method on two small real tasks, with an equal tuning budget.

``python bench/quality.py`` (text: WordNet supersenses) and ``python bench/quality.py --task fashion`` (images: garments that
the base has not seen). For each method, at the defaults of its config (but for what the model's shape
demands, which the task lists), with the schedule that belongs to it:

1. one run for each of ``--rates`` learning rates, seed 0, at the logarithmic centres of equal parts of the range that the
   method's config states; while the best of them on the validation split is the lowest or the highest, one more beyond it, at the
   same distance, at most ``--beyond`` times; the best is taken, and nothing else is looked at;
2. runs at that rate for the other seeds; what counts is the test accuracy after the last step, so no step is picked.

The head learns beside every method, at 1e-3. No weight decay; linear decay after 6 % warm-up. Full fine-tuning and the head
alone (linear probe) run under the same rules. Results go to ``bench/results/quality_<task>.json`` after every run, and an
interrupted sweep continues there; several processes may share it, with other ``--methods`` each. The table gives mean and
standard error over seeds, and the paired difference to LoRA.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from filelock import FileLock
from torch import Tensor, nn

import trimtab as tt
from quality_tasks import CACHE, TASKS, TaskData
from trimtab.core import registry
from trimtab.core.errors import TrimtabError
from trimtab.core.table import Table
from trimtab.schedules import BilevelCompetition, Schedule
from trimtab.training.files import write_text

RESULTS = Path(__file__).parent / "results"
HEAD_RATE, WARMUP = 1e-3, 0.06
GRADIENT_BATCHES = 16  # whose gradients start LoRAGA, GPS and SPT
FULL, PROBE = "full fine-tuning", "linear probe"
SCHEDULES: dict[str, Callable[[], Schedule]] = {"SNELLA": BilevelCompetition}  # what belongs to a method and runs beside it
BASELINES = {FULL: tt.Span(1e-5, 1e-3, log=True), PROBE: tt.Span(1e-3, 1e-1, log=True)}


def rates(span: tt.Span, count: int) -> list[float]:
    """Logarithmic centres of ``count`` equal parts of ``span``."""
    return [float(f"{span.low * (span.high / span.low) ** ((i + 0.5) / count):.3g}") for i in range(count)]


def learners(name: str, model: nn.Module, data: TaskData, seed: int) -> list[nn.Parameter]:
    """Make ``name`` and the head learn; the method's parameters, without the head's."""
    head = model.get_submodule(data.head)
    if name == FULL:
        mine = {id(p) for p in head.parameters()}
        return [p for p in model.parameters() if id(p) not in mine]
    model.requires_grad_(False)
    if name == PROBE:
        head.requires_grad_(True)
        return []
    config = tt.get(name)(**data.settings.get(name, {}))
    loss: Callable[[nn.Module], Iterator[Tensor]] | None = None
    if config.adapter_class.wants(config):
        loss = lambda m: (data.loss(m, batch) for batch in islice(data.batches("train", seed=seed), GRADIENT_BATCHES))  # noqa: E731
    rng = torch.Generator().manual_seed(seed)
    tt.attach(model, config, name="method", rng=rng, loss=loss)
    parameters = list(tt.parameters(model, name="method"))
    tt.attach(model, tt.Unfreeze(), targets=[data.head], name="head", rng=rng)
    return parameters


def run(name: str, data: TaskData, rate: float, seed: int, given: Sequence[Schedule] | None = None) -> dict[str, Any]:
    """Train once; validation and test accuracy after the last step, none if the loss stopped being finite.

    Args:
        given: schedules; None: those that belong to the method. They probe on batches of 16 training rows.
    """
    model = data.model(seed).train()
    own = learners(name, model, data, seed)
    mine = {id(p) for p in own}
    head = [p for p in model.parameters() if p.requires_grad and id(p) not in mine]
    head_rate = rate if name == PROBE else HEAD_RATE
    groups = [{"params": own, "lr": rate}, {"params": head, "lr": head_rate}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
    total, warmup = data.steps(), max(1, round(WARMUP * data.steps()))
    beside = given if given is not None else [SCHEDULES[name]()] if name in SCHEDULES else []
    probes = [{k: v[:16] for k, v in batch.items()} for batch in islice(data.batches("train", seed=seed + 1000), 12)]
    s = tt.scheduled(model, optimizer, *beside, steps=total, loss=data.loss, batches=probes, seed=seed)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (total - step) / max(1, total - warmup))
    )
    torch.manual_seed(seed)
    start, losses = time.perf_counter(), []
    with s:
        for epoch in range(data.epochs):
            for batch in data.batches("train", seed=seed, epoch=epoch):
                loss = data.loss(model, batch)
                losses.append(loss.item())
                if not math.isfinite(losses[-1]):
                    return {"rate": rate, "seed": seed, "diverged at step": len(losses), "trainable": sum(p.numel() for p in own)}
                loss.backward()
                s.step(loss, max_grad_norm=1.0)
                schedule.step()
    result = {"rate": rate, "seed": seed, "trainable": sum(p.numel() for p in own), "seconds": time.perf_counter() - start}
    result["loss"] = statistics.fmean(losses[-20:])
    return result | {split: data.accuracy(model, split) for split in ("validation", "test")}


def best_of(search: list[dict[str, Any]]) -> dict[str, Any]:
    """The run with the best validation accuracy; one that diverged is worse than any."""
    return max(search, key=lambda row: row.get("validation", -1.0))


def beyond(search: list[dict[str, Any]], step: float) -> list[float]:
    """The next rate to try if the best one so far is the lowest or the highest; none if it lies between others."""
    best, tried = best_of(search)["rate"], [row["rate"] for row in search]
    if best == max(tried):
        return [float(f"{best * step:.3g}")]
    return [float(f"{best / step:.3g}")] if best == min(tried) else []


def rate_span(name: str) -> tt.Span:
    """The range of learning rates that the method's config states, or a base line's."""
    return BASELINES[name] if name in BASELINES else tt.get(name).learning_rate


def measure(
    row: str,
    span: tt.Span,
    train: Callable[[float, int], dict[str, Any]],
    args: argparse.Namespace,
    entry: dict[str, Any],
    save: Callable[[], None],
) -> None:
    """Fill ``entry`` with what it lacks: the search, then the seeds at its best rate.

    Args:
        row: its name, for the progress.
        train: one run from its rate and seed.
        args: ``rates``, ``beyond`` and ``seeds``.
        save: called after every run.
    """
    entry.pop("does not fit", None)
    try:
        planned = rates(span, args.rates)
        while planned:
            rate = planned.pop(0)
            if all(done["rate"] != rate for done in entry["search"]):
                entry["search"].append(train(rate, 0))
                print(f"{row}: {entry['search'][-1]}", flush=True)
                save()
            if not planned and len(entry["search"]) < args.rates + args.beyond:
                planned = beyond(entry["search"], (span.high / span.low) ** (1 / args.rates))
    except TrimtabError as error:
        entry["does not fit"] = str(error)
        return save()
    best = best_of(entry["search"])
    entry["final"] = [done for done in entry["final"] if done["rate"] == best["rate"]] or [best]
    for seed in range(1, args.seeds):
        if all(done["seed"] != seed for done in entry["final"]):
            entry["final"].append(train(best["rate"], seed))
            print(f"{row}: {entry['final'][-1]}", flush=True)
            save()
    return None


def summary(entry: dict[str, Any]) -> dict[str, float] | None:
    """Mean and standard error of the test accuracy over the seeds; None where a seed diverged or nothing ran."""
    tests = [row.get("test") for row in entry["final"]]
    if len(tests) < 2 or None in tests:
        return None
    row = entry["final"][0]
    seconds = statistics.median(r["seconds"] for r in entry["final"])
    error = statistics.stdev(tests) / math.sqrt(len(tests))
    return {"test": statistics.fmean(tests), "error": error, "trainable": row["trainable"], "rate": row["rate"], "seconds": seconds}


def against(entry: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """Mean and standard error of the difference of test accuracies, seed by seed."""
    mine, theirs = ({row["seed"]: row["test"] for row in e["final"]} for e in (entry, other))
    gaps = [mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())]
    return statistics.fmean(gaps), statistics.stdev(gaps) / math.sqrt(len(gaps))


def show(results: dict[str, Any], task: str) -> None:
    """The table, and the picture beside the JSON."""
    columns = ("method", "trainable", "rate", "test %", "± s.e.", "vs LoRA", "± s.e.")
    table = Table(columns, title=f"{task}: test accuracy", limit=100)
    points = {name: s for name, entry in results.items() if (s := summary(entry))}
    for name, point in sorted(points.items(), key=lambda item: -item[1]["test"]):
        gap = against(results[name], results["LoRA"]) if "LoRA" in points and name != "LoRA" else (math.nan, math.nan)
        shown = [round(100 * value, 2) for value in (point["test"], point["error"], *gap)]
        table.add(name, point["trainable"], f"{point['rate']:g}", *shown)
    print(table)
    for name, entry in results.items():
        if "does not fit" in entry:
            print(f"{name} does not fit: {entry['does not fit']}")
        elif name not in points:
            print(f"{name}: no result (diverged, or not finished)")
    picture(points, task)


def picture(points: dict[str, dict[str, float]], task: str) -> None:
    """Test accuracy against trainable parameters without the head's, with standard errors."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 6), layout="constrained")
    best_first = sorted((item for item in points.items() if item[0] != PROBE), key=lambda item: -item[1]["test"])
    for rank, (name, point) in enumerate(best_first, 1):
        at, known = (point["trainable"], 100 * point["test"]), name in (FULL, "LoRA")
        style = {"color": "tab:red" if known else "tab:blue", "zorder": 3 if known else 2}
        axes.errorbar(*at, yerr=100 * point["error"], fmt="o", markersize=4, capsize=2, label=f"{rank} {name}", **style)
        axes.annotate(str(rank), at, textcoords="offset points", xytext=(4, 3), fontsize=7)
    if PROBE in points:
        axes.axhline(100 * points[PROBE]["test"], color="grey", linestyle=":", label=PROBE)
    axes.set(
        xscale="log",
        xlabel="trainable parameters, without the head",
        ylabel="test accuracy, %",
        title=f"{task}: methods by their defaults, ± one standard error",
    )
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=7, ncols=1 + (len(points) > 30), handlelength=0.8)
    figure.savefig(RESULTS / f"quality_{task}.png", dpi=130)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=sorted(TASKS), default="supersense")
    parser.add_argument("--methods", default="", help="comma-separated; all registered ones and both base lines if empty")
    parser.add_argument("--rates", type=int, default=3)
    parser.add_argument("--beyond", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=None, help="the task's own if left out")
    parser.add_argument("--train-rows", type=int, default=None, help="the task's own if left out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--show", action="store_true", help="print and draw what is there, run nothing")
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    out = Path(args.out) if args.out else RESULTS / f"quality_{args.task}.json"
    stored = json.loads(out.read_text("utf-8")) if out.is_file() else {"methods": {}}
    if not args.show:
        given = {} if args.epochs is None else {"epochs": args.epochs}
        data = TASKS[args.task](train_rows=args.train_rows, **given)
        settings = {"task": args.task, "epochs": data.epochs, "train rows": len(data.splits["train"]), "rates": args.rates,
                    "batch": data.batch_size, "torch": torch.__version__}  # fmt: skip
        if data.base is not None:
            settings["base"] = data.base  # two bases differ by more than two methods
        if stored["methods"] and stored["settings"] != settings:
            raise SystemExit(f"{out} was measured with {stored['settings']}, not {settings}: give --out, or move it away")
        stored["settings"] = settings
        CACHE.mkdir(parents=True, exist_ok=True)

        def save() -> None:
            """Write ``entry``, and leave to other processes what is theirs."""
            with FileLock(CACHE / f"{out.stem}.lock"):
                if out.is_file():
                    stored["methods"] = json.loads(out.read_text("utf-8"))["methods"]
                stored["methods"][name] = entry
                write_text(out, json.dumps(stored, indent=1) + "\n")

        chosen = [name.strip() for name in args.methods.split(",") if name.strip()] or [PROBE, "LoRA", FULL, *registry.names()]
        for name in dict.fromkeys(chosen):
            entry = stored["methods"].setdefault(name, {"search": [], "final": []})
            if name in data.settings:
                entry["settings"] = {key: repr(value) for key, value in data.settings[name].items()}
            measure(name, rate_span(name), partial(run, name, data), args, entry, save)
    show(stored["methods"], args.task)


if __name__ == "__main__":
    main()
