"""compress: an adapter, or the difference of two checkpoints, as signs of its largest entries and one number.

ComPEFT (arXiv 2311.13171, Sec. 2): with ``tau = value - start`` of ``d`` entries, ``s`` the signs of the ``floor(k d)`` largest
``|tau|`` and 0 elsewhere, and ``sigma`` the standard deviation of all of tau::

    value' = start + alpha sigma s            or, without alpha:  start + mean(|tau| where s != 0) s

The second scale is the one of least squared error for the given s. Ties go to the lowest place in sorted order, so exactly
``floor(k d)`` entries are kept (a kept zero stays 0); the authors' code keeps one more and all ties.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.artifacts import coding
from trimtab.artifacts.fitting import spread
from trimtab.artifacts.packed import Entry, Packed, frames_of, write
from trimtab.artifacts.plain import PLAIN, pack_plain
from trimtab.artifacts.sources import Source, from_adapter, from_weights
from trimtab.artifacts.trials import Choice, choose
from trimtab.core.checkpoint import MANIFEST
from trimtab.core.errors import CheckpointMismatch, ShapeMismatch, Unsupported, nearest
from trimtab.core.folders import apart
from trimtab.kernels.ranking import Top, largest

__all__ = ["Compression", "compress", "fraction"]

SCOPES = ("global", "tensor", "factor")
Density = float | str


@dataclass
class Compression:
    """What compressing gave.

    Attributes:
        path: the file.
        density, alpha: what was used; alpha is None for the scale of least error.
        entries: numbers that became ternary, and ``kept`` of them are not 0.
        parameters: all numbers of the source, those stored as they are included.
        bytes, plain_bytes: of the file, and of what is stored as it is within it.
        bits: of an entry, headers left out, fitted factors included.
        bound, entropy: the paper's ``H(k)``, and the entropy of every tensor's own counts, in the same unit.
        error: ``|tau - tau'|^2 / |tau|^2``.
        trials: a row for each setting that was tried on data.
    """

    path: Path
    density: float
    alpha: float | None
    entries: int
    kept: int
    parameters: int
    bytes: int
    plain_bytes: int
    bits: float
    bound: float
    entropy: float
    error: float
    trials: list[dict[str, Any]] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """How many times smaller than the source at 16 bits a number; the whole file counts."""
        return 2 * self.parameters / self.bytes

    def __str__(self) -> str:
        scale = "least error" if self.alpha is None else f"alpha {self.alpha:g}"
        return (
            f"{self.path}: {self.bytes:,} bytes for {self.parameters:,} numbers, {self.ratio:.1f} times smaller than 16 bits\n"
            f"density {self.density:g} ({self.kept:,} of {self.entries:,} kept), {scale}; {self.bits:.4f} bits an entry "
            f"(paper's bound {self.bound:.4f}, entropy tensor by tensor {self.entropy:.4f}); relative squared error "
            f"{self.error:.3f}; {self.plain_bytes:,} bytes as they are"
        )


def fraction(density: Density) -> float:
    """0.2 or ``"20%"`` as a fraction.

    Raises:
        ShapeMismatch: it is not above 0 and at most 1; a number above 1 is not taken for percent.
    """
    try:
        value = float(density[:-1]) / 100 if isinstance(density, str) and density.strip().endswith("%") else float(density)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise ShapeMismatch(f"a density is above 0 and at most 1, or a percentage such as '5%'; found {density!r}")
    return value


def compress(
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    density: Density | Sequence[Density] = 0.2,
    alpha: float | None | Sequence[float | None] = None,
    scope: str = "global",
    coding: str = "entropy",
    reference: str | os.PathLike = "auto",
    keep: Sequence[str] = (),
    rest: str = "raw",
    model: nn.Module | None = None,
    score: Callable[[nn.Module], float] | None = None,
    losses: Callable[[nn.Module], Iterable[Tensor]] | None = None,
    tolerance: float | None = 0.005,
) -> Compression:
    """Compress a saved adapter, or a full checkpoint against another, 8 to 50 times below 16 bits.

    Only what learnt is stored: the starts are built again (from the seed that the adapter's manifest remembers, from the
    base's weights, or without either), see ``trimtab.artifacts.starts``. Heads that learnt whole, buffers and integers are
    stored as they are. ``tt.load`` reads the file like a folder; ``tt.expand`` turns it into one.

    Not for adapters of a few thousand numbers (IA3, BitFit): they are small already, and each of their numbers counts.

    Args:
        source: folder of an adapter; or a checkpoint (safetensors file or folder).
        out: the file to write, in one step. A job that was killed continues when it is called again.
        density: k, as a fraction or ``"20%"``; several are tried on data.
        alpha: scale in units of sigma; None: the scale of least squared error. Several are tried on data.
        scope: what is ranked together, with one sigma and one scale: ``global``, as in the paper; each ``tensor``; or each
            ``factor``, the tensors of one name (all A of a LoRA, all B).
        coding: ``entropy`` (the smallest), ``rice``, ``trits`` or ``masks``; see ``trimtab.artifacts.coding``.
        reference: ``auto``; ``zero``, which counts random starts as 0 as the paper does; or the folder of another adapter, or
            the base checkpoint, to count from. Expanding then needs the same.
        keep: patterns of tensors to store as they are.
        rest: how floats that are kept are stored: ``raw``, ``float16``, ``bfloat16`` or ``int8`` (a scale a row).
        model: the base, for starts that need it, and for trials.
        score: what a trial's model reaches on validation data, higher is better. The smallest density whose best alpha loses
            at most ``tolerance`` against the uncompressed adapter is taken; if there is none, the best score.
        losses: ``model -> losses`` on training data, one a batch (60 are a good number): each row or column of a tensor, so
            each component of a rank, gets a factor of its own that is fitted to them. Small models keep far more of their
            accuracy so; see ``trimtab.artifacts.fitting``.
        tolerance: in the units of ``score``; None: take the best score.

    Raises:
        ShapeMismatch: a density or alpha out of range. Unsupported: an unknown choice, a package or the base is missing.
        CheckpointMismatch: a damaged source, values that are not finite, or an update that is 0 everywhere.
    """
    densities = [fraction(d) for d in (density if isinstance(density, Sequence) and not isinstance(density, str) else [density])]
    alphas = list(alpha) if isinstance(alpha, Sequence) else [alpha]
    _check(densities, alphas, scope, coding, rest)
    path = Path(source)
    out = apart(out, [source, *([reference] if reference not in ("auto", "zero") else [])])
    where = reference if reference in ("auto", "zero") else Path(reference)
    if (path / MANIFEST).is_file() or not isinstance(where, Path):
        opened = from_adapter(path, model=model, reference=where, keep=keep, rest=rest)
    else:
        opened = from_weights(path, reference=where, keep=keep, rest=rest)
    ranked = Ranked(opened, scope, densities)
    choice = Choice(densities[0], alphas[0])
    several = len(densities) * len(alphas) > 1
    if several or losses is not None:
        if model is None or opened.header["kind"] != "adapter" or (several and score is None):
            raise Unsupported(
                "several densities or alphas are tried on data, and losses are fitted to: pass an adapter, its base as model=, and "
                "for trials score="
            )
        judge = score if several else None
        choice = choose(path, ranked, densities, alphas, model=model, score=judge, losses=losses, tolerance=tolerance)
    return _write(opened, ranked, out, coding, choice)


def _check(densities: list[float], alphas: list[float | None], scope: str, method: str, rest: str) -> None:
    if not densities or not alphas:
        raise ShapeMismatch("give at least one density and one alpha")
    for alpha in alphas:
        if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
            raise ShapeMismatch(f"alpha must be above 0, or None for the scale of least error; found {alpha!r}")
    for name, value, known in (("scope", scope, SCOPES), ("coding", method, coding.CODINGS), ("rest", rest, PLAIN)):
        if value not in known:
            raise Unsupported(f"{name} must be one of {', '.join(known)}, found {value!r}{nearest(str(value), known)}")


class Ranked:
    """The thresholds and scales of a source, for several densities at once; holds no update."""

    def __init__(self, source: Source, scope: str, densities: Sequence[float]):
        self.source, self.scope = source, scope
        groups: dict[str, list[Entry]] = {}
        for entry in source.ternary:
            groups.setdefault(self.group(entry), []).append(entry)
        if not groups:
            raise CheckpointMismatch("there is nothing to make ternary: every tensor equals its start or is kept as it is")
        self.position = {entry.key: i for members in groups.values() for i, entry in enumerate(members)}
        self.tops: dict[tuple[str, float], Top] = {}
        self.sigma: dict[str, float] = {}
        self.norm2 = 0.0
        for name, members in groups.items():
            self._rank(name, members, densities)
        if not self.norm2:
            raise CheckpointMismatch("the update is 0 everywhere: nothing was trained")
        size = sum(entry.numel for entry in source.ternary)
        for k in densities:
            if not any(sum(self.tops[name, k].counts) for name in groups):
                raise ShapeMismatch(f"a density of {k:g} keeps none of the {size} entries; use at least {1 / size:.2g}")

    def group(self, entry: Entry) -> str:
        """Name of the group that an entry is ranked in."""
        return {"global": "", "tensor": entry.key, "factor": entry.key.rpartition(".")[2]}[self.scope]

    def _rank(self, name: str, members: list[Entry], densities: Sequence[float]) -> None:
        size = sum(entry.numel for entry in members)
        magnitudes = lambda: (self.source.update(entry).abs() for entry in members)  # noqa: E731
        counts = [int(Fraction(repr(k)) * size) for k in densities]  # floor(k d), without the float's error
        for k, top in zip(densities, largest(magnitudes, counts), strict=True):
            self.tops[name, k] = top
        total = square = 0.0
        for entry in members:
            update = self.source.update(entry).double()
            total, square = total + float(update.sum()), square + float(update.square().sum())
        variance = (square - total * total / size) / max(1, size - 1) if size else 0.0
        self.sigma[name] = math.sqrt(max(0.0, variance))
        self.norm2 += square

    def signs(self, entry: Entry, update: Tensor, k: float) -> Tensor:
        """``s``, (n,) int8."""
        top = self.tops[self.group(entry), k]
        return (update.sign() * top.mask(update.abs(), self.position[entry.key])).to(torch.int8)

    def scales(self, k: float, alpha: float | None) -> dict[str, float]:
        """A scale a group."""
        if alpha is not None:
            return {name: _round(alpha * sigma) for name, sigma in self.sigma.items()}
        total, count = dict.fromkeys(self.sigma, 0.0), dict.fromkeys(self.sigma, 0)
        for entry, update in self.source.updates():
            name = self.group(entry)
            kept = self.signs(entry, update, k) != 0
            total[name] += float(update[kept].abs().double().sum())
            count[name] += int(kept.sum())
        return {name: _round(total[name] / count[name]) if count[name] else 0.0 for name in total}


def _round(value: float) -> float:
    """To float32, which both sides multiply with."""
    return float(np.float32(value))


def _write(
    source: Source, ranked: Ranked, out: Path, method: str, choice: Choice
) -> Compression:
    k, alpha = choice.density, choice.alpha
    scales = ranked.scales(k, alpha)
    scaled = lambda entry: replace(entry, scale=scales[ranked.group(entry)], fitted=entry.key in choice.factors)  # noqa: E731
    entries = [scaled(entry) if entry.store == "ternary" else entry for entry in source.entries]
    kept: dict[str, tuple[int, int]] = {}
    error = 0.0
    for entry, update in source.updates():
        signs = ranked.signs(entry, update, k)
        kept[entry.key] = int((signs > 0).sum()), int((signs < 0).sum())
        error += float((update - spread(scaled(entry), choice.factors.get(entry.key), signs)).double().square().sum())
    sigma = ranked.sigma if ranked.scope != "tensor" else {}
    header = source.header | {
        "coding": method,
        "settings": {"density": k, "alpha": alpha, "scope": ranked.scope, "sigma": sigma},
        "update": [ranked.norm2, error],  # an unfinished file is continued only by the very same job
        "tensors": [[e.key, e.dtype, list(e.shape), *_tail(e)] for e in entries],
    }
    frames = frames_of(entries)
    makers = [lambda frame=frame: _frame(source, ranked, entries, frame, choice, method) for frame in frames]
    size = write(out, header, makers)
    count = sum(entry.numel for entry in source.ternary)
    nonzero = sum(map(sum, kept.values()))
    plain = sum(len(payload) for frame, payload, _ in Packed(out).payloads() if frame.tag == b"raw ")
    ternary = sum(len(payload) for frame, payload, _ in Packed(out).payloads() if frame.tag != b"raw ")
    return Compression(
        path=out, density=k, alpha=alpha, entries=count, kept=nonzero, parameters=sum(e.numel for e in entries), bytes=size,
        plain_bytes=plain, bits=8 * ternary / count, bound=coding.bound(nonzero / count), entropy=_entropy(source, kept) / count,
        error=error / ranked.norm2, trials=choice.trials,
    )  # fmt: skip


def _tail(entry: Entry) -> list[Any]:
    """What of an entry differs from the defaults."""
    if entry.store != "ternary":
        return [entry.store, entry.start]
    return [entry.store, entry.start, entry.scale, *[True] * entry.fitted]


def _frame(source: Source, ranked: Ranked, entries: list[Entry], frame: Any, choice: Choice, method: str) -> tuple[bytes, bytes]:
    """One frame's tag and payload."""
    if frame.tag == b"fits":
        factors = (choice.factors[entries[i].key].reshape(-1).half() for i, _, _ in frame.pieces)
        return frame.tag, torch.cat(list(factors)).numpy().tobytes()
    if frame.tag == b"raw ":
        entry = entries[frame.pieces[0][0]]
        return frame.tag, pack_plain(source.value(entry.key), entry.store)
    parts = []
    for number, start, stop in frame.pieces:
        entry = entries[number]
        columns = entry.rows[1]
        parts.append(ranked.signs(entry, source.update(entry), choice.density).numpy()[start * columns : stop * columns])
    return frame.tag, coding.encode(np.concatenate(parts), frame.shapes(entries), method)


def _entropy(source: Source, kept: Mapping[str, tuple[int, int]]) -> float:
    """Bits of all symbols at the entropy of each tensor's own counts."""
    total = 0.0
    for entry in source.ternary:
        plus, minus = kept[entry.key]
        for part in (plus, minus, entry.numel - plus - minus):
            total -= part * math.log2(part / entry.numel) if part else 0.0
    return total
