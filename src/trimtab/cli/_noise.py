"""Notes that other packages log while transformers imports them, without trimtab's using them."""

from __future__ import annotations

import logging

__all__ = ["hush"]


def hush() -> None:
    """Show errors alone of the optional packages that transformers' Trainer loads by way of peft, where it is installed.

    torchao and bitsandbytes tell of GPU extensions that a machine without a GPU lacks; nobody asked for them.
    """
    for name in ("torchao", "bitsandbytes", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
