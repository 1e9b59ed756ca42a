"""Full fine-tuning, LoRA and S2FT side by side in one run: time, kept bytes, optimizer bytes and peak memory of a training step.

``python bench/sparse.py`` prints a table and writes ``bench/results/sparse.json``. The model is LLaMA-shaped with random weights
(``--width`` and the like). A step is forward, backward and AdamW. Times are medians over interleaved rounds, and so are the
ratios of neighbouring steps. S2FT trains one head of every o and as many channels of every down as make its count equal that of
LoRA of rank ``--rank`` on all linear layers; the paper's LoRA, on q, k, v, up and down, stands beside. Bytes are exact: storages
are counted, not pages.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import trimtab as tt
from overhead import build
from trimtab.core.account import LiveBytes, saved_bytes
from trimtab.core.table import Table

RESULTS = Path(__file__).parent / "results"
REFERENCES = ("full fine-tuning", "LoRA")


def slices(model: nn.Module, args: argparse.Namespace) -> None:
    """S2FT with as many trainable parameters as LoRA has."""
    w, f = args.width, args.intermediate
    wanted = args.rank * (4 * 2 * w + 3 * (w + f))  # a block, LoRA on q, k, v, o, gate, up, down
    channels, rest = divmod(wanted - 64 * w, w)
    if rest:
        raise SystemExit(f"LoRA's {wanted} numbers a block are no multiple of the width {w}: no S2FT has exactly as many")
    tt.attach(model, tt.S2FT(units=1), targets="attn.o")
    tt.attach(model, tt.S2FT(units=channels), targets="mlp.down")


def lora(targets: str, dropout: float = 0.0) -> Callable[[nn.Module, argparse.Namespace], None]:
    return lambda model, args: tt.attach(model, tt.LoRA(rank=args.rank, dropout=dropout), targets=targets) and None


ROWS: dict[str, Callable[[nn.Module, argparse.Namespace], None]] = {
    "full fine-tuning": lambda model, args: model.requires_grad_(True) and None,
    "LoRA": lora("linear"),
    "LoRA, the paper's places": lora("attn.q | attn.k | attn.v | mlp.up | mlp.down"),
    "LoRA, the paper's, dropout": lora("attn.q | attn.k | attn.v | mlp.up | mlp.down", 0.05),
    "S2FT": slices,
}


class Training:
    """A model with its optimizer, and one step of it."""

    def __init__(self, name: str, args: argparse.Namespace):
        self.model = build(args)
        ROWS[name](self.model, args)
        self.learns = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.learns, lr=1e-5)
        torch.manual_seed(args.seed)
        self.x = torch.randn(args.batch, args.tokens, args.width, dtype=getattr(torch, args.dtype))

    def step(self) -> float:
        start = time.perf_counter()
        self.forward().square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start

    def forward(self) -> torch.Tensor:
        return self.model(inputs_embeds=self.x, use_cache=False).last_hidden_state

    def bytes(self) -> dict[str, int]:
        """What stands, what forward keeps, what the optimizer holds, and the peak of a step with all of it."""
        size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)  # noqa: E731
        standing = size((*self.model.parameters(), *self.model.buffers()))
        state = size(t for s in self.optimizer.state.values() for t in s.values())
        with saved_bytes(self.model, beside=(self.x,)) as saved:
            self.forward()
        with LiveBytes() as live:
            self.step()
        return {"weights": standing, "optimizer": state, "kept": saved.total, "peak": standing + state + live.peak}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All rows, interleaved."""
    runs = {name: Training(name, args) for name in ROWS}
    times: dict[str, list[float]] = {name: [] for name in ROWS}
    for run in runs.values():
        run.step()
    for _ in range(args.rounds):
        for name, run in runs.items():
            times[name].append(run.step())
    results = {}
    for name, run in runs.items():
        row: dict[str, Any] = {"trainable": sum(p.numel() for p in run.learns), "seconds": statistics.median(times[name])}
        for other in REFERENCES:
            ratios = [a / b for a, b in zip(times[other], times[name], strict=True)]
            low, _, high = statistics.quantiles(ratios, n=4)
            row[f"{other} / this"], row[f"{other} spread"] = statistics.median(ratios), high - low
        results[name] = row | run.bytes()
    return results


def show(results: dict[str, Any], args: argparse.Namespace) -> None:
    """The table; bytes in MiB, and as a share of the references'."""
    columns = ("method", "trainable", "ms", "full / this", "LoRA / this", "kept", "of LoRA's", "optimizer", "peak", "of full's")
    table = Table(columns, title=f"a training step, {args.batch} x {args.tokens} tokens, width {args.width}, {args.dtype}")
    full, lora = (results[name] for name in REFERENCES)
    mib = lambda size: round(size / 2**20, 1)  # noqa: E731
    for name, r in results.items():
        table.add(
            name, r["trainable"], round(1e3 * r["seconds"]), round(r["full fine-tuning / this"], 3), round(r["LoRA / this"], 3),
            mib(r["kept"]), round(r["kept"] / lora["kept"], 3), mib(r["optimizer"]), mib(r["peak"]),
            round(r["peak"] / full["peak"], 3),
        )  # fmt: skip
    print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {"width": 1024, "layers": 4, "intermediate": 2816, "tokens": 1024, "batch": 1, "rank": 16, "rounds": 7, "threads": 2}
    for name, value in (sizes | {"seed": 0}).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", default=str(RESULTS / "sparse.json"))
    args = parser.parse_args()
    args.bias = False
    torch.set_num_threads(args.threads)
    results = measure(args)
    show(results, args)
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "bias")}
    record = {"settings": settings, "torch": torch.__version__, "trimtab": tt.__version__, "machine": platform.machine()}
    Path(args.out).write_text(json.dumps(record | {"results": results}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
