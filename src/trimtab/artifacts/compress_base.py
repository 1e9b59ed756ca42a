"""compress_base: turn a model on disk into its sketch, shard by shard; with calibration data also block by block.

Without data the tables are k-means of the weights and the codes the nearest entries. With data, layer by layer in the order in
which the model runs them, each layer's inputs coming from layers that are compressed already: tables by k-means with the columns
weighted by second-order information, then codes by the sweep (kernels/sweep.py).

Sources: arXiv 2410.06364 (the sketch), 2407.10032 (how tables and codes are learnt).
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from trimtab.artifacts.sketch_blocks import BlockWalk
from trimtab.artifacts.sketch_plan import BaseSketch, Plan, Shard, Targets, make_plan
from trimtab.artifacts.sketch_writer import SketchWriter
from trimtab.artifacts.source import Source, empty_model
from trimtab.compat.sketched import SketchedWeight
from trimtab.core.errors import CheckpointMismatch, Unsupported
from trimtab.core.files import locked
from trimtab.core.folders import apart, writing
from trimtab.core.table import Table
from trimtab.kernels.codes import pack
from trimtab.kernels.sweep import Curvature, Hessian, SingularHessian, codebook, curvature, nearest_codes, sweep

__all__ = ["BaseSketch", "compress_base"]

Batches = Iterable[Mapping[str, Tensor]]


def compress_base(
    model: str | Path,
    out: str | Path,
    *,
    sketch: BaseSketch | None = None,
    targets: Targets = None,
    calibration: Batches | None = None,
    shard_bytes: int = 1 << 30,
    device: torch.device | str = "cpu",
    console: Console | None = None,
) -> Table:
    """Write the sketch of ``model`` to the folder ``out``; goes on where an earlier call was interrupted.

    Memory: about one dense shard, or one block where it is larger; with calibration data also the model's embeddings and the data's
    hidden states.

    Args:
        model: a model folder with safetensors, a packaged model, or a Hub id.
        sketch: bits, groups and how they are learnt.
        targets: which Linear layers, as in ``tt.attach``; None: those in the blocks.
        calibration: inputs of the model, a batch each, without padding; the same again when a run is taken up.
        shard_bytes: dense bytes that are worked on at once.
        device: that computes.
        console: where progress is shown; None: nowhere.

    Returns:
        A row a sketched tensor: bits a weight, the relative squared error of the weight and of its outputs on the data, in per
        cent, and the tokens that it saw.

    Raises:
        ConfigError: no such model. NoMatch, ShapeMismatch, Unsupported: layers that cannot be sketched, all together, or a folder
        with something else in it; nothing is written then. CheckpointMismatch: damaged files, or weights that are not finite.
    """
    sketch = sketch or BaseSketch()
    source = Source.open(model)
    apart(out, [model, source.folder])
    batches = None if calibration is None else [dict(batch) for batch in calibration]
    if batches is not None and not batches:
        raise Unsupported("the calibration data is empty; give at least one batch, or none at all")
    empty, walked = empty_model(source.folder), batches is not None
    plan = make_plan(source, empty, sketch, targets=targets, shard_bytes=shard_bytes, walked=walked)
    named = targets is None or isinstance(targets, (str, list, tuple))
    settings = asdict(sketch) | {
        "targets": (list(targets) if isinstance(targets, tuple) else targets) if named else list(plan.matrices),
        "calibration": None if batches is None else _facts_of(batches),
    }
    with writing(Path(out)), locked(Path(out), "is sketching into"):
        writer = SketchWriter(Path(out), plan, settings)
        writer.begin()
        work = _Work(plan, writer, batches, torch.device(device))
        with _progress(plan, console or Console(quiet=True)) as work.advance:
            for shard in plan.shards:
                work.shard(shard)
    found = _table(writer.manifest)
    if batches is not None:
        _warn_of_thin_data(writer.manifest)
    return found


class _Work:
    """What stands in memory while a model is sketched: the tensors of the shard in question, and the walk through the blocks."""

    def __init__(self, plan: Plan, writer: SketchWriter, batches: list[dict[str, Tensor]] | None, device: torch.device):
        self.plan, self.writer, self.device = plan, writer, device
        self.made: dict[str, Tensor] = {}
        self.earlier: dict[str, dict[str, Tensor]] = {}
        self.facts: dict[str, dict[str, Any]] = {}
        self.advance: Any = lambda key, shard: None
        self.walk = None
        if batches is not None:
            self.walk = BlockWalk(plan.model, plan.anatomy, batches, self.value, device=device)

    def shard(self, shard: Shard) -> None:
        """Make one shard, or only run through it if it is there."""
        done = self.writer.finished(shard)
        self.facts, self.earlier = {}, {}
        self.made = self.writer.read(shard.file) if done and self.walk else {}
        blocks = {block: self._in_block(shard, block) for block in self._blocks(shard)}
        walked = {key for keys in blocks.values() for key in keys}
        for key in shard.keys:
            if not done and key not in walked:
                self.made[key] = self._sketched(key, None, None) if key in self.plan.matrices else self._kept(key)
                self.advance(key, shard)
        for block, keys in blocks.items():
            paths = [self.plan.matrices[key].path for key in keys]
            self.walk.walk(block, paths, None if done else lambda layers, moments: self._learn(layers, moments, shard))
        if not done:
            self.writer.add(shard, {key: self.made[key] for key in shard.keys}, self.facts)
        self.advance(None, shard)

    def _blocks(self, shard: Shard) -> tuple[int, ...]:
        """The blocks that are walked through for ``shard``; a model without blocks is one, in one shard."""
        if self.walk is None:
            return ()
        return shard.blocks if self.plan.anatomy.blocks else (0,)

    def _in_block(self, shard: Shard, block: int) -> list[str]:
        """The shard's tensors that are sketched with the data that reaches ``block``."""
        whole = not self.plan.anatomy.blocks
        return [key for key in shard.keys if key in self.plan.matrices and (whole or self.plan.matrices[key].block == block)]

    def value(self, name: str) -> Tensor | None:
        """A parameter or buffer of the model as the finished sketch will have it; a matrix that is not sketched yet as it is."""
        if name in self.plan.names:
            return self._value(self.plan.names[name])
        group = self.plan.weights.groups.get(name)
        return None if group is None else self.plan.weights.read(group, self._value)[name]  # stacked experts, say

    def _value(self, key: str) -> Tensor:
        if key in self.made:
            found = self.made[key]
        elif key in self.writer.manifest["tensors"]:
            file = self.writer.manifest["tensors"][key]["file"]
            if file not in self.earlier:
                self.earlier = {file: self.writer.read(file)}
            found = self.earlier[file][key]
        else:
            found = self.plan.source.read(key)
        found = found.dequantize() if isinstance(found, SketchedWeight) else found
        return found.to(self.plan.dtype) if found.is_floating_point() else found

    def _kept(self, key: str) -> Tensor:
        """A tensor that is not sketched, as it is stored."""
        value = self.plan.source.read(key)
        return self._cast(key, value, self.plan.sketch.stored(value.dtype, value.dim()))

    def _cast(self, key: str, value: Tensor, dtype: torch.dtype) -> Tensor:
        new = value.to(dtype)
        if value.is_floating_point() and bool((torch.isinf(new) & torch.isfinite(value)).any()):
            raise Unsupported(f"{key} has values beyond the range of {dtype}; store it with dtype bfloat16 or float32")
        return new

    def _learn(self, layers: list[str], moments: Hessian, shard: Shard) -> None:
        """Sketch layers that read one tensor, and let the model go on with what became of them."""
        found = None
        if moments.tokens:
            try:
                found = curvature(moments.value, damping=self.plan.sketch.damping)
            except (SingularHessian, ValueError) as error:
                raise type(error)(f"{', '.join(layers)}: {error}") from None
        for path in layers:
            key = self.plan.names[f"{path}.weight"]
            self.made[key] = self._sketched(key, found, moments)
            module = self.plan.model.get_submodule(path)
            module.weight = nn.Parameter(self.value(f"{path}.weight").to(self.device), requires_grad=False)
            self.advance(key, shard)

    def _sketched(self, key: str, found: Curvature | None, moments: Hessian | None) -> SketchedWeight:
        sketch, matrix = self.plan.sketch, self.plan.matrices[key]
        stored = self.plan.source.read(key)
        if not bool(torch.isfinite(stored).all()):
            raise CheckpointMismatch(f"{key} in {self.plan.source.where[key].file} holds NaN or infinite values; download it again")
        W = (stored.t() if matrix.transposed else stored).to(self.device, torch.float32)
        seed = hashlib.sha256(f"{sketch.seed}:{key}".encode()).digest()
        rng = torch.Generator().manual_seed(int.from_bytes(seed[:7], "big"))  # a tensor's own, whatever was made before it
        weights = None if found is None else found.importance(sketch.power)
        exact = codebook(W, sketch.bits, sketch.groups, weights=weights, restarts=sketch.restarts, rng=rng)
        table = self._cast(key, exact, sketch.stored(stored.dtype, 2))
        codes = nearest_codes(W, table.float()) if found is None else sweep(W, table.float(), found)
        made = SketchedWeight(pack(codes, sketch.bits).cpu(), table.cpu(), transposed=matrix.transposed)
        D = made.dequantize().to(W)
        D = (D.t() if matrix.transposed else D) - W
        facts: dict[str, Any] = {"table": str(table.dtype).removeprefix("torch.")}
        facts |= {"error": _share(D.square().sum(), W.square().sum()), "output_error": None, "tokens": 0}
        if found is not None:
            H = moments.value.to(W)
            facts |= {"output_error": _share((D @ H * D).sum(), (W @ H * W).sum()), "tokens": moments.tokens}
        self.facts[key] = facts
        return made


def _share(part: Tensor, whole: Tensor) -> float:
    return (part / whole).item() if whole > 0 else 0.0


def _facts_of(batches: list[dict[str, Tensor]]) -> dict[str, Any]:
    """What tells calibration data from other data."""
    digest = hashlib.sha256()
    for batch in batches:
        for key in sorted(batch):
            value = batch[key].detach().cpu().contiguous()
            digest.update(f"{key} {tuple(value.shape)} {value.dtype}\n".encode() + value.view(torch.uint8).numpy().tobytes())
    main = [next(iter(batch.values())) for batch in batches]
    return {"sequences": sum(len(value) for value in main), "sha256": digest.hexdigest()}


@contextmanager
def _progress(plan: Plan, console: Console) -> Iterator[Any]:
    """``advance(key, shard)`` after a tensor, ``advance(None, shard)`` after a shard; a line a shard where there is no bar."""
    total = sum(map(plan.source.nbytes, plan.source.where))
    columns = (TextColumn("compressing"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, TextColumn("{task.fields[note]}"), console=console, disable=not console.is_terminal)
    counted: dict[str, int] = {}

    def advance(key: str | None, shard: Shard) -> None:
        counted.update({each: plan.source.nbytes(each) for each in ([key] if key else shard.keys)})
        bar.update(task, completed=sum(counted.values()), note=key or shard.file)
        if key is None and bar.disable:
            console.print(f"{shard.file}: {100 * sum(counted.values()) / max(1, total):.0f} % of {plan.source.name}")

    with bar:
        task = bar.add_task("", total=total, note="")
        yield advance


def _warn_of_thin_data(manifest: Mapping[str, Any]) -> None:
    """Say where the data cannot tell all directions of a layer's inputs apart."""
    entries = {key: entry for key, entry in manifest["tensors"].items() if "bits" in entry}
    thin = {key: entry for key, entry in entries.items() if entry["tokens"] < entry["shape"][0 if entry["transposed"] else 1]}
    if thin:
        key, entry = min(thin.items(), key=lambda item: item[1]["tokens"])
        warnings.warn(
            f"{len(thin)} of {len(entries)} layers saw fewer tokens of calibration data than they have inputs, such as {key} with "
            f"{entry['tokens']}: the damping decides about the rest (without any token, k-means alone); give more data",
            stacklevel=3,
        )


def _table(manifest: Mapping[str, Any]) -> Table:
    """What a finished sketch has, a row a sketched tensor."""
    entries = {key: entry for key, entry in manifest["tensors"].items() if "bits" in entry}
    table = Table(("tensor", "shape", "bits a weight", "error %", "output error %", "tokens"))
    for key, entry in entries.items():
        out, fan_in = entry["shape"][::-1] if entry["transposed"] else entry["shape"]
        table_bits = 8 * getattr(torch, entry["table"]).itemsize * entry["groups"] * 2 ** entry["bits"] / fan_in
        output = entry["output_error"]
        shown = "" if output is None else 100 * output
        table.add(key, "x".join(map(str, entry["shape"])), entry["bits"] + table_bits, 100 * entry["error"], shown, entry["tokens"])
    return table
