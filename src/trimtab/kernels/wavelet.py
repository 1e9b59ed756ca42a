"""One level of a periodised wavelet transform, laid into thin factors: what costs nothing beside a pass over activations.

For an axis of even length n the analysis is two matrices ``L, H`` (n/2, n), the synthesis ``R_L, R_H`` (n, n/2), with
``R_L L + R_H H = I``. Boundary: periodic, the only one that halves exactly. ``fold`` takes ``T`` (r, n/2) to ``[T L; T H]``
(analysis) or ``[T R_L^T; T R_H^T]`` (synthesis), or to one of the two. Taps and alignment are those of PyWavelets'
``"periodization"``, sym4's solved anew from its equations, since the table there is exact to 12 digits only; a filter of F taps
puts tap i of coefficient k at position ``2 k + i + 1 - F / 2``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trimtab.kernels.mode import fused

__all__ = ["WAVELETS", "Wavelet", "fold", "grid_transform"]

Filters = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Wavelet:
    """A pair of low-pass filters of one even length; the high-pass ones follow from them by alternating signs.

    Attributes:
        low: synthesis filter.
        dual: row of the analysis matrix from its first entry on; the same filter for an orthonormal wavelet.
    """

    low: tuple[float, ...]
    dual: tuple[float, ...]

    @property
    def taps(self) -> int:
        """Length of the filters."""
        return len(self.low)

    @property
    def orthonormal(self) -> bool:
        """Whether the synthesis is the analysis transposed."""
        return self.low == self.dual

    @property
    def analysis(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Rows of ``L`` and of ``H``."""
        return self.dual, _alternated(self.low)

    @property
    def synthesis(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Columns of ``R_L`` and of ``R_H``."""
        return self.low, _alternated(self.dual)


def _alternated(taps: tuple[float, ...]) -> tuple[float, ...]:
    """The high-pass filter that a low-pass one gives: reversed, every second sign changed."""
    return tuple(tap if i % 2 == 0 else -tap for i, tap in enumerate(reversed(taps)))


def _orthonormal(*taps: float) -> Wavelet:
    return Wavelet(taps, taps)


_ROOT = 0.5**0.5
WAVELETS = {
    "haar": _orthonormal(_ROOT, _ROOT),
    "db2": _orthonormal(0.48296291314453416, 0.8365163037378079, 0.2241438680420134, -0.12940952255126037),
    "db3": _orthonormal(
        0.33267055295008263, 0.8068915093110925, 0.45987750211849154, -0.13501102001025458, -0.08544127388202666,
        0.03522629188570953,
    ),
    "db4": _orthonormal(
        0.2303778133088965, 0.7148465705529157, 0.6308807679298589, -0.027983769416859854, -0.18703481171909309,
        0.030841381835560764, 0.0328830116668852, -0.010597401785069032,
    ),
    "sym4": _orthonormal(
        0.032223100604051466, -0.012603967262031304, -0.09921954357663353, 0.29785779560530606, 0.8037387518051321,
        0.497618667632775, -0.029635527646002493, -0.07576571478950221,
    ),
    "bior2.2": Wavelet((0, _ROOT / 2, _ROOT, _ROOT / 2, 0, 0), (-_ROOT / 4, _ROOT / 2, 3 * _ROOT / 2, _ROOT / 2, -_ROOT / 4, 0)),
}  # fmt: skip


def fold(t: Tensor, filters: Filters) -> Tensor:
    """``(r, n/2) -> (len(filters) r, n)``, filter after filter: ``out[2 k + i + 1 - F/2] += taps[i] t[k]``, modulo n."""
    if fused(t):
        return _Fold.apply(t, filters)
    return torch.cat([_plain(t, taps) for taps in filters])


def _plain(t: Tensor, taps: tuple[float, ...]) -> Tensor:
    """One filter by rolls: what compiles and maps over rows."""
    halves: list[Tensor | None] = [None, None]
    for i, tap in enumerate(taps):
        if tap == 0:
            continue
        shift, parity = divmod(1 - len(taps) // 2 + i, 2)
        part, total = t.roll(shift, -1) if shift else t, halves[parity]
        halves[parity] = part * tap if total is None else torch.add(total, part, alpha=tap)
    return torch.stack(halves, -1).flatten(-2)  # type: ignore[arg-type]


@lru_cache(maxsize=64)
def _table(filters: Filters, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(filters, s, 2): from the s neighbours of a coefficient, it in the middle, to an even and an odd sample."""
    start, reach = 1 - len(filters[0]) // 2, len(filters[0]) // 4
    table = torch.zeros(len(filters), 2 * reach + 1, 2, dtype=torch.float64)
    for band, taps in enumerate(filters):
        for i, tap in enumerate(taps):
            shift, parity = divmod(start + i, 2)
            table[band, reach - shift, parity] = tap
    return table.to(device, dtype)


class _Fold(torch.autograd.Function):
    """A thin product a filter; a third of the time that the rolls and their graph take. Keeps nothing."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, filters: Filters) -> Tensor:
        ctx.filters, (r, half) = filters, t.shape
        table = _table(filters, t.dtype, t.device)
        reach = table.shape[1] // 2
        near = torch.cat([t[:, half - reach :], t, t[:, :reach]], 1).unfold(1, 2 * reach + 1, 1) if reach else t
        near = near.reshape(r * half, -1)
        samples = t.new_empty(len(filters), r * half, 2)
        for out, part in zip(samples, table, strict=True):
            torch.mm(near, part, out=out)
        return samples.view(-1, 2 * half)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor, None]:
        table = _table(ctx.filters, G.dtype, G.device)
        reach, half = table.shape[1] // 2, G.shape[1] // 2
        first, *others = zip(table, G.reshape(len(table), -1, 2), strict=True)
        near = first[0] @ first[1].t()
        for part, samples in others:
            near.addmm_(part, samples.t())
        near = near.view(2 * reach + 1, -1, half)
        total = near[reach]
        for i in range(reach):
            total = total + near[i].roll(i - reach, -1) + near[-1 - i].roll(reach - i, -1)
        return total, None


def grid_transform(wavelet: Wavelet, n: int) -> tuple[Tensor, Tensor]:
    """Analysis ``[L; H]`` and synthesis ``[R_L, R_H]`` of a short axis, dense (n, n): for grids, not for channels. Float64, CPU."""
    eye = torch.eye(n // 2, dtype=torch.float64)
    return fold(eye, wavelet.analysis), fold(eye, wavelet.synthesis).t()
