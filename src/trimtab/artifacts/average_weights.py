"""How much each checkpoint of a run counts in their average: pure numbers, the same while training and afterwards.

Metrics-weighted averaging (arXiv 2504.18580) gives a lower training loss, or a later step, more weight; one number, here
``strength``, says how unequal the weights are. The paper's closed form could not be seen; ``"power"`` is our reading of it:
``w_i = u_i^p / sum_j u_j^p`` with ``u = 1 / loss`` or ``u = step``, free of units, uniform at p = 0, the best alone at p -> inf.
Everything is computed from logarithms of weights, up to a constant, so that an average can grow one checkpoint at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["BY", "SCHEMES", "STREAMED", "checkpoint_weights", "effective_count", "last_of", "log_weights", "normalised"]

#: what counts: a loss, lower is better; a step, later is better; a score, higher is better
BY = ("loss", "step", "score")
SCHEMES = ("uniform", "power", "softmax", "linear", "exponential", "geometric")
#: schemes whose weights, up to a constant, do not depend on later checkpoints
STREAMED = SCHEMES[:-1]


def log_weights(values: Sequence[float], *, scheme: str = "power", by: str = "loss", strength: float = 0.7) -> list[float]:
    """Logarithms of the weights, up to a common constant, for the checkpoints' metrics in the order of the run.

    ==============  ========================================================================================
    ``uniform``     0
    ``power``       ``strength log u``, u = 1 / loss, the step or the score
    ``softmax``     ``m / strength``, m = -loss, the step or the score; strength is the temperature
    ``linear``      ``log(step - first step + 1)``; by steps only
    ``exponential`` the moving average with decay ``strength``, which starts at the first checkpoint
    ``geometric``   ``rank log strength``, rank 0 for the best; strength in (0, 1]
    ==============  ========================================================================================

    Raises:
        ValueError: an unknown scheme or metric, no values, a value that is not finite or, for powers, not above 0, or a
            strength out of its range.
    """
    _check(values, scheme, by, strength)
    goods = [-value if by == "loss" else float(value) for value in values]
    if scheme == "uniform":
        return [0.0] * len(values)
    if scheme == "power":
        return [strength * math.log(value) * (-1 if by == "loss" else 1) for value in values]
    if scheme == "softmax":
        return [good / strength for good in goods]
    if scheme == "linear":
        return [math.log(value - values[0] + 1) for value in values]
    if scheme == "exponential":
        return [math.log1p(-strength) * (i > 0) - i * math.log(strength) for i in range(len(values))]
    order = sorted(range(len(values)), key=lambda i: -goods[i])
    return [order.index(i) * math.log(strength) for i in range(len(values))]


def _check(values: Sequence[float], scheme: str, by: str, strength: float) -> None:
    for name, value, known in (("scheme", scheme, SCHEMES), ("by", by, BY)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, found {value!r}")
    low, high = {"exponential": (0.0, 1.0), "geometric": (0.0, 1.0), "softmax": (0.0, math.inf)}.get(scheme, (-1e-300, math.inf))
    if not low < strength <= high or (scheme == "exponential" and strength == 1):
        raise ValueError(f"strength {strength!r} is out of range for the scheme {scheme!r}: above {max(low, 0):g}, to {high:g}")
    if scheme == "linear" and by != "step":
        raise ValueError(f'the scheme "linear" counts steps: take by="step", found {by!r}')
    if not len(values):
        raise ValueError("there is no checkpoint to average")
    bad = [value for value in values if not math.isfinite(value) or (scheme == "power" and value <= 0)]
    if bad:
        raise ValueError(
            f"a checkpoint's {by} is {bad[0]!r}; it must be finite{', and above 0 for powers (take softmax)' * (scheme == 'power')}"
        )


def normalised(logs: Sequence[float]) -> list[float]:
    """Weights of sum 1 for their logarithms up to a constant."""
    top = max(logs)
    raw = [math.exp(value - top) for value in logs]
    total = math.fsum(raw)
    return [value / total for value in raw]


def checkpoint_weights(values: Sequence[float], *, scheme: str = "power", by: str = "loss", strength: float = 0.7) -> list[float]:
    """Weights of sum 1 for the checkpoints' metrics, in the order of the run; see ``log_weights``."""
    return normalised(log_weights(values, scheme=scheme, by=by, strength=strength))


def effective_count(weights: Sequence[float]) -> float:
    """``1 / sum w_i^2``: how many checkpoints of equal weight would be as many."""
    return 1 / math.fsum(w * w for w in weights)


def last_of(count: int, last: int | None, stride: int = 1) -> list[int]:
    """Which of ``count`` checkpoints count: the newest, every ``stride``-th before it, ``last`` of them at most; ascending.

    Raises:
        ValueError: ``last`` or ``stride`` is below 1.
    """
    if stride < 1 or (last is not None and last < 1):
        raise ValueError(f"last and stride must be at least 1, found {last!r} and {stride!r}")
    return list(range(count - 1, -1, -stride))[:last][::-1]
