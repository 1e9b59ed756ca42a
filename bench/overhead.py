"""What each method adds to a training step, beside huggingface/peft's same method, measured in one run.

``python bench/overhead.py`` prints a table and writes ``bench/results/overhead.json``. Columns:

- ``floor``: the frozen model's forward and backward to its activations, no adapter; everything else is over it.
- ``ours``, ``peft``: step time over the floor, medians of the ratios of neighbouring steps (rounds are interleaved).
- ``limit``: 1 + (the method's extra multiply-adds) / (the floor's), both counted by torch's FLOP counter on the same step,
  the method's own kernels included; elementwise work counts nothing, so that the limit cannot be reached.
- ``peft/ours``: ratio of the two step times, the median of pairwise ratios.
- ``x ours``, ``x peft``: bytes kept for backward beyond the floor, in units of the adapted layers' distinct inputs: 1.00 is
  "the inputs and nothing else".
- ``peak``: peak bytes of the tensors that a step makes, over the floor's.

``--rounds 0`` takes no times, and writes ``bench/results/overhead_untimed.json``: the other figures do not depend on how busy the
machine is.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import trimtab as tt
from trimtab.core.account import LiveBytes, count_flops, saved_bytes
from trimtab.core.table import Table

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One line of the table: our config, and peft's where it has the method."""

    name: str
    ours: Callable[[int], tt.MethodConfig]
    peft: Callable[[Any, int, list[str]], Any] | None = None
    targets: str | None = "linear"  # None: the method's own default
    same: bool = True  # whether peft's is the same method, and not its nearest relative


def lora(**more: Any) -> Callable[[Any, int, list[str]], Any]:
    return lambda peft, r, t: peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules=t, **more)


#: twenty learned tokens, in peft's words
TWENTY = {"num_virtual_tokens": 20, "task_type": "FEATURE_EXTRACTION"}

ROWS = (
    Row("LoRA", lambda r: tt.LoRA(rank=r), lora()),
    Row("LoRA dropout", lambda r: tt.LoRA(rank=r, dropout=0.05), lora(lora_dropout=0.05)),
    Row("RsLoRA", lambda r: tt.RsLoRA(rank=r), lora(use_rslora=True)),
    Row("DoRA", lambda r: tt.DoRA(rank=r), lora(use_dora=True)),
    Row("PiSSA", lambda r: tt.PiSSA(rank=r), lora(init_lora_weights="pissa_niter_4")),
    Row("OLoRA", lambda r: tt.OLoRA(rank=r), lora(init_lora_weights="olora")),
    Row("LoRAGA", lambda r: tt.LoRAGA(rank=r), None),
    Row("AdaLoRA", lambda r: tt.AdaLoRA(rank=r), lambda p, r, t: p.AdaLoraConfig(init_r=r, target_modules=t, total_step=10**6)),
    Row("VeRA", lambda r: tt.VeRA(rank=256), lambda p, r, t: p.VeraConfig(r=256, target_modules=t)),
    Row("LoHa", lambda r: tt.LoHa(rank=8), lambda p, r, t: p.LoHaConfig(r=8, alpha=8, target_modules=t)),
    Row("LoKr", lambda r: tt.LoKr(rank=r), lambda p, r, t: p.LoKrConfig(r=r, alpha=r, target_modules=t)),
    Row("OFT", lambda r: tt.OFT(block_size=32), lambda p, r, t: p.OFTConfig(oft_block_size=32, r=0, target_modules=t)),
    Row("BOFT", lambda r: tt.BOFT(block_size=4),
        lambda p, r, t: p.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=1, target_modules=t)),
    Row("FourierFT", lambda r: tt.FourierFT(), lambda p, r, t: p.FourierFTConfig(n_frequency=1000, target_modules=t)),
    Row("MiSS", lambda r: tt.MiSS(rank=64), lambda p, r, t: p.MissConfig(r=64, target_modules=t)),
    Row("Bone", lambda r: tt.Bone(rank=64), lambda p, r, t: p.MissConfig(r=64, target_modules=t)),
    Row("Bat", lambda r: tt.Bat(rank=64), lambda p, r, t: p.MissConfig(r=64, init_weights="bat", target_modules=t)),
    Row("Bat row", lambda r: tt.Bat(rank=64, form="row"), None),
    Row("Bat left", lambda r: tt.Bat(rank=64, form="left"), None),
    Row("MiSS outputs", lambda r: tt.MiSS(rank=64, shared="outputs"), None),
    Row("HUT", lambda r: tt.HUT(rank=8), None),
    Row("HUT rank 1", lambda r: tt.HUT(rank=1), None),
    Row("WaRA", lambda r: tt.WaRA(rank=r // 2),  # beside its nearest relative, with as many parameters on a square layer
        lambda p, r, t: p.WaveFTConfig(target_modules=t, n_frequency=r // 2 * 1024), same=False),
    Row("WaRASpatial", lambda r: tt.WaRASpatial(rank=r, grid=(32, 32), prefix=0), None),
    Row("TinyWaRA", lambda r: tt.TinyWaRA(rank=r, grid=(32, 32), prefix=0), None),
    Row("BitFit", lambda r: tt.BitFit(), None, "linear"),
    Row("NormTuning", lambda r: tt.NormTuning(), lambda p, r, t: p.LNTuningConfig(target_modules=r".*norm"), "norm"),
    Row("Unfreeze", lambda r: tt.Unfreeze(), None, "linear"),
    Row("SoKA", lambda r: tt.SoKA(rank=2), None),
    Row("TLoRA", lambda r: tt.TLoRA(rank=4, order=3), None),
    Row("Consolidator", lambda r: tt.Consolidator(groups=256), None),
    Row("GPS", lambda r: tt.GPS(entries=1), None),
    Row("SPT", lambda r: tt.SPT(budget=0.005), None),
    Row("S2FT", lambda r: tt.S2FT(ratio=r / 256, pool="layer"), None, "attn.o | mlp.down"),
    Row("IA3", lambda r: tt.IA3(), lambda p, r, t: p.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]), "attn.k | attn.v | mlp.down"),
    Row("SSF", lambda r: tt.SSF(), None, "linear"),
    Row("PrefixTuning", lambda r: tt.PrefixTuning(tokens=20), lambda p, r, t: p.PrefixTuningConfig(**TWENTY), "block"),
    Row("PrefixTuning gated", lambda r: tt.PrefixTuning(tokens=20, gated=True), None, "block"),
    Row("PromptTuning", lambda r: tt.PromptTuning(tokens=20, init="normal"),
        lambda p, r, t: p.PromptTuningConfig(**TWENTY), "block"),
    Row("PTuning", lambda r: tt.PTuning(tokens=20, hidden=1024),
        lambda p, r, t: p.PromptEncoderConfig(**TWENTY, encoder_hidden_size=1024), "block"),
    Row("VPT", lambda r: tt.VPT(tokens=20), None, "block"),
    # peft has no bottleneck adapters; widths as their papers have them
    Row("SeriesAdapter", lambda r: tt.SeriesAdapter(bottleneck=64), None, None),
    Row("SeriesAdapter mlp", lambda r: tt.SeriesAdapter(bottleneck=64, placement="pfeiffer"), None, None),
    Row("ParallelAdapter", lambda r: tt.ParallelAdapter(bottleneck=64), None, None),
    Row("ParallelAdapter linear", lambda r: tt.ParallelAdapter(bottleneck=64, act="tanh", bias=False, placement="llm"), None, None),
    Row("AdaptFormer", lambda r: tt.AdaptFormer(bottleneck=64), None, None),
    Row("Compacter", lambda r: tt.Compacter(), None, None),
    Row("AttentionFusion", lambda r: tt.AttentionFusion(adapters=("one", "two")), None, None),
    Row("AttentionFusion rank", lambda r: tt.AttentionFusion(adapters=("one", "two"), rank=r, value=False), None, None),
    Row("ReFT", lambda r: tt.ReFT(rank=r), None, None),
    Row("ReFT ends", lambda r: tt.ReFT(rank=r, first=7, last=7), None, None),
)  # fmt: skip


def rows() -> tuple[Row, ...]:
    """The rows above, and one by its defaults for every registered method that they do not have."""
    known = {type(row.ours(16)).__name__ for row in ROWS}
    more = [(name, tt.get(name)) for name in tt.names() if name not in known]
    return ROWS + tuple(
        Row(name, lambda r, c=config: c(), targets=None if issubclass(config.adapter_class, tt.ActivationAdapter) else "linear")
        for name, config in more
    )


def build(args: argparse.Namespace) -> nn.Module:
    """A LLaMA-shaped model with random weights, without its head's cost: the body alone."""
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        hidden_size=args.width, num_hidden_layers=args.layers, intermediate_size=args.intermediate, vocab_size=256,
        num_attention_heads=max(1, args.width // 64), num_key_value_heads=max(1, args.width // 64),
        max_position_embeddings=args.tokens,
        attention_bias=args.bias,
    )  # fmt: skip
    return LlamaForCausalLM(config).model.to(getattr(torch, args.dtype)).requires_grad_(False).train()


class Step:
    """One training step's forward and backward on a fixed input; the input embeddings need a gradient, as inside a deep model."""

    def __init__(self, model: nn.Module, x: Tensor):
        self.model, self.x = model, x
        self.grad = torch.ones_like(x)

    def __call__(self) -> float:
        start = time.perf_counter()
        self.forward().backward(self.grad)
        spent = time.perf_counter() - start
        self.x.grad = None
        for parameter in self.model.parameters():
            parameter.grad = None
        return spent

    def forward(self) -> Tensor:
        # peft's outputs begin with those of learned tokens
        return self.model(inputs_embeds=self.x, use_cache=False).last_hidden_state[:, -self.x.shape[1] :]


def kept(step: Step) -> int:
    """Bytes kept for backward."""
    with saved_bytes(step.model, beside=(step.x,)) as saved:
        step.forward()
    return saved.total


def operations(step: Step) -> int:
    """Multiply-adds, times two, of forward and backward."""
    with count_flops() as counter:
        step()
    return counter.get_total_flops()


def peak(step: Step) -> int:
    """Peak bytes of the tensors that a step makes."""
    with LiveBytes() as live:
        step()
    return live.peak


def ours(args: argparse.Namespace, row: Row) -> nn.Module:
    model = build(args)
    loss = None
    if (config := row.ours(args.rank)).adapter_class.wants(config):
        x = torch.randn(1, 8, args.width, dtype=getattr(torch, args.dtype))
        loss = lambda m: m(inputs_embeds=x, use_cache=False).last_hidden_state.pow(2).sum()  # noqa: E731
    for name in config.adapter_class.needs(config):
        tt.attach(model, tt.SeriesAdapter(bottleneck=64), name=name, trainable=False)
        tt.activate(model)
    tt.attach(model, config, targets=row.targets, loss=loss, check_gradients=False)
    return model


def theirs(args: argparse.Namespace, row: Row) -> nn.Module | None:
    if row.peft is None or args.no_peft:
        return None
    import peft

    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = row.peft(peft, args.rank, names)
    model = peft.get_peft_model(build(args), config)
    return model.train() if config.is_prompt_learning else model.base_model.model


def move(model: nn.Module) -> None:
    """Leave the start, where zero factors might make some products cheaper than later."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 1e-3)


def units(args: argparse.Namespace) -> int:
    """Bytes of the distinct inputs of the adapted layers that the floor does not keep: q, k, v share one, gate and up one,
    down has its own; o's is kept by attention anyway."""
    size = torch.finfo(getattr(torch, args.dtype)).bits // 8
    return args.layers * args.tokens * (2 * args.width + args.intermediate) * size


def measure(args: argparse.Namespace, row: Row, floor: Step) -> dict[str, Any]:
    """All figures of one row."""
    models = {"ours": ours(args, row), "peft": theirs(args, row)}
    steps = {"floor": floor}
    for key, model in models.items():
        if model is not None:
            move(model)
            steps[key] = Step(model, floor.x)
    times: dict[str, list[float]] = {key: [] for key in steps}
    for turn in range(args.rounds + 1 if args.rounds else 0):
        for key, step in steps.items():
            spent = step()
            times[key] += [spent] if turn else []  # the first warms up
    base_flops, base_kept, base_peak = operations(floor), kept(floor), peak(floor)
    result: dict[str, Any] = {
        "trainable": sum(p.numel() for p in models["ours"].parameters() if p.requires_grad),
        "limit": operations(steps["ours"]) / base_flops,
    }
    if args.rounds:
        result["floor seconds"] = statistics.median(times["floor"])
    for key in steps:
        if key == "floor":
            continue
        if args.rounds:
            ratios = [a / b for a, b in zip(times[key], times["floor"], strict=True)]
            result[f"{key} over floor"] = statistics.median(ratios)
            result[f"{key} spread"] = statistics.quantiles(ratios, n=4)[2] - statistics.quantiles(ratios, n=4)[0]
        result[f"{key} kept x"] = (kept(steps[key]) - base_kept) / units(args)
        result[f"{key} peak"] = peak(steps[key]) / base_peak
    if "peft" in steps and args.rounds:
        result["peft / ours"] = statistics.median(a / b for a, b in zip(times["peft"], times["ours"], strict=True))
    return result


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", default="", help="comma-separated rows; all if empty")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--intermediate", type=int, default=2816)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-peft", action="store_true")
    parser.add_argument("--out", default=None, help="default: overhead.json, or overhead_untimed.json for no rounds")
    args = parser.parse_args()
    args.out = args.out or str(RESULTS / ("overhead.json" if args.rounds else "overhead_untimed.json"))
    return args


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What makes rows comparable: sizes, threads, versions."""
    import peft

    given = {k: v for k, v in vars(args).items() if k not in ("out", "methods", "bias")}
    return {
        "settings": given, "torch": torch.__version__, "peft": peft.__version__, "trimtab": tt.__version__,
        "machine": platform.machine(),
    }  # fmt: skip


def earlier(out: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Rows that an interrupted run with the same settings has written; delete the file to measure them again."""
    if not out.is_file():
        return {}
    stored = json.loads(out.read_text())
    return stored["results"] if {k: stored.get(k) for k in record} == record else {}


def main() -> None:
    args = arguments()
    args.bias = False
    torch.set_num_threads(args.threads)
    chosen = [name.strip() for name in args.methods.split(",") if name.strip()]
    every = rows()
    unknown = set(chosen) - {row.name for row in every}
    if unknown:
        raise SystemExit(f"unknown rows {sorted(unknown)}; there are: {', '.join(row.name for row in every)}")
    plain = build(args)
    x = torch.randn(1, args.tokens, args.width, dtype=getattr(torch, args.dtype), requires_grad=True)
    out = Path(args.out)
    record = settings(args)
    results = earlier(out, record)
    for row in every:
        if (chosen and row.name not in chosen) or (not chosen and row.name in results):
            continue
        args.bias = row.name == "BitFit"
        floor = Step(build(args) if args.bias else plain, x)
        results[row.name] = measure(args, row, floor)
        gc.collect()
        print(f"{row.name}: {results[row.name]}", flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record | {"results": results}, indent=1) + "\n")
    table = Table(
        ("method", "trainable", "limit", "ours", "peft", "peft/ours", "x ours", "x peft", "peak ours", "peak peft"),
        title="overhead of a training step",
    )
    for name, r in results.items():
        get = lambda key, r=r: r.get(key, float("nan"))  # noqa: E731
        row = [name, r["trainable"], r["limit"], get("ours over floor"), get("peft over floor"), get("peft / ours")]
        row += [r["ours kept x"], get("peft kept x"), r["ours peak"], get("peft peak")]
        table.add(*row[:2], *(round(value, 3) for value in row[2:]))
    print(table)
    same = {row.name for row in every if row.same}
    both = [r["peft / ours"] for name, r in results.items() if name in same and "peft / ours" in r]
    if both:
        print(f"geometric mean of peft's time over ours: {statistics.geometric_mean(both):.3f} ({len(both)} methods)")


if __name__ == "__main__":
    main()
