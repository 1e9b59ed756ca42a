"""The seeded mask: rate, independence, and that runs of rows are the rows of one mask."""

from __future__ import annotations

import math

import pytest
import torch

from trimtab.kernels import dropout
from trimtab.kernels.dropout import draw_seed, keep_mask, keep_rate, masks


@pytest.mark.parametrize("p", [0.05, 0.1, 0.3, 0.5, 0.9])
def test_rate_is_the_stated_one_within_chance(p):
    like = torch.empty(1024, 512)
    keep = keep_rate(p)
    share = torch.stack([keep_mask(seed, p, like).mean() for seed in range(8)]).mean().item()
    assert abs(keep - (1 - p)) <= 1 / 512
    assert abs(share - keep) < 5 * math.sqrt(keep * (1 - keep) / like.numel())  # eight seeds, an eighth of the numbers each


def test_smallest_and_largest_rate_neither_vanish_nor_divide_by_zero():
    assert keep_rate(0.0) == 1.0
    assert keep_rate(1e-6) == 255 / 256
    assert keep_rate(0.9999) == 1 / 256


def numbers(rows: int, width: int) -> torch.Tensor:
    """Which random number each entry of a mask reads."""
    return torch.arange(rows)[:, None] * (-(-width // 8) | 1) + torch.arange(width)


@pytest.mark.parametrize("width", [8, 100, 384, 1024])
def test_a_number_serves_few_entries_never_two_of_a_row_or_column(width):
    index = numbers(300, width)
    mask = keep_mask(7, 0.5, torch.empty(300, width))
    first = torch.full((int(index.max()) + 1,), -1.0).scatter_(0, index.flatten(), mask.flatten())
    assert torch.equal(first[index], mask)  # the window's structure is the documented one
    assert all(row.unique().numel() == width for row in index)
    assert all(column.unique().numel() == 300 for column in index.t())
    assert index.flatten().bincount().max() <= 9


def test_entries_are_pairwise_independent_and_no_rectangle_is_tied():
    """Standardised products have mean 0 and variance 1/n, n the number of distinct products; the words' xor leaves no trace."""
    p, z, stride = 26 / 256, [], -(-512 // 8) | 1
    for seed in range(20):
        e = (1 - keep_mask(seed, p, torch.empty(512, 512, dtype=torch.float64)) - p) / math.sqrt(p * (1 - p))
        flat = torch.cat([e[:, :stride].flatten(), e[-1, stride:]])  # every random number once
        table = flat[: len(flat) // 4096 * 4096].view(-1, 1024, 4)  # one row a row word, four bytes a hash
        products = {
            "neighbours in a row": flat[1:] * flat[:-1],
            "neighbours in a column": flat[stride:] * flat[:-stride],
            "bytes of one word": table[..., 0] * table[..., 2],
            "rows of the table": table[1:] * table[:-1],
            "rectangle": table[0, :512] * table[1, :512] * table[0, 512:] * table[1, 512:],
        }
        z.append([product.mean().item() * math.sqrt(product.numel()) for product in products.values()])
    squared = torch.tensor(z).square().mean(0)  # chi-square of 20 degrees over 20: mean 1, std 0.32
    assert (squared < 2.6).all() and (squared > 0.2).all(), squared


def test_different_seeds_give_unrelated_masks():
    like = torch.empty(512, 512, dtype=torch.float64)
    first, second = (keep_mask(seed, 0.5, like) - 0.5 for seed in (1, 2))
    assert abs((first * second).mean().item()) < 5 * 0.25 / math.sqrt(512 * 65)  # 65 random numbers a row


@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (7, 13), (300, 1030)])
def test_runs_are_the_rows_of_one_mask(shape, monkeypatch):
    like = torch.empty(shape)
    whole = keep_mask(3, 0.25, like)
    monkeypatch.setattr(dropout, "_RUN", 64)
    pieces = list(masks(3, 0.25, like))
    assert whole.shape == shape
    assert torch.equal(torch.cat([mask for _, mask in pieces]) if pieces else whole, whole)
    assert all(torch.equal(whole[rows], mask) for rows, mask in pieces)


def test_seed_follows_the_default_generator():
    torch.manual_seed(5)
    first = draw_seed()
    torch.manual_seed(5)
    assert draw_seed() == first
    assert draw_seed() != first
