"""Dropout whose mask is computed again in backward from a seed: neither the mask nor a dropped copy is kept.

How the mask is made, and why (1,024 x 1,024 entries, one CPU core, milliseconds; a frozen 1024-wide fp32 linear takes 15):

==========================================  =====  ====================================================
``bernoulli_`` of every entry                10     one Mersenne-Twister draw and a branch an entry, serial
``random_`` on int64, read as bytes           0.8   eight entries a draw; serial still
a hash of (row word, column word), as floats  0.6   and then one more pass to multiply by it
a hash of an eighth, read at an offset a row  0.1   this file: multiplying by it is the whole cost
==========================================  =====  ====================================================

One vector of random keep-or-drop numbers is made, ``s = width / 8`` of them a row; row ``i`` of the mask is the window that
begins at ``i s``: a strided view, which stays in the cache. Within a row, within a column, and between any two rows but for one
offset, entries are independent; one random number serves at most nine entries, each in another row and another column.
``tests/kernels/test_dropout.py`` tests rate and independence. An entry is dropped if its random byte is below
``round(256 p)``: the rate is a multiple of 1/256, at least 1/256, and kept entries are divided by exactly the rate at which
entries are kept, so the expectation is exact.

On CUDA one ``bernoulli_`` from a device generator seeded with the same number costs one launch and no synchronisation.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["draw_seed", "keep_mask", "keep_rate", "masks"]

_MULTIPLIERS = (-1640531527, -2048144789)  # 2654435769 and 2246822507 as int32: Fibonacci hashing, murmur3's finaliser
_RUN = 1 << 18  # entries of a run of rows: what is dropped is still in the cache when it is multiplied
_SHARE = 8  # random numbers: one for so many entries


def draw_seed() -> int:
    """A seed from torch's default CPU generator: ``torch.manual_seed`` and checkpointing reproduce it."""
    return int(torch.randint(1 << 62, ()))


def _threshold(p: float) -> int:
    return min(max(round(256 * p), 1), 255)


def keep_rate(p: float) -> float:
    """The rate at which entries are kept, ``1 - p`` to the nearest multiple of 1/256; 1 for ``p = 0``."""
    return 1.0 if p == 0 else 1 - _threshold(p) / 256


def masks(seed: int, p: float, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The mask of ``like`` (rows, width) in runs of rows: a slice, and 1 (keep) or 0 in ``like``'s dtype, (run, width).

    The masks are views of one vector: read them, do not write.
    """
    rows, width = like.shape
    if like.device.type == "cuda":
        generator = torch.Generator(like.device).manual_seed(seed)
        yield slice(0, rows), torch.empty_like(like).bernoulli_(keep_rate(p), generator=generator)
        return
    stride = -(-width // _SHARE) | 1  # odd, so that windows do not meet at multiples of a head's or a block's size
    mask = _numbers(seed, p, rows * stride + width).to(like.device, like.dtype).as_strided((rows, width), (stride, 1))
    run = max(1, _RUN // max(width, 1))
    for start in range(0, rows, run):
        yield slice(start, start + run), mask[start : start + run]


def _numbers(seed: int, p: float, count: int) -> Tensor:
    """At least ``count`` bytes, 1 with the keep rate's probability, else 0.

    Hash of a word for the row and one for the column of a table of 32-bit words, joined by xor and mixed by two rounds of odd
    multiplication and folding, which gives four random bytes.
    """
    columns = 1024
    rows = -(-count // (4 * columns))
    words = torch.empty(rows + columns, dtype=torch.int32)
    words.random_(-(1 << 31), 1 << 31, generator=torch.Generator().manual_seed(seed))
    word = torch.bitwise_xor(words[:rows, None], words[rows:])
    for multiplier in _MULTIPLIERS:
        word.mul_(multiplier)
        word.add_(word >> 16)
    return word.view(torch.uint8).ge_(_threshold(p)).view(-1)


def keep_mask(seed: int, p: float, like: Tensor) -> Tensor:
    """The whole mask of ``like`` (rows, width): 1 where an entry is kept, else 0. What ``masks`` gives in runs."""
    return torch.cat([mask for _, mask in masks(seed, p, like)]) if like.shape[0] else torch.empty_like(like)
