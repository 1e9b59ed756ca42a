"""Schedules beside plain LoRA in one run: memory and time of a training step, and accuracy on WordNet supersenses.

``python bench/schedules.py`` measures memory, ``--time`` times, ``--accuracy`` trains; results go to
``bench/results/schedules.json`` after every part, an interrupted one continues there, and ``--show`` prints what is there.

Memory: a LLaMA-shaped model with random weights (``--width`` and the like), and MiniLM on the task's own batches. In each of
``--steps`` steps, in which a schedule draws its layers anew: bytes that autograd keeps for backward (saved-tensor hooks,
storages counted once), gradients before the step, and the optimizer's state after it. Mean and largest of their sum, in the
second half of the steps, when the optimizer has met all layers. The weights, which all rows have alike, are not counted.

Time: medians over interleaved rounds of ten steps, probes of IST included, and medians of the ratios to LoRA's round beside.

Accuracy: as in ``bench/quality.py``: its rates, seeds, head, batches and steps (more by ``--epochs`` and ``--task-batch``), the
rate chosen on the validation split for every row. LoRA's own runs are taken from ``bench/results/quality_supersense.json``, which
the same function made, if they are there. For Light-PEFT see ``bench/light_peft.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn

import trimtab as tt
from overhead import build
from quality import against, measure, rate_span, run, summary
from quality_tasks import Supersense
from trimtab.core.account import saved_bytes
from trimtab.core.table import Table
from trimtab.training.files import write_text

RESULTS = Path(__file__).parent / "results" / "schedules.json"
Make = Callable[[], list[tt.Schedule]]

#: row -> the method and its schedules
ROWS: dict[str, tuple[str, Make]] = {
    "LoRA": ("LoRA", list),
    "IST": ("LoRA", lambda: [tt.IST()]),
    "IST, moments dropped": ("LoRA", lambda: [tt.IST(state="drop")]),
    "IST, a third": ("LoRA", lambda: [tt.IST(updated=0.34)]),
    "IST, half": ("LoRA", lambda: [tt.IST(updated=0.5)]),
    "RST": ("LoRA", lambda: [tt.IST(uniform=True)]),
    "LoRA+": ("LoRA", lambda: [tt.LoRAPlus()]),
    "averaging": ("LoRA", lambda: [tt.CheckpointAveraging()]),
    "AdaLoRA, budget": ("AdaLoRA", lambda: [tt.BudgetSchedule(target=8, warmup=12, final=25)]),
}
MEMORY = ("LoRA", "IST", "IST, moments dropped", "IST, a third", "IST, half")


class Training:
    """A model with a method and its schedules, and steps of it."""

    def __init__(self, row: str, model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batches: list[Any], head: str | None):
        method, make = ROWS[row]
        self.model, self.loss, self.batches = model.train().requires_grad_(False), loss, cycle(batches)
        tt.attach(self.model, tt.get(method)(), rng=torch.Generator().manual_seed(0))
        if head:
            tt.attach(self.model, tt.Unfreeze(), targets=[head], name="head")
        self.optimizer = torch.optim.AdamW(tt.parameters(self.model), lr=1e-4)
        self.s = tt.scheduled(self.model, self.optimizer, *make(), steps=10_000, loss=loss, batches=batches[:12])
        self.s.__enter__()

    def step(self) -> None:
        self.loss(self.model, next(self.batches)).backward()
        self.s.step()

    def bytes(self) -> dict[str, int]:
        """Of one step: kept for backward, gradients, and the optimizer's state behind it."""
        size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)  # noqa: E731
        batch = next(self.batches)
        given = tuple(t for t in (batch.values() if isinstance(batch, dict) else [batch]) if isinstance(t, Tensor))
        with saved_bytes(self.model, beside=given) as saved:
            loss = self.loss(self.model, batch)
        loss.backward()
        gradients = size(p.grad for p in self.model.parameters() if p.grad is not None)
        self.s.step()
        state = size(t for each in self.optimizer.state.values() for t in each.values() if t.dim())
        return {"kept": saved.total, "gradients": gradients, "optimizer": state}


def llama(args: argparse.Namespace) -> Callable[[str], Training]:
    """The LLaMA-shaped model; its input embeddings need no gradient, as behind a frozen embedding."""
    args.bias = False
    rng = torch.Generator().manual_seed(args.seed)
    xs = [torch.randn(args.batch, args.tokens, args.width, generator=rng) for _ in range(4)]
    loss = lambda m, x: m(inputs_embeds=x, use_cache=False).last_hidden_state.square().mean()  # noqa: E731
    return lambda row: Training(row, build(args), loss, xs, None)


def minilm(args: argparse.Namespace) -> Callable[[str], Training]:
    """MiniLM with its head on batches of supersenses."""
    data = Supersense()
    batches = list(islice(data.batches("train", seed=0), 40))
    return lambda row: Training(row, data.model(0), data.loss, batches, data.head)


MODELS = {"LLaMA-shaped": llama, "MiniLM": minilm}


def memory(args: argparse.Namespace, found: dict[str, Any], save: Callable[[], None]) -> None:
    """Fill ``found`` with the bytes of the steps of every row that it lacks, on both models."""
    for name, make in MODELS.items():
        start, rows = make(args), found.setdefault(name, {})
        for row in MEMORY:
            if row in rows:
                continue
            training = start(row)
            steps = [training.bytes() for _ in range(args.steps)][args.steps // 2 :]
            sums = [sum(each.values()) for each in steps]
            mean = {key: statistics.fmean(each[key] for each in steps) for key in steps[0]}
            rows[row] = mean | {"sum": statistics.fmean(sums), "largest": max(sums)}
            save()


def times(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds a step of LoRA, IST and RST, on the LLaMA-shaped model."""
    start = llama(args)
    runs = {row: start(row) for row in ("LoRA", "IST", "RST")}
    spent: dict[str, list[float]] = {row: [] for row in runs}
    for training in runs.values():
        training.step()
    for _ in range(args.rounds):
        for row, training in runs.items():
            begun = time.perf_counter()
            for _ in range(10):
                training.step()
            spent[row].append((time.perf_counter() - begun) / 10)
    ratio = lambda row: statistics.median(a / b for a, b in zip(spent[row], spent["LoRA"], strict=True))  # noqa: E731
    return {row: {"seconds": statistics.median(spent[row]), "over LoRA": ratio(row)} for row in runs}


def accuracy(args: argparse.Namespace, stored: dict[str, Any], save: Callable[[], None]) -> None:
    """Fill ``stored`` with the runs that it lacks: the search for the rate, then the seeds."""
    data, known = Supersense(**args.longer), RESULTS.with_name("quality_supersense.json")
    if "LoRA" not in stored and known.is_file() and not args.longer:
        stored["LoRA"] = json.loads(known.read_text("utf-8"))["methods"]["LoRA"]
    for row in [name.strip() for name in args.rows.split(";") if name.strip()] or ROWS:
        method, make = ROWS[row]
        entry = stored.setdefault(row, {"search": [], "final": []})
        train = lambda rate, seed, m=method, make=make: run(m, data, rate, seed, make())  # noqa: E731
        measure(row, rate_span(method), train, args, entry, save)


def show(stored: dict[str, Any]) -> None:
    """The tables of what is there."""
    mib = lambda size: round(size / 2**20, 2)  # noqa: E731
    columns = ("kept", "gradients", "optimizer", "sum", "largest")
    for name, rows in stored.get("memory", {}).items():
        table = Table(("row", *columns, "of LoRA's sum", "of its largest"), title=f"{name}: MiB of a step, beside the weights")
        for row, found in rows.items():
            share = [round(found[key] / rows["LoRA"][key], 3) for key in ("sum", "largest")]
            table.add(row, *(mib(found[key]) for key in columns), *share)
        print(table)
    if "time" in stored:
        table = Table(("row", "ms", "over LoRA"), title="LLaMA-shaped: a training step, probes included")
        for row, found in stored["time"].items():
            table.add(row, round(1e3 * found["seconds"]), round(found["over LoRA"], 3))
        print(table)
    for part in (key for key in stored if key.startswith("accuracy")):
        columns = ("row", "trainable", "rate", "test %", "± s.e.", "vs LoRA", "± s.e.")
        table, runs = Table(columns, title=f"supersense: test {part}"), stored[part]
        for row, entry in runs.items():
            if point := summary(entry):
                gap = against(entry, runs["LoRA"]) if row != "LoRA" and summary(runs["LoRA"]) else (float("nan"),) * 2
                shown = [round(100 * value, 2) for value in (point["test"], point["error"], *gap)]
                table.add(row, point["trainable"], f"{point['rate']:g}", *shown)
        print(table)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {"width": 512, "layers": 8, "intermediate": 1408, "tokens": 256, "batch": 4, "steps": 80, "rounds": 5, "threads": 2}
    for name, value in (sizes | {"seed": 0, "rates": 3, "beyond": 2, "seeds": 3}).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--epochs", type=int, default=None, help="of the accuracy part, kept apart; the task's own if left out")
    parser.add_argument("--task-batch", type=int, default=None, help="likewise, rows a step")
    for name in ("time", "accuracy", "show"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--rows", default="", help="of the accuracy part, separated by semicolons; all if empty")
    parser.add_argument("--out", default=str(RESULTS))
    args = parser.parse_args()
    args.dtype, longer = "float32", {"epochs": args.epochs, "batch_size": args.task_batch}
    args.longer = {key: value for key, value in longer.items() if value is not None}
    torch.set_num_threads(args.threads)
    out = Path(args.out)
    stored = json.loads(out.read_text("utf-8")) if out.is_file() else {}

    def save() -> None:
        stored["versions"] = {"torch": torch.__version__, "trimtab": tt.__version__, "machine": platform.machine()}
        write_text(out, json.dumps(stored, indent=1) + "\n")

    if args.accuracy:
        part = ", ".join(["accuracy", *(f"{key} {value}" for key, value in args.longer.items())])
        accuracy(args, stored.setdefault(part, {}), save)
    elif not args.show:
        part, settings = "time" if args.time else "memory", {key: getattr(args, key) for key in sizes}
        known = stored.setdefault("settings", {})
        if known.get(part) != settings:  # what other settings gave does not go on
            stored[part], known[part] = {}, settings
        if args.time:
            stored[part] = times(args)
        else:
            memory(args, stored[part], save)
        save()
    show(stored)


if __name__ == "__main__":
    main()
