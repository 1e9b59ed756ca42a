"""Dropout whose mask is computed again in backward from a seed: neither the mask nor a dropped copy is kept.

How the mask is made, and why (1,024 x 1,024 entries, one CPU core, milliseconds; a frozen 1024-wide fp32 linear takes 15):

=====================================  =====  =========================================================
``bernoulli_``                         10     one Mersenne-Twister draw and a branch an entry, serial
``random_`` on int64, read as bytes     0.8   eight entries a draw; serial still
a hash of (row word, column word)       0.3   this file: six vectorised int32 operations, all cores
=====================================  =====  =========================================================

A row and a group of four columns each get a random 32-bit word; the two are joined by xor and mixed by two rounds of
odd multiplication and folding, which gives four random bytes for four entries. An entry is dropped if its byte is below
``round(256 p)``: the rate is a multiple of 1/256, at least 1/256, and kept entries are divided by exactly the rate at
which entries are kept, so the expectation is exact. ``tests/kernels/test_dropout.py`` tests rate and independence. The
hash reaches any row directly, so that rows are handled in runs of about a million entries, which bounds the temporaries.

On CUDA one ``bernoulli_`` from a device generator seeded with the same number costs one launch and no synchronisation.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["draw_seed", "keep_mask", "keep_rate", "masks"]

_MULTIPLIERS = (-1640531527, -2048144789)  # 2654435769 and 2246822507 as int32: Fibonacci hashing, murmur3's finaliser
_RUN = 1 << 20  # entries a run: bounds the temporaries; smaller runs are no faster, and each operation of a run is a barrier


def draw_seed() -> int:
    """A seed from torch's default CPU generator: ``torch.manual_seed`` and checkpointing reproduce it."""
    return int(torch.randint(1 << 62, ()))


def _threshold(p: float) -> int:
    return min(max(round(256 * p), 1), 255)


def keep_rate(p: float) -> float:
    """The rate at which entries are kept, ``1 - p`` to the nearest multiple of 1/256; 1 for ``p = 0``."""
    return 1.0 if p == 0 else 1 - _threshold(p) / 256


def masks(seed: int, p: float, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The mask of ``like`` (rows, width) in runs of rows: a slice, and 1 (keep) or 0 in ``like``'s dtype, (run, width)."""
    rows, width = like.shape
    if like.device.type == "cuda":
        generator = torch.Generator(like.device).manual_seed(seed)
        yield slice(0, rows), torch.empty_like(like).bernoulli_(keep_rate(p), generator=generator)
        return
    generator = torch.Generator().manual_seed(seed)
    words = torch.empty(rows + -(-width // 4), dtype=torch.int32).random_(-(1 << 31), 1 << 31, generator=generator)
    words = words.to(like.device)
    down, across = words[:rows, None], words[rows:]
    run = max(1, _RUN // max(width, 1))
    for start in range(0, rows, run):
        word = torch.bitwise_xor(down[start : start + run], across)
        for multiplier in _MULTIPLIERS:
            word.mul_(multiplier)
            word.add_(word >> 16)
        kept = word.view(torch.uint8).ge_(_threshold(p))
        yield slice(start, start + run), kept[:, :width].to(like.dtype)


def keep_mask(seed: int, p: float, like: Tensor) -> Tensor:
    """The whole mask of ``like`` (rows, width): 1 where an entry is kept, else 0. What ``masks`` gives in runs."""
    return torch.cat([mask for _, mask in masks(seed, p, like)]) if like.shape[0] else torch.empty_like(like)
