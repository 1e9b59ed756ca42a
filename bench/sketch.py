"""SketchTune: size, reconstruction error, speed of compression, and what a sketched base loses on a real task.

``python bench/sketch.py`` runs all parts; ``--parts bits error time`` some of them. Each prints a table and writes its part of
``bench/results/sketch.json``. Time is to be measured with nothing else running.

* ``bits``: bits a weight of all-MiniLM-L6-v2's sketched matrices, on disk (headers included) and in memory, against the formula
  ``b + 16 G 2^b / in``, at 2, 3 and 4 bits.
* ``error``: k-means and scikit-learn's against the exact optimum; ``tr(D H D^T) / tr(W H W^T)`` of every recipe, 192 x 512,
  correlated inputs, 1 % outlier weights, mean of five instances, beside published figures for such a matrix.
* ``time``: one 4096 x 4096 matrix to 4 bits on two threads, without data, and with data from 8,192 tokens.
* ``supersense``: LoRA on the dense base and SketchTune on its sketch, by the rules of bench/quality.py (learning rates searched on
  the validation split with seed 0, then seeds 1 and 2), whose LoRA runs are taken where they are there; about twenty minutes on
  one core, goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
from torch import Tensor

import trimtab as tt
from trimtab.artifacts.texts import text_batches
from trimtab.compat.sketch_folder import read_manifest
from trimtab.compat.sketched import SketchedWeight
from trimtab.core.table import Table
from trimtab.kernels.codes import pack
from trimtab.kernels.kmeans import assign, kmeans
from trimtab.kernels.sweep import Hessian, codebook, curvature, nearest_codes, sweep
from trimtab.training.files import write_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "sketch.json"
MODEL = "all-minilm-l6-v2"
#: in per cent, for a matrix of the same kind: (bits, recipe) -> figure
REFERENCE = {
    (4, "min-max"): 3.71, (4, "min-max, sweep"): 0.91, (4, "k-means p 0"): 0.90, (4, "k-means p 2"): 0.58,
    (4, "p 0, sweep"): 0.262, (4, "p 1, sweep"): 0.224, (4, "p 2, sweep"): 0.207, (4, "p 3, sweep"): 0.212,
    (4, "p 4, sweep"): 0.233, (4, "p 4, sweep, columns as they stand"): 0.447,
    (4, "p 4, sweep, 2 groups"): 0.179, (4, "p 4, sweep, 4 groups"): 0.126, (4, "p 4, sweep, 8 groups"): 0.072,
    (3, "min-max"): 17.7, (3, "min-max, sweep"): 4.46, (3, "p 2, sweep"): 1.05,
    (2, "min-max"): 92.0, (2, "min-max, sweep"): 27.8, (2, "p 2, sweep"): 5.74,
}  # fmt: skip
DAMPING = 0.02  # at which min-max with a sweep gives the reference's figures, so that the instances are comparable
SEEDS = 5


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def write(part: str, value: Any) -> None:
    """Replace one part of the results file."""
    stored = json.loads(RESULTS.read_text("utf-8")) if RESULTS.is_file() else {}
    write_text(RESULTS, json.dumps(stored | {"torch": torch.__version__, part: value}, indent=1) + "\n")


def bits() -> None:
    """See the module."""
    table = Table(
        ("bits", "weights", "formula", "on disk", "off %", "in memory", "off %"), title="bits a weight, MiniLM's 36 matrices"
    )
    rows = []
    for b in (2, 3, 4):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "sketch"
            tt.compress_base(MODEL, out, sketch=tt.BaseSketch(bits=b, restarts=1))
            manifest = read_manifest(out)
            entries = manifest["tensors"].values()
            sketched = [e["shape"] for e in entries if "bits" in e]
            kept = sum(_stored_bytes(e) for e in entries if "bits" not in e)
            disk = sum(file.stat().st_size for file in out.glob("*.safetensors")) - kept
            model = tt.load_base(out, dtype=torch.float16)
            weights = [p for p in model.parameters() if isinstance(p, SketchedWeight)]
            held = sum(p.sketch_codes.untyped_storage().nbytes() + p.sketch_table.untyped_storage().nbytes() for p in weights)
        count = sum(out * fan_in for out, fan_in in sketched)
        formula = sum(out * fan_in * b + out * 16 * 2**b for out, fan_in in sketched) / count
        row = {"bits": b, "weights": count, "formula": formula, "disk": 8 * disk / count, "memory": 8 * held / count}
        rows.append(row)
        off = [100 * (row[key] / formula - 1) for key in ("disk", "memory")]
        table.add(b, count, formula, row["disk"], off[0], row["memory"], off[1])
    print(table)
    write("bits", rows)


def _stored_bytes(entry: dict[str, Any]) -> int:
    """Bytes of a tensor that is kept: matrices in 16 bits, vectors and indices as in the source."""
    count = 1
    for size in entry["shape"]:
        count *= size
    wide = getattr(torch, entry["dtype"])
    return count * (2 if wide.is_floating_point and len(entry["shape"]) > 1 else wide.itemsize)


def instance(seed: int) -> tuple[Tensor, Tensor]:
    """A weight 192 x 512 with 1 % outliers, four times as large, and second moments of correlated inputs of unequal size."""
    rng, n = seeded(seed), 512
    mix = torch.eye(n) * 0.5 + torch.randn(n, n, generator=rng) / n**0.5
    x = torch.randn(2048, n, generator=rng) @ mix * (torch.randn(n, generator=rng) * 0.8).exp()
    W = torch.randn(192, n, generator=rng) * 0.02
    W[torch.rand(192, n, generator=rng) < 0.01] *= 4
    moments = Hessian(n)
    moments.add(x)
    return W, moments.value


def recipes(W: Tensor, H: Tensor, b: int) -> dict[str, float]:
    """Error of every recipe in per cent."""
    found, flat = curvature(H, damping=DAMPING), curvature(H, damping=DAMPING, act_order=False)
    low, high = W.min(1).values[:, None], W.max(1).values[:, None]
    grid = (low + (high - low) * torch.linspace(0, 1, 1 << b))[:, None]

    def off(T: Tensor, codes: Tensor) -> float:
        D = W - T.gather(-1, codes.long()).flatten(1)
        return 100 * ((D @ H * D).sum() / (W @ H * W).sum()).item()

    def learnt(p: float, groups: int = 1, by: Any = found) -> Tensor:
        return codebook(W, b, groups, weights=by.importance(p), rng=seeded()).float()

    result = {"min-max": off(grid, nearest_codes(W, grid)), "min-max, sweep": off(grid, sweep(W, grid, found))}
    for p in (0, 2):
        T = learnt(p)
        result[f"k-means p {p}"] = off(T, nearest_codes(W, T))
    for p in (0, 1, 2, 3, 4):
        T = learnt(p)
        result[f"p {p}, sweep"] = off(T, sweep(W, T, found))
        T = published(W, b, found.importance(p))
        result[f"p {p}, sweep, scikit-learn's tables"] = off(T, sweep(W, T, found))
    T = learnt(4, by=flat)
    result["p 4, sweep, columns as they stand"] = off(T, sweep(W, T, flat))
    for g in (2, 4, 8):
        T = learnt(4, g)
        result[f"p 4, sweep, {g} groups"] = off(T, sweep(W, T, found))
    return result


def published(W: Tensor, b: int, weights: Tensor) -> Tensor:
    """Tables as the published code learns them (arXiv 2407.10032): evenly spaced starts up to 8 values, else one k-means++."""
    from sklearn.cluster import KMeans

    tables = []
    for row in W.double().numpy():
        start = np.linspace(row.min(), row.max(), 2**b)[:, None] if b <= 3 else "k-means++"
        found = KMeans(2**b, init=start, n_init=1, random_state=0, max_iter=100, tol=1e-6)
        tables.append(np.sort(found.fit(row[:, None], sample_weight=weights.numpy()).cluster_centers_[:, 0]))
    return torch.from_numpy(np.stack(tables)).float()[:, None]


def error() -> None:
    """See the module."""
    from sklearn.cluster import KMeans

    def cost(values: Tensor, centres: Tensor) -> Tensor:
        return (values - centres.gather(1, assign(values, centres).long())).square().sum(1)

    rows = []
    columns = ("values", "restarts", "above the optimum %", "at most %", "scikit-learn %", "reference %")
    table = Table(columns, title="k-means of normal numbers, 16 clusters")
    for n, count, reference in ((4096, 8, {1: "0.5 above sklearn", 4: "3 below"}), (600, 24, {4: "1 to 11", 8: "1 to 11"})):
        values = torch.randn(count, n, generator=seeded(n), dtype=torch.float64)
        best = torch.tensor([optimum(v, 16) for v in values], dtype=torch.float64)
        settings = {"n_init": 1, "random_state": 0, "max_iter": 100, "tol": 1e-6}
        theirs = torch.tensor([KMeans(16, **settings).fit(v[:, None].numpy()).inertia_ for v in values], dtype=torch.float64)
        for restarts in (1, 4, 8):
            off = 100 * (cost(values, kmeans(values, 16, restarts=restarts, rng=seeded())) / best - 1)
            peer = 100 * (theirs / best - 1).mean().item()
            rows.append({"values": n, "restarts": restarts, "above": off.mean().item(), "most": off.max().item(), "peer": peer})
            table.add(*rows[-1].values(), reference.get(restarts, ""))
    print(table)
    losses = {b: [recipes(*instance(seed), b) for seed in range(SEEDS)] for b in (4, 3, 2)}
    found = []
    columns = ("bits", "recipe", "error %", "± s.d.", "scikit-learn's tables %", "reference %")
    shown = Table(columns, title=f"192 x 512, damping {DAMPING}, {SEEDS} instances", limit=60)
    for b, runs in losses.items():
        for recipe in (name for name in runs[0] if "scikit" not in name):
            mine = [run[recipe] for run in runs]
            row = {"bits": b, "recipe": recipe, "error": statistics.fmean(mine), "deviation": statistics.stdev(mine)}
            theirs = [run[key] for run in runs if (key := f"{recipe}, scikit-learn's tables") in run]
            row["scikit-learn's tables"] = statistics.fmean(theirs) if theirs else None
            row["reference"] = REFERENCE.get((b, recipe))
            found.append(row)
            shown.add(*("" if value is None else value for value in row.values()))
    print(shown)
    write("error", {"k-means": rows, "recipes": found})


def optimum(values: Tensor, size: int) -> float:
    """The least cost of one row in ``size`` clusters, by dynamic programming over runs of the sorted values."""
    v = values.double().sort().values
    zero = torch.arange(len(v) + 1, dtype=torch.float64)
    one, two = (torch.cat([torch.zeros(1, dtype=torch.float64), x.cumsum(0)]) for x in (v, v * v))
    count, sums, squares = (s[None, :] - s[:, None] for s in (zero, one, two))
    runs = torch.where(count > 0, squares - sums**2 / count.clamp(min=1), torch.inf)
    runs = torch.where(count == 0, 0.0, runs)
    best = runs[0]
    for _ in range(size - 1):
        best = (best[:, None] + runs).min(0).values
    return best[-1].item()


def clock() -> None:
    """See the module."""
    torch.set_num_threads(2)
    W = torch.randn(4096, 4096, generator=seeded()) * 0.02
    x = torch.randn(4, 2048, 4096, generator=seeded(1))
    rows = [{"way": "without data", **compression(W, None)}, {"way": "with data", **compression(W, x)}]
    columns = ("way", "data s", "k-means s", "codes s", "whole s", "of both cores s", "limit s")
    table = Table(columns, title="4096 x 4096 to 4 bits, two threads")
    for row in rows:
        table.add(*row.values(), 20)
    print(table)
    write("time", rows)


def compression(W: Tensor, x: Tensor | None) -> dict[str, float]:
    """Seconds of every step from a dense weight, and the inputs of its layer, to packed codes and a table in 16 bits.

    ``cores`` is the processor's time of both threads, for machines on which other work runs (with OMP_WAIT_POLICY=PASSIVE, else
    a thread that waits for the other counts as well): what one core alone would need.
    """
    spent = time.process_time()
    times, found, weights = [time.perf_counter()], None, None
    if x is not None:
        moments = Hessian(W.shape[1])
        moments.add(x)
        found = curvature(moments.value)
        weights = found.importance(3.0)
    times.append(time.perf_counter())
    T = codebook(W, 4, 1, weights=weights, rng=seeded()).half().float()
    times.append(time.perf_counter())
    pack(nearest_codes(W, T) if found is None else sweep(W, T, found), 4)
    times.append(time.perf_counter())
    data, centres, codes = (after - before for before, after in pairwise(times))
    whole, cores = times[-1] - times[0], time.process_time() - spent
    return {"data": data, "k-means": centres, "codes": codes, "whole": whole, "cores": cores}


#: base of the supersense comparison -> how it is sketched; None: dense
BASES = {"LoRA, dense": None, "SketchTune": tt.BaseSketch()}


def supersense() -> None:
    """See the module."""
    import quality
    from quality_tasks import ROOT as REPOSITORY
    from quality_tasks import Supersense, get_task, load_config

    torch.set_num_threads(1)
    stored = json.loads(RESULTS.read_text("utf-8")).get("supersense", {}) if RESULTS.is_file() else {}
    data = Supersense()
    cache = ROOT / "bench" / ".cache"
    earlier = json.loads((RESULTS.parent / "quality_supersense.json").read_text("utf-8"))
    rules = {"epochs": data.epochs, "train rows": len(data.splits["train"]), "batch": data.batch_size, "rates": 3}
    same = all(earlier["settings"][key] == value for key, value in rules.items())
    for name, sketch in BASES.items():
        start = earlier["methods"]["LoRA"] if sketch is None and same else {"search": [], "final": []}
        entry = stored.setdefault(name, start)
        model = MODEL
        if sketch is not None:
            model = cache / f"minilm-{name.replace(', ', '-').replace(' ', '-').lower()}"
            batches = text_batches(MODEL, "wordnet-supersense", samples=1024, length=128)
            tt.compress_base(MODEL, model, sketch=sketch, calibration=batches)
        entry |= sizes(model)
        config = load_config(REPOSITORY / "examples" / "supersense.yaml", overrides={"model": str(model)})
        data.pristine = get_task(config.task).prepare(config).model
        args = SimpleNamespace(rates=3, beyond=2 if sketch is None else 3, seeds=3)
        quality.measure("LoRA" if sketch is None else "SketchTune", data, args, entry, lambda: write("supersense", stored))
    table = Table(
        ("base and method", "MB on disk", "times smaller", "MB in memory, fp32", "trainable", "rate", "test %", "± s.e.", "vs LoRA")
    )
    first = stored["LoRA, dense"]
    for name, entry in stored.items():
        point = quality.summary(entry)
        gap = quality.against(entry, first)[0] if entry is not first else 0.0
        entry["test"], entry["against LoRA"] = point["test"], gap
        shown = [100 * value for value in (point["test"], point["error"], gap)]
        base = entry["disk"] / 1e6, first["disk"] / entry["disk"], entry["memory"] / 1e6
        table.add(name, *base, point["trainable"], f"{point['rate']:g}", *shown)
    print(table)
    write("supersense", stored)


def sizes(model: str | Path) -> dict[str, int]:
    """Bytes of a base's weights: of its files, and of its tensors as they are loaded to compute in float32."""
    from trimtab.training.models import resolve

    disk = sum(file.stat().st_size for file in Path(resolve(str(model))).glob("*.safetensors"))
    held: dict[int, int] = {}
    for p in tt.load_base(model).parameters():
        for part in (p.sketch_codes, p.sketch_table) if isinstance(p, SketchedWeight) else (p,):
            held[part.untyped_storage().data_ptr()] = part.nbytes
    return {"disk": disk, "memory": sum(held.values())}


PARTS = {"bits": bits, "error": error, "time": clock, "supersense": supersense}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    for part in parser.parse_args().parts:
        PARTS[part]()


if __name__ == "__main__":
    main()
