"""Merging, side by side with peft in one run: several adapters into one, and one into a base on disk.

``python bench/merge.py`` prints two tables and writes ``bench/results/merge.json``; ``--part one`` or ``--part base`` renews one.

Into one: ``--adapters`` LoRAs of rank ``--rank`` on one layer of ``--width`` inputs and outputs become one of that rank.
peft's ``add_weighted_adapter`` with ``combination_type="svd"`` and its defaults works in memory; ``tt.combine`` reads the adapters
from disk, checks their hashes, and writes the result. Errors are relative Frobenius norms against the weighted sum, in float64.
peft runs once (it takes a minute at width 4096), trimtab ``--rounds`` times, of which the median counts. Seconds on the clock stand
beside the processor's own (all threads), which a busy machine changes little.

Into the base: a LLaMA-shaped bf16 checkpoint in shards and a LoRA on all its linear layers. Every way runs in a process of its own,
once on a tiny model and then on this one; the peak is the largest resident size beyond what there was in between (Linux).
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import trimtab as tt
from trimtab.core.table import Table

RESULTS = Path(__file__).parent / "results"


# -- several adapters into one


class Layer(nn.Module):
    """One linear layer."""

    def __init__(self, width: int):
        super().__init__()
        self.fc = nn.Linear(width, width, bias=False)


def saved_adapters(folder: Path, args: argparse.Namespace) -> list[Path]:
    """LoRAs with random factors, each in a folder."""
    folders = []
    for i in range(args.adapters):
        torch.manual_seed(args.seed)
        model = Layer(args.width)
        rng = torch.Generator().manual_seed(args.seed + i)
        tt.attach(model, tt.LoRA(rank=args.rank), targets="fc", name=f"a{i}", rng=rng)
        with torch.no_grad():
            for parameter in tt.parameters(model):
                parameter.copy_(torch.randn(parameter.shape, generator=rng) / args.width**0.5)
        folders.append(tt.save(model, folder / f"a{i}", name=f"a{i}"))
    return folders


def update(model: nn.Module, name: str) -> Tensor:
    """``W' - W`` of one of our adapters on the layer, in float64."""
    adapter = model.__dict__["_trimtab_state"].groups[name].adapters[0]
    return adapter.config.scale * (adapter.b.detach().double() @ adapter.a.detach().double())


def peft_update(layer: nn.Module, name: str) -> Tensor:
    """The same of one of peft's, from its own factors."""
    b, a = layer.lora_B[name].weight.detach().double(), layer.lora_A[name].weight.detach().double()
    return layer.scaling[name] * (b @ a)


def into_one(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Both ways, timed, with their errors."""
    import peft

    folders = saved_adapters(work, args)
    weights = [0.7, 0.5, -0.4, 0.3, 0.6, -0.2, 0.9, 0.1][: args.adapters]
    torch.manual_seed(args.seed)
    theirs = None
    for i, folder in enumerate(folders):
        tt.convert(folder, work / f"p{i}", to="peft")
        if theirs is None:
            theirs = peft.PeftModel.from_pretrained(Layer(args.width), work / f"p{i}", adapter_name=f"a{i}")
        else:
            theirs.load_adapter(work / f"p{i}", adapter_name=f"a{i}")
    layer = theirs.base_model.model.fc
    exact = sum(w * peft_update(layer, f"a{i}") for i, w in enumerate(weights))
    size = exact.norm()

    names = [f"a{i}" for i in range(args.adapters)]
    rounds = [timed(tt.combine, folders, work / f"m{i}", weights=weights, rank=args.rank) for i in range(args.rounds)]
    ours = {key: statistics.median(row[key] for row, _ in rounds) for key in rounds[0][0]}
    exact_time, whole = timed(tt.combine, folders, work / "cat", weights=weights)
    slow, _ = timed(theirs.add_weighted_adapter, names, weights, "merged", combination_type="svd")
    linear, _ = timed(theirs.add_weighted_adapter, names, weights, "linear", combination_type="linear")

    model = Layer(args.width)
    tt.load(model, work / "m0", name="m", check_base=False)
    tt.load(model, work / "cat", name="cat", check_base=False)
    error = lambda D: ((D - exact).norm() / size).item()  # noqa: E731
    report, rank = rounds[0][1], args.rank
    return {
        "peft svd": slow | {"error": error(peft_update(layer, "merged")), "rank": rank},
        "peft linear": linear | {"error": error(peft_update(layer, "linear")), "rank": rank},
        "trimtab at the rank": ours
        | {"error": error(update(model, "m")), "rank": rank, "reported error": report.column("error")[0], "rounds": len(rounds)},
        "trimtab exact": exact_time
        | {"error": error(update(model, "cat")), "rank": whole.column("rank")[0], "reported error": whole.column("error")[0]},
        "times faster": {key: slow[key] / ours[key] for key in ours},
    }


def timed(function: Callable[..., Any], *args: Any, **more: Any) -> tuple[dict[str, float], Any]:
    """Seconds on the clock and of the processor, and the result."""
    start, used = time.perf_counter(), time.process_time()
    result = function(*args, **more)
    return {"seconds": time.perf_counter() - start, "cpu seconds": time.process_time() - used}, result


# -- one adapter into the base, a process each

WAYS = ("trimtab on disk", "trimtab in memory", "peft")


def prepare(args: argparse.Namespace, work: Path, *, width: int, layers: int) -> None:
    """A checkpoint and an adapter for it, in both formats."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(args.seed)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers, num_attention_heads=width // 64,
        vocab_size=8 * width,
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(work / "base", max_shard_size=args.shard)
    tt.attach(model, tt.LoRA(rank=args.rank), targets="linear", name="a")
    with torch.no_grad():
        for parameter in tt.parameters(model):
            parameter.copy_(torch.randn(parameter.shape) * 0.01)
    tt.save(model, work / "a")
    tt.save(model, work / "p", format="peft")


def one_way(way: str, work: Path) -> None:
    """Run one way in this process and print its figures as JSON; a tiny model goes first, so that all imports are done."""

    def run(folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        out = folder / "out"
        if way == "trimtab on disk":
            tt.merge_checkpoint(folder / "a", folder / "base", out=out)
        else:
            model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto")
            if way == "peft":
                import peft

                model = peft.PeftModel.from_pretrained(model, folder / "p").merge_and_unload()
            else:
                tt.load(model, folder / "a")
                tt.merge(model, "a", permanent=True)
            model.save_pretrained(out, max_shard_size="100GB")

    run(work / "tiny")
    shutil.rmtree(work / "tiny" / "out")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew at what is resident now
    before = resident("VmRSS")
    row, _ = timed(run, work)
    print("RESULT" + json.dumps(row | {"peak bytes": resident("VmHWM") - before}))
    shutil.rmtree(work / "out")


def resident(field: str) -> int:
    """Bytes of this process that Linux reports under ``field``."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def into_base(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All ways."""
    prepare(args, work / "tiny", width=64, layers=1)
    prepare(args, work, width=args.base_width, layers=args.layers)
    files = [f.stat().st_size for f in (work / "base").glob("*.safetensors")]
    found: dict[str, Any] = {"model bytes": sum(files), "largest file": max(files), "files": len(files)}
    for way in WAYS:
        command = [sys.executable, __file__, "--one-way", way, "--work", str(work), "--threads", str(args.threads)]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found[way] = json.loads(next(line for line in shown.splitlines() if line.startswith("RESULT"))[6:])
    return found


def main() -> None:
    """Both tables, and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--base-width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--shard", default="40MB")
    parser.add_argument("--part", choices=("one", "base", "both"), default="both")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "merge.json")
    parser.add_argument("--one-way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.one_way:
        one_way(args.one_way, args.work)
        return
    found = json.loads(args.out.read_text("utf-8")) if args.part != "both" and args.out.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        if args.part != "base":
            found["into one"] = into_one(args, Path(folder))
            show_one(found["into one"], args)
        if args.part != "one":
            found["into the base"] = into_base(args, Path(folder) / "base")
            show_base(found["into the base"])
    versions = {"python": platform.python_version(), "torch": torch.__version__, "trimtab": tt.__version__}
    versions |= {name: version(name) for name in ("transformers", "peft")}
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "one_way", "part", "work")}
    record = {"settings": settings, "machine": platform.machine(), "versions": versions}
    args.out.write_text(json.dumps(found | record, indent=1) + "\n", "utf-8")


def show_one(one: dict[str, Any], args: argparse.Namespace) -> None:
    """The first table."""
    title = f"{args.adapters} LoRAs of rank {args.rank} at {args.width} x {args.width}"
    table = Table(("into one", "rank", "seconds", "cpu seconds", "error"), title=title)
    for name, row in one.items():
        if name != "times faster":
            table.add(name, row["rank"], row["seconds"], row["cpu seconds"], row["error"])
    clock, processor = one["times faster"].values()
    print(f"{table}\n\ntrimtab at the rank against peft svd: {clock:.0f} times faster, {processor:.0f} by the processor's time\n")


def show_base(base: dict[str, Any]) -> None:
    """The second table."""
    title = f"{base['model bytes'] / 2**20:.0f} MiB in {base['files']} files, the largest of {base['largest file'] / 2**20:.0f} MiB"
    table = Table(("into the base", "seconds", "cpu seconds", "peak MiB", "of the model"), title=title)
    for way in WAYS:
        row = base[way]
        share = row["peak bytes"] / base["model bytes"]
        table.add(way, row["seconds"], row["cpu seconds"], row["peak bytes"] / 2**20, share)
    print(table)


if __name__ == "__main__":
    main()
