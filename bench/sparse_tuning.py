"""Peak training memory of sparse tuning: kernelised merges beside a masked dense update, in ViT-B's shape.

``python bench/sparse_tuning.py`` prints a table and writes ``bench/results/sparse_tuning.json``. Every row is two AdamW steps of a
ViT with random weights, all tensors counted: parameters and buffers of the model and the adapter, gradients, the state of the
optimizer and of the schedule, and what forward and backward make, at its peak. Storages are counted, not pages: the figure is
exact, and the same on every machine.

``masked dense`` is sparse tuning as GPS's release does it: every weight of the blocks' linear layers learns, its gradient is
multiplied by a mask (one byte an entry), the optimizer keeps two moments of everything.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import ViTConfig, ViTModel

import trimtab as tt
from trimtab.core.account import LiveBytes, saved_bytes
from trimtab.core.table import Table
from trimtab.methods.reparameterized.snella import SNELLAAdapter
from trimtab.schedules import BilevelCompetition, Schedule

RESULTS = Path(__file__).parent / "results"
Prepare = Callable[[nn.Module], None]


def linears(model: nn.Module) -> list[nn.Linear]:
    """The blocks' linear layers."""
    return [m for m in model.modules() if isinstance(m, nn.Linear)]


def masked(model: nn.Module) -> None:
    """One entry a row learns (GPS with K = 1): its mask keeps the gradient of the others at zero."""
    for layer in linears(model):
        layer.weight.requires_grad_(True)
        mask = torch.zeros(layer.weight.shape, dtype=torch.bool)
        mask[torch.arange(len(mask)), torch.randint(mask.shape[1], (len(mask),))] = True
        layer.register_buffer("mask", mask)
        layer.weight.register_hook(lambda grad, layer=layer: grad * layer.mask)


def attached(config: tt.MethodConfig) -> Prepare:
    def prepare(model: nn.Module) -> None:
        size = model.config.image_size
        x = torch.randn(2, 3, size, size)
        loss = (lambda m: m(x).last_hidden_state.square().mean()) if config.adapter_class.wants(config) else None
        tt.attach(model, config, loss=loss)

    return prepare


ROWS: dict[str, Prepare] = {
    "full fine-tuning": lambda model: model.requires_grad_(True),
    "masked dense": masked,
    "GPS, one entry a row": attached(tt.GPS(entries=1)),
    "LoRA, rank 8": attached(tt.LoRA(rank=8)),
    "SNELL, rank 8, s = 0.9": attached(tt.SNELL(rank=8, sparsity=0.9)),
    "SNELL, rank 32, s = 0.9": attached(tt.SNELL(rank=32, sparsity=0.9)),
    "SNELLA, rank 32, its budget": attached(tt.SNELLA(rank=32)),
}


def measure(args: argparse.Namespace, prepare: Prepare) -> dict[str, float]:
    """Peak bytes of two steps, and what a forward keeps."""
    torch.manual_seed(args.seed)
    config = ViTConfig(
        hidden_size=args.width, num_hidden_layers=args.layers, num_attention_heads=args.width // 64,
        intermediate_size=4 * args.width, image_size=args.image, hidden_dropout_prob=0.0,
    )  # fmt: skip
    model = ViTModel(config, add_pooling_layer=False).requires_grad_(False).train()
    prepare(model)
    x = torch.randn(args.batch, 3, args.image, args.image)
    learns = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learns, lr=1e-4, foreach=False)
    standing = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    with saved_bytes(model, beside=(x,)) as saved:
        model(x)
    competes = any(isinstance(m, SNELLAAdapter) for m in model.modules())
    with LiveBytes() as live:
        schedule = BilevelCompetition(0.9) if competes else Schedule()
        schedule.start(model, steps=2)
        for _ in range(2):
            optimizer.zero_grad()
            model(x).last_hidden_state.square().mean().backward()
            optimizer.step()
            schedule.step_end()
        schedule.finish()
    return {
        "trainable": sum(p.numel() for p in learns), "standing": standing, "kept for backward": saved.total,
        "peak": standing + live.peak,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("width", 768), ("layers", 12), ("image", 224), ("batch", 8), ("threads", 2), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", default=str(RESULTS / "sparse_tuning.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = {}
    for name, prepare in ROWS.items():
        results[name] = measure(args, prepare)
        print(f"{name}: {results[name]}", flush=True)
    table = Table(("method", "trainable", "kept MiB", "peak MiB", "below masked dense"), title=f"sparse tuning, batch {args.batch}")
    reference = results["masked dense"]["peak"]
    for name, r in results.items():
        share = f"{100 * (1 - r['peak'] / reference):.1f} %"
        table.add(name, r["trainable"], round(r["kept for backward"] / 2**20), round(r["peak"] / 2**20), share)
    print(table)
    settings = {k: v for k, v in vars(args).items() if k != "out"} | {"torch": torch.__version__}
    Path(args.out).write_text(json.dumps({"settings": settings, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
