"""Ternary vectors as bit masks, and the codings: against integers, printed tables, and each other."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trimtab.artifacts import coding, contexts
from trimtab.artifacts.coding import CODINGS, bound, decode, encode, rice_bits, rice_parameter
from trimtab.artifacts.ternary import Tally, Ternary
from trimtab.core.errors import CheckpointMismatch, ShapeMismatch, Unsupported

SIZES = (0, 1, 7, 8, 31, 33, 63, 64, 65, 1000)


def draw(n: int, k: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.where(rng.random(n) < k, rng.choice([-1, 1], n), 0).astype(np.int8)


@pytest.mark.parametrize("n", SIZES)
def test_algebra_on_masks_is_that_of_integers(n: int) -> None:
    a, b = draw(n, 0.6, 1).astype(int), draw(n, 0.5, 2).astype(int)
    x, y = Ternary.pack(a), Ternary.pack(b)
    assert np.array_equal(x.unpack(), a)
    assert (x.nnz, x.dot(y), x.l1(y)) == (np.count_nonzero(a), a @ b, np.abs(a - b).sum())
    assert (x.hamming(y), x.l2_squared(y)) == ((a != b).sum(), ((a - b) ** 2).sum())
    assert np.array_equal((-x).unpack(), -a) and x == Ternary.pack(a) and (n == 0 or x != y)
    assert np.array_equal(x.agreement(y).unpack(), np.where(a == b, a, 0))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 9])
def test_sums_and_majorities_on_bit_planes(count: int) -> None:
    vectors = [draw(130, 0.7, seed) for seed in range(count)]
    tally = Tally(Ternary.pack(v) for v in vectors)
    total = np.sum(vectors, axis=0, dtype=int)
    assert np.array_equal(tally.values(), total)
    assert np.array_equal(tally.majority().unpack(), np.sign(total))


def test_vectors_of_other_sizes_are_refused() -> None:
    with pytest.raises(ShapeMismatch, match="3 and 4 entries"):
        Ternary.pack(draw(3, 1)).dot(Ternary.pack(draw(4, 1)))
    with pytest.raises(ShapeMismatch, match="3 entries takes no vector of 4"):
        Tally([Ternary.pack(draw(3, 1)), Ternary.pack(draw(4, 1))])


#: density -> H(k), b, mean bits of Rice: the table of the method's notes, four digits
TABLE = {
    0.01: (0.0908, 6, 0.0911), 0.05: (0.3364, 4, 0.3393), 0.10: (0.5690, 3, 0.5756),
    0.20: (0.9219, 2, 0.9388), 0.30: (1.1813, 1, 1.1882), 0.50: (1.5000, 0, 1.5000),
}  # fmt: skip


@pytest.mark.parametrize("k", TABLE)
def test_bounds_and_rice_lengths_are_the_printed_ones(k: float) -> None:
    entropy, b, rice = TABLE[k]
    assert (round(bound(k), 4), rice_parameter(k), round(rice_bits(k), 4)) == (entropy, b, rice)


def test_a_full_density_costs_one_bit() -> None:
    assert bound(1.0) == 1.0
    symbols = draw(8000, 1.0)
    assert len(encode(symbols, [(8000, 1)], "masks")) == 2 * 8000 // 8
    assert len(encode(symbols, [(8000, 1)], "entropy")) == pytest.approx(1000, abs=12)


@pytest.mark.parametrize("name", CODINGS)
@pytest.mark.parametrize("k", [0.0, 0.05, 0.3, 1.0])
def test_every_coding_returns_what_it_was_given(name: str, k: float) -> None:
    for n in SIZES:
        symbols = draw(n, k)
        for shapes in ([(n, 1)], [(1, n)], [(n // 3, 1), (0, 4), (1, n - n // 3)]):
            assert np.array_equal(decode(encode(symbols, shapes, name), shapes, name), symbols)
    for symbols in (np.ones(70, np.int8), -np.ones(70, np.int8)):  # one sign alone has no entropy
        assert np.array_equal(decode(encode(symbols, [(7, 10)], name), [(7, 10)], name), symbols)


@pytest.mark.parametrize("k", [0.05, 0.1, 0.2, 0.5])
def test_coded_sizes_on_independent_entries(k: float) -> None:
    n = 400_000
    symbols = draw(n, k, seed=int(100 * k))
    kept, plus = np.count_nonzero(symbols), np.count_nonzero(symbols > 0)
    counts = np.array([kept - plus, n - kept, plus])
    entropy = -(counts * np.log2(counts / n)).sum()
    bits = {name: 8 * len(encode(symbols, [(400, 1000)], name)) for name in CODINGS}
    assert 1 - 1e-3 < bits["entropy"] / entropy < 1 + 1e-3
    assert bits["rice"] / entropy < 1.02 and bits["rice"] == pytest.approx(n * rice_bits(k), rel=0.01)
    assert (bits["masks"], bits["trits"]) == (2 * n, 8 * n // 5)


def unequal(seed: int = 0) -> tuple[np.ndarray, list[tuple[int, int]], np.ndarray]:
    """Pieces like a LoRA's factors: dense and sparse tensors, and rows (A) or columns (B) of unequal density."""
    rng = np.random.default_rng(seed)
    parts, shapes, densities = [], [], []
    for layer in range(12):
        for shape, level in (((8, 512), 0.15), ((512, 8), 0.03)):
            rank = np.minimum(0.9, level * np.exp(rng.normal(0, 0.7, 8)) * (1 + layer / 12))
            k = np.broadcast_to(rank[:, None] if shape[0] == 8 else rank[None, :], shape)
            parts.append(np.where(rng.random(shape) < k, rng.choice([-1, 1], shape), 0).astype(np.int8).ravel())
            shapes.append(shape)
            densities.append(k.ravel())
    return np.concatenate(parts), shapes, np.concatenate(densities)


def test_unequal_densities_go_below_the_bound_of_the_paper() -> None:
    symbols, shapes, densities = unequal()
    n, at, by_tensor = len(symbols), 0, 0.0
    for rows, columns in shapes:
        part = symbols[at : at + rows * columns]
        counts = np.array([(part == s).sum() for s in (-1, 0, 1)], float)
        by_tensor -= (counts[counts > 0] * np.log2(counts[counts > 0] / len(part))).sum()
        at += rows * columns
    coded = 8 * len(encode(symbols, shapes, "entropy"))
    limit = sum(map(bound, densities.tolist()))  # every entry's own density known
    assert limit < coded < by_tensor < n * bound(np.count_nonzero(symbols) / n)
    assert coded < 1.03 * limit
    assert np.array_equal(decode(encode(symbols, shapes, "entropy"), shapes, "entropy"), symbols)


def test_five_entries_a_number() -> None:
    symbols = draw(23, 0.5)
    values = contexts.to_trits(symbols, fill=1)
    assert values.tolist() == [sum(int(d + 1) * 3 ** (4 - i) for i, d in enumerate([*symbols[a : a + 5], *[1] * 5][:5]))
                               for a in range(0, 25, 5)]  # fmt: skip
    assert np.array_equal(contexts.from_trits(values, 23), symbols)


@pytest.mark.parametrize("name", CODINGS)
def test_bytes_that_are_no_sequence_are_refused(name: str) -> None:
    symbols, shapes = draw(3000, 0.2), [(30, 100)]
    payload = encode(symbols, shapes, name)
    for wrong in (payload[:-4], payload + b"\0\0\1\1", payload[: len(payload) // 8 * 4]):
        with pytest.raises(CheckpointMismatch):
            decode(wrong, shapes, name)
    with pytest.raises(CheckpointMismatch):
        decode(payload, [(10, 100)], name)


def test_garbage_never_crashes_the_decoder() -> None:
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(200):
        payload = rng.integers(0, 256, 4 * rng.integers(1, 40)).astype(np.uint8).tobytes()
        try:
            assert len(decode(payload, [(8, 64), (64, 8)], "entropy")) == 1024
        except CheckpointMismatch:
            refused += 1
    assert refused > 190


def test_unknown_codings_and_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unsupported, match="unknown coding 'huffman'"):
        encode(draw(5, 1), [(5, 1)], "huffman")
    monkeypatch.setitem(__import__("sys").modules, "constriction", None)
    with pytest.raises(Unsupported, match="pip install"):
        encode(draw(5, 1), [(5, 1)], "entropy")
    assert np.array_equal(decode(encode(draw(5, 1), [(5, 1)], "rice"), [(5, 1)], "rice"), draw(5, 1))


def test_the_bound_is_that_of_a_sum_over_symbols() -> None:
    k = 0.37
    assert bound(k) == pytest.approx(-sum(p * math.log2(p) for p in (k / 2, k / 2, 1 - k)))
    assert coding.bound(0.0) == 0.0
