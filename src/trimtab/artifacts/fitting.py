"""Fitting the scales of a ternary update to data: one factor for each row or column of a tensor, nothing else learns.

``value = start + c m s``, ``m`` one number along the shorter axis of the tensor as a matrix: the rows of a LoRA's A, the columns of
its B, so its rank's components. With ``m = exp(t)`` Adam takes a step a batch on ``t``, whose gradient is the sum of
``s c m dL/dvalue`` along the other axis. The signs stay. ComPEFT has one scale and takes no gradient; fitting scales to a few
batches is BitDelta's idea (arXiv 2402.10193: one scale a matrix, by distillation). m is rounded to 16 bits before it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from trimtab.artifacts.packed import Entry
from trimtab.core.errors import CheckpointMismatch, Unsupported

__all__ = ["Losses", "components", "fit", "spread"]

DECAY = 30  # steps after which the rate is half
Losses = Callable[[nn.Module], Iterable[Tensor]]


def components(entry: Entry) -> tuple[int, int]:
    """Shape of the factors of an entry: (rows, 1) or (1, columns), whichever is fewer."""
    rows, columns = entry.rows
    return (rows, 1) if rows < columns else (1, columns)


def spread(entry: Entry, factors: Tensor | None, signs: Tensor, *, by_rows: bool | None = None) -> Tensor:
    """``c m s``, (n,) in float32; ``by_rows``: along which axis the factors stand, where the entry's own shape does not tell."""
    scaled = entry.scale * signs.float().reshape(entry.rows)
    if factors is None:
        return scaled.reshape(-1)
    shape = components(entry) if by_rows is None else (-1, 1) if by_rows else (1, -1)
    return (scaled * factors.float().reshape(shape)).reshape(-1)


def fit(
    entries: Iterable[Entry], signs: Mapping[str, Tensor], starts: Callable[[str], Tensor | None], live: Mapping[str, Tensor],
    model: nn.Module, losses: Losses, *, rate: float = 0.03,
) -> dict[str, Tensor]:  # fmt: skip
    """The factors of every entry, in float16; ``live``'s values are those with them afterwards.

    Args:
        rate: of Adam at the first step; at step i it is ``rate / (1 + i / 30)``.
        entries: with their scale ``c``.
        signs: ``s`` by key, (n,).
        live: the tensors on the model, by key.
        losses: ``model -> losses``, one a batch; their number is that of Adam's steps.

    Raises:
        Unsupported: there is no loss. CheckpointMismatch: a loss is not finite.
    """
    kept = [entry for entry in entries if entry.numel]
    logs = {entry.key: torch.zeros(components(entry)) for entry in kept}
    optimizer = torch.optim.Adam([log.requires_grad_() for log in logs.values()], lr=rate)

    @torch.no_grad()
    def put(rounded: bool = False) -> None:
        for entry in kept:
            factors = logs[entry.key].exp()
            value = spread(entry, factors.half() if rounded else factors, signs[entry.key])
            start = starts(entry.key)
            value = value if start is None else value + start.float().reshape(-1)
            live[entry.key].copy_(value.reshape(entry.shape))

    was, learnt = model.training, {entry.key: live[entry.key].requires_grad for entry in kept}
    model.eval()
    steps = 0
    try:
        for entry in kept:
            live[entry.key].requires_grad_(True)
        put()
        with torch.enable_grad():
            for loss in losses(model):
                optimizer.param_groups[0]["lr"] = rate / (1 + steps / DECAY)
                _step(loss, kept, signs, live, logs)
                optimizer.step()
                put()
                steps += 1
    finally:
        model.train(was)
        for key, flag in learnt.items():
            live[key].requires_grad_(flag).grad = None
    if not steps:
        raise Unsupported("fitting the scales needs at least one batch, and losses gave none")
    factors = {key: log.detach().exp().half() for key, log in logs.items()}
    put(rounded=True)
    return factors


def _step(
    loss: Tensor, entries: list[Entry], signs: Mapping[str, Tensor], live: Mapping[str, Tensor], logs: Mapping[str, Tensor]
) -> None:
    """The gradients of one batch, into ``logs``."""
    if not bool(torch.isfinite(loss)):
        raise CheckpointMismatch(f"the loss became {loss.item()} while the scales were fitted")
    for entry in entries:
        live[entry.key].grad = None
    loss.backward()
    for entry in entries:
        log = logs[entry.key]
        found = live[entry.key].grad
        along = 1 if log.shape[1] == 1 else 0
        if found is None:
            log.grad = torch.zeros_like(log)
            continue
        change = spread(entry, log.detach().exp(), signs[entry.key]).reshape(entry.rows)
        log.grad = (found.detach().float().cpu().reshape(entry.rows) * change).sum(along, keepdim=True)
