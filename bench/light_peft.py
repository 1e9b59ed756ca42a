"""Light-PEFT beside plain LoRA in one run: time and peak memory of a training step, time of inference, and accuracy.

``python bench/light_peft.py`` measures cost, ``--accuracy`` trains both on WordNet supersenses; results go to
``bench/results/light_peft.json``, after every part, and ``--show`` prints what is there.

Cost: a LLaMA-shaped model with random weights (``--width`` and the like), and MiniLM on the task's own batches. Both adapters are
LoRA of rank 8 on all linear layers. Light-PEFT goes through its real estimation, on little data, cuts, drops the uncut
weights, and is measured after that, as well as before it. A step is forward, backward and AdamW. Times are medians over interleaved
rounds, ratios are medians of the ratios of neighbouring steps; ``--clock cpu --threads 1`` takes the process's own time on
a machine that others use. Inference is a forward pass without a graph, adapters attached, and once more merged. Bytes are those of
tensors (weights, optimizer, what a step makes at its peak): storages are counted, not pages.

Accuracy: as in ``bench/quality.py`` (its batches, steps, head and learning-rate schedule), LoRA at the rate that was best there; an
interrupted run goes on where it was. The seeds' differences are paired.
"""

from __future__ import annotations

import argparse
import json
import math
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
from quality import HEAD_RATE, WARMUP
from quality_tasks import TASKS, Supersense
from trimtab.core.account import LiveBytes
from trimtab.core.cut import cut_of
from trimtab.core.table import Table
from trimtab.training.files import write_text

RESULTS = Path(__file__).parent / "results" / "light_peft.json"
RANK = 8
PRUNING = {"heads": 1 / 3, "channels": 2 / 5, "modules": 0.5, "ranks": 0.5, "originals": "drop"}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
RATE = 4.64e-3  # bench/results/quality_supersense.json: the best of LoRA's rates on the validation split


class Training:
    """A model with LoRA and its optimizer, with or without Light-PEFT, and one step of it."""

    clock = staticmethod(CLOCKS["wall"])

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], schedule: tt.Schedule | None, head: str | None):
        self.model, self.loss, self.schedule = model.train().requires_grad_(False), loss, schedule
        tt.attach(self.model, tt.LoRA(rank=RANK), rng=torch.Generator().manual_seed(0))
        if head:
            tt.attach(self.model, tt.Unfreeze(), targets=[head], name="head")
        self.optimizer = torch.optim.AdamW(tt.parameters(self.model), lr=1e-3)
        given = [schedule] if schedule else []
        self.run = tt.scheduled(self.model, self.optimizer, *given, steps=100_000)
        self.run.__enter__()

    def step(self, batch: Any) -> float:
        start = self.clock()
        self.loss(self.model, batch).backward()
        self.run.step()
        return self.clock() - start

    def infer(self, batch: Any) -> float:
        self.model.eval()
        start = self.clock()
        with torch.no_grad():
            self.loss(self.model, batch)
        spent = self.clock() - start
        self.model.train()
        return spent

    def bytes(self, batch: Any) -> dict[str, int]:
        """What stands, what the optimizer holds, and the peak of a step with all of it."""
        size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)  # noqa: E731
        weights = size((*self.model.parameters(), *self.model.buffers()))
        state = size(t for s in self.optimizer.state.values() for t in s.values())
        with LiveBytes() as live:
            self.step(batch)
        return {"weights": weights, "optimizer": state, "peak": weights + state + live.peak}

    def trainable(self) -> int:
        return sum(p.numel() for p in tt.parameters(self.model, name="default"))


def llama(args: argparse.Namespace) -> tuple[Callable[[], nn.Module], Callable, list[Any], Any, None]:
    """A LLaMA-shaped body, its loss, its input, and a small input."""
    torch.manual_seed(args.seed)
    x = torch.randn(args.batch, args.tokens, args.width)
    loss = lambda model, batch: model(inputs_embeds=batch, use_cache=False).last_hidden_state.square().mean()  # noqa: E731
    return lambda: build(args), loss, [x], x[:, :32], None


def minilm(args: argparse.Namespace) -> tuple[Callable[[], nn.Module], Callable, list[Any], Any, str]:
    """MiniLM on supersense, batches of the training split in a seed's order."""
    data = Supersense()
    batches = list(islice(data.batches("train", seed=args.seed), 40))
    return lambda: data.model(args.seed), data.loss, batches, {key: value[:4] for key, value in batches[0].items()}, data.head


def runs(made: tuple, *kinds: str) -> dict[str, Training]:
    """The runs of these rows, each where its measurement begins: Light-PEFT behind its cut, or in the half that is observed."""
    model, loss, _, small, head = made
    found = {}
    for name in kinds:
        estimate = {"LoRA": None, "Light-PEFT, stage 1": 100, "Light-PEFT": 2}[name]
        found[name] = Training(model(), loss, estimate and tt.LightPEFT(estimate, **PRUNING), head)
        for _ in range(3):  # with the estimation of Light-PEFT and its cut; on little data
            found[name].step(small)
        assert (cut_of(found[name].model) is not None) == (name == "Light-PEFT")
        if name == "Light-PEFT, stage 1":
            found[name].schedule.until = 7  # step 3 is in the half that is observed
    return found


ROWS = ("LoRA", "Light-PEFT, stage 1", "Light-PEFT")


def memory(made: tuple, args: argparse.Namespace) -> dict[str, dict[str, int]]:
    """Bytes of a step of every row, one model at a time."""
    rows = {}
    for name in ROWS:
        run = runs(made, name)[name]
        rows[name] = run.bytes(made[2][0]) | {"trainable": run.trainable()}
    return rows


def steps(made: tuple, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Times of training steps, interleaved; in stage 1 of steps that are observed."""
    found, times = runs(made, "LoRA", "Light-PEFT"), []
    for batch in islice(cycle(made[2]), args.rounds + 1):
        times.append({name: run.step(batch) for name, run in found.items()})
    return timed("step", times[1:])


def estimation(made: tuple, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The same of stage 1, of steps in which the adapters are observed."""
    found, times = runs(made, "LoRA", "Light-PEFT, stage 1"), []
    for batch in islice(cycle(made[2]), args.rounds + 1):
        schedule = found["Light-PEFT, stage 1"].schedule
        schedule.until = 2 * schedule.step  # always in the half that is observed
        times.append({name: run.step(batch) for name, run in found.items()})
    return timed("step", times[1:])


def inference(made: tuple, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Times of forward passes, interleaved; with adapters attached, then merged."""
    found, rows = runs(made, "LoRA", "Light-PEFT"), {name: {} for name in ("LoRA", "Light-PEFT")}
    for what in ("inference", "merged inference"):
        times = []
        for batch in islice(cycle(made[2]), args.rounds + 1):
            times.append({name: run.infer(batch) for name, run in found.items()})
        for name, values in timed(what, times[1:]).items():
            rows[name] |= values
        if what == "inference":
            for run in found.values():
                tt.merge(run.model, "default")
    return rows


def timed(what: str, times: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Medians, and how many times faster than LoRA."""
    rows = {name: {f"{what} seconds": statistics.median(t[name] for t in times)} for name in times[0]}
    for name in rows:
        if name != "LoRA":
            rows[name] |= speed(what, [(t["LoRA"], t[name]) for t in times])
    return rows


MEASUREMENTS = {"memory": memory, "steps": steps, "estimation": estimation, "inference": inference}


def speed(what: str, pairs: list[tuple[float, float]]) -> dict[str, float]:
    """How many times faster than LoRA, with the quartiles' distance."""
    ratios = [a / b for a, b in pairs]
    low, _, high = statistics.quantiles(ratios, n=4)
    return {f"{what} speed": statistics.median(ratios), f"{what} spread": high - low}


# -- accuracy


def accuracy(args: argparse.Namespace, schedule: tt.Schedule | None, seed: int) -> dict[str, Any]:
    """Train once; accuracy after the last step."""
    data = TASKS["supersense"](epochs=args.epochs)
    model = data.model(seed).train().requires_grad_(False)
    rng = torch.Generator().manual_seed(seed)
    tt.attach(model, tt.LoRA(rank=RANK), name="method", rng=rng)
    own = list(tt.parameters(model, name="method"))
    tt.attach(model, tt.Unfreeze(), targets=[data.head], name="head", rng=rng)
    head = list(tt.parameters(model, name="head"))
    optimizer = torch.optim.AdamW([{"params": own, "lr": args.rate}, {"params": head, "lr": HEAD_RATE}], weight_decay=0.0)
    total, warmup = data.steps(), max(1, round(WARMUP * data.steps()))
    torch.manual_seed(seed)
    start = time.perf_counter()
    with tt.scheduled(model, optimizer, *([schedule] if schedule else []), steps=total) as s:
        rates = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warmup, (total - step) / max(1, total - warmup))
        )
        for epoch in range(data.epochs):
            for batch in data.batches("train", seed=seed, epoch=epoch):
                data.loss(model, batch).backward()
                s.step(max_grad_norm=1.0)
                rates.step()
    found = {"seed": seed, "steps": total, "trainable": sum(p.numel() for p in tt.parameters(model, name="method"))}
    found |= {"parameters": sum(p.numel() for p in model.parameters()), "seconds": time.perf_counter() - start}
    return found | {split: data.accuracy(model, split) for split in ("validation", "test")}


def write(part: str, settings: dict[str, Any], value: Any) -> None:
    """Replace one part of the results."""
    stored = json.loads(RESULTS.read_text("utf-8")) if RESULTS.is_file() else {}
    versions = {"torch": torch.__version__, "trimtab": tt.__version__, "machine": platform.machine()}
    stored[part] = {"settings": settings | versions, "results": value}
    write_text(RESULTS, json.dumps(stored, indent=1) + "\n")


def read(part: str) -> dict[str, Any]:
    stored = json.loads(RESULTS.read_text("utf-8")) if RESULTS.is_file() else {}
    return stored.get(part, {"settings": {}, "results": {}})


def measure_accuracy(args: argparse.Namespace) -> None:
    settings = {"epochs": args.epochs, "rate": args.rate, "estimate": args.estimate, **PRUNING, **args.given}
    if read("accuracy")["settings"].items() >= settings.items():
        results = read("accuracy")["results"]
    else:
        results = {"LoRA": [], "Light-PEFT": []}
    for seed in range(args.seeds):
        for name, rows in results.items():
            if all(row["seed"] != seed for row in rows):
                schedule = tt.LightPEFT(args.estimate, **PRUNING | args.given) if name == "Light-PEFT" else None
                rows.append(accuracy(args, schedule, seed))
                print(name, rows[-1], flush=True)
                write("accuracy", settings, results)


# -- tables


def show() -> None:
    """All that is there; bytes in MiB."""
    mib = lambda size: round(size / 2**20, 1)  # noqa: E731
    for part in ("llama", "minilm"):
        found = {"results": {}}
        for each in MEASUREMENTS:
            for name, values in read(f"{part} {each}")["results"].items():
                row = found["results"].setdefault(name, {})
                row |= {key: value for key, value in values.items() if key not in row}
        if not found["results"]:
            continue
        columns = ("method", "trainable", "share %", "step ms", "faster", "inference ms", "faster ", "merged", "peak", "less %")
        table = Table(columns, title=f"{part}: a training step beside LoRA's")
        lora = found["results"]["LoRA"]
        for name, r in found["results"].items():
            number = lambda key, scale=1, digits=2, r=r: round(scale * r[key], digits) if key in r else ""  # noqa: E731
            sizes = (mib(r["peak"]), round(100 * (1 - r["peak"] / lora["peak"]), 1)) if "peak" in r else ("", "")
            share = round(100 * r["trainable"] / lora["trainable"], 1) if "trainable" in r else ""
            table.add(
                name, r.get("trainable", ""), share, number("step seconds", 1e3, 1), number("step speed"),
                number("inference seconds", 1e3, 1), number("inference speed"), number("merged inference speed"), *sizes,
            )  # fmt: skip
        print(table)
    found = read("accuracy")
    rows = found["results"]
    if rows and len(rows["Light-PEFT"]) > 1:
        title = f"supersense, {rows['LoRA'][0]['steps']} steps"
        table = Table(("method", "trainable", "parameters", "test %", "± s.e."), title=title)
        for name, runs in rows.items():
            tests = [100 * run["test"] for run in runs]
            error = statistics.stdev(tests) / math.sqrt(len(tests))
            numbers = [round(statistics.mean(run[key] for run in runs)) for key in ("trainable", "parameters")]
            table.add(name, *numbers, round(statistics.mean(tests), 2), round(error, 2))
        print(table)
        gaps = [100 * (b["test"] - a["test"]) for a, b in zip(rows["LoRA"], rows["Light-PEFT"], strict=True)]
        print(f"Light-PEFT - LoRA, points: {statistics.mean(gaps):+.2f}, each seed {', '.join(f'{gap:+.2f}' for gap in gaps)}")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {"width": 1024, "layers": 4, "intermediate": 2816, "tokens": 1024, "batch": 1, "rounds": 9, "threads": 2}
    for name, value in (sizes | {"seed": 0, "estimate": 25, "epochs": 3, "seeds": 3}).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help="cpu: the process's time")
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument("--given", type=json.loads, default={}, help="further arguments of LightPEFT, as JSON, for --accuracy")
    parser.add_argument("--parts", default="llama,minilm", help="models whose cost is measured")
    parser.add_argument("--measure", default=",".join(MEASUREMENTS), help="what is measured of them")
    parser.add_argument("--accuracy", action="store_true", help="train on supersense instead")
    parser.add_argument("--show", action="store_true", help="print what is there")
    args = parser.parse_args()
    args.bias = False
    Training.clock = staticmethod(CLOCKS[args.clock])
    torch.set_num_threads(args.threads)
    if args.accuracy:
        measure_accuracy(args)
    elif not args.show:
        for part in args.parts.split(","):
            keys = ("width", "layers", "intermediate", "tokens", "batch", "rounds", "threads", "seed")
            settings = {key: getattr(args, key) for key in keys if part == "llama" or key in ("rounds", "threads", "seed")}
            settings["clock"] = args.clock
            made = {"llama": llama, "minilm": minilm}[part](args)
            for each in args.measure.split(","):
                write(f"{part} {each}", settings | {"rank": RANK, **PRUNING}, MEASUREMENTS[each](made, args))
    show()


if __name__ == "__main__":
    main()
