"""SketchTune: every row's weights share few values, and these values learn.

A row is cut into G groups of s = in / G neighbouring columns; a group has a table of ``2^b`` values and a b-bit code a weight::

    W'[o, g s + j] = T[o, g, C[o, g, j]]        T (out, G, 2^b) learns, C (out, G, s) is frozen

The update is in general of full rank. On a base that ``tt.sketch`` has compressed, codes are the base's own and the table starts
as a copy of the base's: training starts at the base, only the table is stored, and switching tasks is switching tables. On a
dense base the weight is sketched on attaching, by k-means without data: the codes are kept with the adapter, and the start is
near the base.

Source: arXiv 2410.06364 (first called SpaLLM). Trainable: ``G 2^b out``. Saved for backward: ``x``; codes and table by reference
(kernels/sketch.py). The table is stored in float32 and cast for the look-up: in bfloat16 most steps of Adam would be lost.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from trimtab.core.contracts import MethodConfig, Reparameterization, Span
from trimtab.core.errors import ShapeMismatch
from trimtab.core.registry import method
from trimtab.core.site import Operation, Site
from trimtab.kernels.codes import check_layout, pack
from trimtab.kernels.sketch import dense_weight, sketched
from trimtab.kernels.sweep import codebook, nearest_codes

__all__ = ["SketchTune", "SketchTuneAdapter", "check_groups"]


@dataclass(frozen=True)
class SketchTune(MethodConfig):
    """Trains the few values that a compressed layer's weights share; compression and adapter are one.

    Not for a dense base whose outputs must be kept at the start, since compressing it changes them: sketch it with data first.
    Not with weight decay: it would decay the weights themselves.

    Args:
        bits: b, 1 to 8; a group has ``2^b`` values.
        groups: G, groups a row; must divide the inputs into groups whose codes fill whole bytes.
        restarts: starts of k-means, the best of which is taken; where the base is no sketch.
    """

    search = {"groups": (1, 2, 4, 8)}
    learning_rate = Span(1e-5, 3e-3, log=True)  # the paper ends at 3e-4; small models want more (bench/sketch.py)

    bits: int = 4
    groups: int = 1
    restarts: int = 4

    def __post_init__(self) -> None:
        self.require_count("bits", "groups", "restarts")
        self.require(self.bits <= 8, f"codes have 1 to 8 bits, found {self.bits}")


def check_groups(fan_in: int, bits: int, groups: int, name: str) -> None:
    """Whether rows of ``fan_in`` weights can be sketched.

    Raises:
        ShapeMismatch: the groups are of unequal size, or their codes do not fill whole bytes.
    """
    if fan_in % groups:
        raise ShapeMismatch(f"{name} has {fan_in} inputs, which {groups} groups do not divide; choose a divisor of {fan_in}")
    try:
        check_layout(fan_in // groups, bits, what="columns a group")
    except ShapeMismatch as error:
        raise ShapeMismatch(f"{name} cannot be sketched with bits={bits}, groups={groups}: {error}") from None


@method(SketchTune, paper="arXiv:2410.06364", tests=({"bits": 2},))
class SketchTuneAdapter(Reparameterization):
    """``table`` (out, G, 2^b) and, on a dense base, ``codes`` (out, G, s b / 8) uint8."""

    kinds = frozenset({"linear", "conv", "grouped", "bare"})
    fast = frozenset({"linear"})
    needs_weight = False
    identity_at_start = False
    additive = False

    def __init__(self, config: SketchTune, site: Site, *, rng: Generator):
        super().__init__(config, site)
        out, fan_in = site.shape
        bits, groups = config.bits, config.groups
        base = _base(site)
        codes = None
        if site.is_meta:
            table = torch.empty(out, groups, 1 << bits, device="meta")
            size = fan_in // groups * bits // 8
            codes = torch.empty(out, groups, size, dtype=torch.uint8, device="meta") if base is None else None
        elif base is None:
            W = site.weight.detach()
            table = codebook(W, bits, groups, restarts=config.restarts, rng=rng).to(site.adapter_dtype)
            codes = pack(nearest_codes(W.to(table.dtype), table), bits)
        else:
            table = base[1]
        self.table = self.parameter(table)
        self.register_buffer("codes", codes)
        if site.adapter_dtype in (torch.bfloat16, torch.float16):
            warnings.warn(
                f"the table at {site.name} is stored in {site.adapter_dtype}, in which small steps change nothing; "
                "attach with dtype=torch.float32",
                stacklevel=2,
            )

    @classmethod
    def check(cls, config: SketchTune, site: Site) -> None:
        check_groups(site.shape[-1], config.bits, config.groups, site.name)
        base = _base(site)
        if base is not None:
            found = base[1].shape[-1].bit_length() - 1, base[1].shape[1]
            if found != (config.bits, config.groups):
                raise ShapeMismatch(
                    f"{site.name} is a sketch of {found[0]} bits and {found[1]} groups, and {config} asks for another; "
                    f"attach SketchTune(bits={found[0]}, groups={found[1]})"
                )

    def packed(self) -> Tensor:
        """The packed codes: the adapter's own, or the base's."""
        return _base(self.site)[0] if self.codes is None else self.codes

    def weight(self, W: Tensor) -> Tensor:
        return dense_weight(self.table, self.packed(), self.config.bits)

    def forward(self, x: Tensor, base: Operation) -> Tensor:
        return sketched(x, self.table, self.packed(), self.config.bits, base.bias)


def _base(site: Site) -> tuple[Tensor, Tensor] | None:
    """Codes and table of the base's own sketch, of the site's rows; None where the base is no sketch."""
    stored = site.parameter()
    if not hasattr(stored, "sketch_codes"):
        return None
    codes, table = stored.sketch_codes, stored.sketch_table
    return (codes, table) if site.rows is None else (site.rows.take(codes, 0), site.rows.take(table, 0))
