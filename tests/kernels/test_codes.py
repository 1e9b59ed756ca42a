"""Packed codes: layouts to the byte, round trips, and the look-up against plain indexing."""

from __future__ import annotations

import pytest
import torch

from trimtab.core.errors import ShapeMismatch
from trimtab.kernels.codes import check_layout, gather, pack, unpack


def bytes_of(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8)


def test_layouts():
    """Oracle 6 of SketchTune: published nibbles (the even column in the high half), dense 3 and 2 bits."""
    assert pack(bytes_of(3, 12, 0, 15, 7, 1), 4).tolist() == [60, 15, 113]
    assert pack(bytes_of(5, 2, 7, 0, 1, 6, 3, 4), 3).tolist() == [171, 131, 156]
    assert pack(bytes_of(3, 0, 2, 1), 2).tolist() == [201]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("groups", [1, 3])
def test_round_trip_and_size(bits, groups):
    """Any width, an odd number of groups too; exactly count * bits / 8 bytes."""
    codes = torch.randint(0, 1 << bits, (5, groups, 24), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.numel() * 8 == codes.numel() * bits
    assert torch.equal(unpack(packed, bits), codes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [16, 8192])
@pytest.mark.parametrize("bits", range(1, 9))
def test_gather_is_indexing(bits, size, dtype):
    """Short rows go code by code, long ones byte by byte."""
    codes = torch.randint(0, 1 << bits, (3, 2, size), dtype=torch.uint8)
    table = torch.randn(3, 2, 1 << bits).to(dtype)
    assert torch.equal(gather(table, pack(codes, bits), bits), table.gather(-1, codes.long()).flatten(1))


def test_bad_input():
    with pytest.raises(ShapeMismatch, match="1 to 8 bits, found bits=9"):
        check_layout(8, 9)
    with pytest.raises(ValueError, match=r"pad them by 4 to 16, a multiple of 8"):
        pack(torch.zeros(2, 12, dtype=torch.uint8), 3)
    with pytest.raises(ValueError, match=r"pad them by 1 to 6, a multiple of 2"):
        check_layout(5, 4)
    with pytest.raises(ValueError, match="uint8, found torch.int64"):
        pack(torch.zeros(8, dtype=torch.int64), 4)
    with pytest.raises(ValueError, match="a code of 4 does not fit in 2 bits"):
        pack(bytes_of(0, 4, 0, 0), 2)
    with pytest.raises(ValueError, match="end inside a code of 3 bits"):
        unpack(bytes_of(1, 2), 3)
