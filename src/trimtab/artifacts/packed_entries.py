"""The entries of a compressed update's header, as they stand in its JSON: checked before any is used."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["is_entry"]

STORES = ("ternary", "start", "raw", "float16", "bfloat16", "int8")
STARTS = ("zero", "made", "base", "held", "other")
_LARGEST = torch.finfo(torch.float32).max


def is_entry(row: Any) -> bool:
    """Whether a list of the header can be an ``Entry``."""
    if not isinstance(row, list) or not 4 <= len(row) <= 7:
        return False
    key, dtype, shape, store, start, scale, fitted = row + ["zero", 0.0, False][len(row) - 4 :]
    names = isinstance(key, str) and isinstance(getattr(torch, str(dtype), None), torch.dtype)
    sizes = isinstance(shape, list) and len(shape) <= 64 and all(type(n) is int and 0 <= n < 1 << 48 for n in shape)
    number = isinstance(scale, int | float) and not isinstance(scale, bool) and abs(scale) <= _LARGEST
    return names and sizes and number and store in STORES and start in STARTS and isinstance(fitted, bool)
