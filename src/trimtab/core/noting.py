"""Which adapted modules run, noted while a model waits for its first optimizer step (``trimtab.core.reach``)."""

from __future__ import annotations

import sys
from typing import Any

import torch

__all__ = ["Noted", "note", "noted"]


class Noted:
    """What was noted: ids of hosts.

    Attributes:
        listeners: how many models wait; nothing is noted at 0.
        ran: hosts whose module ran.
        cut: those that ran in the first pass of torch's reentrant checkpoint, which is without gradients.
    """

    listeners: int = 0

    def __init__(self) -> None:
        self.ran: set[int] = set()
        self.cut: set[int] = set()


noted = Noted()


def note(host: Any) -> None:
    """``host``'s module runs; not looked at in a compiled graph."""
    if torch.compiler.is_compiling() or not noted.listeners:
        return
    noted.ran.add(id(host))
    if not torch.is_grad_enabled() and _in_checkpoint():
        noted.cut.add(id(host))


def _in_checkpoint() -> bool:
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename.replace("\\", "/").endswith("torch/utils/checkpoint.py"):
            return True
        frame = frame.f_back
    return False
