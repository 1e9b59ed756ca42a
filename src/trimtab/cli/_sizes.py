"""Sizes as people write them."""

from __future__ import annotations

__all__ = ["parse_bytes"]

_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "": 1}


def parse_bytes(text: str) -> int:
    """Bytes of ``24GiB``, ``512MB`` or a plain number.

    Raises:
        Unsupported: it is none of these.
    """
    from trimtab.core.errors import Unsupported

    number = text.rstrip("KMGTiB").strip()
    unit = text[len(text.rstrip("KMGTiB")) :]
    try:
        return int(float(number) * _UNITS[unit])
    except (KeyError, ValueError):
        raise Unsupported(f"a memory size is written as 24GiB or 512MB; found {text!r}") from None
