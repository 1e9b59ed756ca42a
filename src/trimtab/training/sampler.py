"""The order of training rows: a pure function of seed and epoch, so that a resumed run continues it exactly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

__all__ = ["EpochSampler"]

WINDOW = 50  # batches that are sorted by length together: wide enough for little padding, narrow enough to stay random


class EpochSampler(Sampler[int]):
    """Random order of ``len(lengths)`` rows, new each epoch; batches of similar length if ``bucket``.

    Args:
        lengths: tokens of each row.
        batch_size: rows of one optimizer step, accumulation included.
        seed: of the order; epoch ``e`` draws from ``(seed, e)`` alone, never from the global generator.
        bucket: sort each window of 50 random batches by length, then shuffle the batches.
        fill: index of a row without labels that makes the last batch whole, for runs of several processes; None leaves it short.
    """

    def __init__(self, lengths: Sequence[int], *, batch_size: int, seed: int, bucket: bool, fill: int | None = None):
        self.lengths, self.batch_size, self.seed, self.bucket, self.fill = lengths, batch_size, seed, bucket, fill
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order; the trainer calls this before it starts or continues an epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths) + self._missing()

    def _missing(self) -> int:
        return 0 if self.fill is None else -len(self.lengths) % self.batch_size

    def __iter__(self) -> Iterator[int]:
        return iter([*self._order(), *([self.fill] * self._missing())])

    def _order(self) -> list[int]:
        rng = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=rng).tolist()
        if not self.bucket:
            return order
        size, batches = self.batch_size, []
        for start in range(0, len(order), size * WINDOW):
            window = sorted(order[start : start + size * WINDOW], key=self.lengths.__getitem__)
            batches += [window[i : i + size] for i in range(0, len(window), size)]
        # the short batch, if any, stays last: elsewhere it would shift all batches behind it
        last = [batches.pop()] if len(batches[-1]) < size else []
        shuffled = [batches[i] for i in torch.randperm(len(batches), generator=rng).tolist()]
        return [index for batch in shuffled + last for index in batch]
