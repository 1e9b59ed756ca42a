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
    assert abs(share - keep) < 5 * math.sqrt(keep * (1 - keep) / (8 * like.numel()))


def test_smallest_and_largest_rate_neither_vanish_nor_divide_by_zero():
    assert keep_rate(0.0) == 1.0
    assert keep_rate(1e-6) == 255 / 256
    assert keep_rate(0.9999) == 1 / 256


def test_entries_are_pairwise_independent_and_no_rectangle_is_tied():
    """Standardised products have mean 0 and variance 1/n; row word xor column word must leave no trace at four corners."""
    p, z = 26 / 256, []
    for seed in range(20):
        e = (1 - keep_mask(seed, p, torch.empty(512, 512, dtype=torch.float64)) - p) / math.sqrt(p * (1 - p))
        q = e.view(512, 128, 4)
        products = {
            "neighbours in a row": e[:, 1:] * e[:, :-1],
            "neighbours in a column": e[1:] * e[:-1],
            "bytes of one word": q[..., 0] * q[..., 2],
            "rows apart": e[:256] * e[256:],
            "rectangle": e[:256, :256] * e[256:, :256] * e[:256, 256:] * e[256:, 256:],
        }
        z.append([product.mean().item() * math.sqrt(product.numel()) for product in products.values()])
    squared = torch.tensor(z).square().mean(0)  # chi-square of 20 degrees over 20: mean 1, std 0.32
    assert (squared < 2.6).all() and (squared > 0.2).all(), squared


def test_different_seeds_give_unrelated_masks():
    like = torch.empty(512, 512, dtype=torch.float64)
    first, second = (keep_mask(seed, 0.5, like) - 0.5 for seed in (1, 2))
    assert abs((first * second).mean().item()) < 5 * 0.25 / 512


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
