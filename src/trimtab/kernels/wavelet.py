"""One level of a periodised wavelet transform, laid into thin factors: what costs nothing beside a pass over activations.

For an axis of even length n the analysis is two matrices ``L, H`` (n/2, n), the synthesis ``R_L, R_H`` (n, n/2), with
``R_L L + R_H H = I``. Boundary: periodic, the only one that halves exactly. ``fold`` takes ``T`` (..., r, n/2) to ``T L`` or
``T H`` (analysis), ``T R_L^T`` or ``T R_H^T`` (synthesis) by rolls and strided sums. Taps and alignment are those of PyWavelets'
``"periodization"``, sym4's solved anew from its equations, since the table there is exact to 12 digits only; a filter of F taps
puts tap i of coefficient k at position ``2 k + i + 1 - F / 2``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["WAVELETS", "Wavelet", "fold", "low_projector"]


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


def fold(t: Tensor, taps: tuple[float, ...]) -> Tensor:
    """``(..., n/2) -> (..., n)``: ``out[2 k + i + 1 - F/2] += taps[i] t[k]``, indices of ``out`` modulo n."""
    start = 1 - len(taps) // 2
    halves: list[Tensor | None] = [None, None]
    for i, tap in enumerate(taps):
        if tap == 0:
            continue
        shift, parity = divmod(start + i, 2)
        part, total = t.roll(shift, -1) if shift else t, halves[parity]
        halves[parity] = part * tap if total is None else torch.add(total, part, alpha=tap)
    return torch.stack(halves, -1).flatten(-2)  # type: ignore[arg-type]


def low_projector(wavelet: Wavelet, n: int) -> Tensor:
    """``R_L L`` (n, n): keeps the low band of a short axis. Float64, on the CPU."""
    eye = torch.eye(n // 2, dtype=torch.float64)
    return fold(eye, wavelet.synthesis[0]).t() @ fold(eye, wavelet.analysis[0])
