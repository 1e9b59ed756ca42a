"""Divisors of a layer's width: what block sizes and Kronecker factors may be."""

from __future__ import annotations

import math
from collections.abc import Callable

__all__ = ["divisors", "factorization", "nearest_divisor", "nearest_divisors"]


def divisors(n: int) -> list[int]:
    """All divisors of ``n``, ascending."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d != n]


def nearest_divisor(n: int, k: int, *, least: int = 1, where: Callable[[int], bool] = lambda d: True) -> int | None:
    """The divisor of ``n``, at least ``least``, whose ratio to ``k`` is nearest to 1 (the smaller of two); None if there is none.

    Args:
        where: what else it must be.
    """
    good = [d for d in divisors(n) if d >= least and where(d)]
    return min(good, key=lambda d: (max(d, k) / min(d, k), d), default=None)


def nearest_divisors(n: int, k: int) -> str:
    """The divisors of ``n`` on both sides of ``k``, as a message names them: ``"2 and 5"``."""
    below = next(d for d in range(max(1, min(k, n)), 0, -1) if n % d == 0)
    above = next(d for d in range(min(k, n), n + 1) if n % d == 0)
    return str(below) if below == above else f"{below} and {above}"


def factorization(n: int, factor: int = -1) -> tuple[int, int]:
    """``(m, n / m)``, the split of a width that LyCORIS and peft take.

    A positive ``factor`` that divides ``n`` gives ``(factor, n / factor)``. Otherwise the smaller part first: the divisor
    pair nearest to the square root, with the smaller part at most ``factor`` unless that is -1.
    """
    if factor > 0 and n % factor == 0:
        return factor, n // factor
    limit = n if factor == -1 else factor
    m = max(d for d in range(1, int(n**0.5) + 1) if n % d == 0 and (d <= limit or d == 1))
    return m, n // m
