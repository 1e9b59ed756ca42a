"""Merge rules: rows worked out by hand, laws, and a rule of someone else's."""

from __future__ import annotations

import pytest
import torch

import trimtab as tt
from trimtab.artifacts.rules import dare, drop, magnitude_prune, merge_rule, merge_rules, rule_entry, task_arithmetic, ties, trim
from trimtab.kernels.thin import Thin

ROWS = [torch.tensor(row) for row in ([3.0, -1, 0.5, 2, -4, 0], [-2.0, -3, 1, 2, 1, 0.1], [1.0, 2, 1.9, -5, 2, 0.2])]


@pytest.mark.parametrize(
    ("weights", "options", "expected"),
    [
        ([0.5, 0.3, 0.2], {}, [3, -3, 0, 2, -4, 0]),
        ([1, 1, 1], {}, [3, -3, 0, -5, -4, 0]),
        ([7, 7, 7], {}, [3, -3, 0, -5, -4, 0]),
        ([0.5, 0.3, 0.2], {"vote": "sum", "divisor": "count"}, [1.5, -0.9, 0, -1, -2, 0]),
        ([1, 1, 1], {"vote": "sum", "divisor": "count"}, [3, -3, 0, -5, -4, 0]),
        ([1, 1, 1], {"scale": 0.5}, [1.5, -1.5, 0, -2.5, -2, 0]),
        ([1, 1, 1], {"vote": "count"}, [3, 2, 0, 2, 2, 0]),
    ],
)  # fmt: skip
def test_ties_on_rows(weights, options, expected) -> None:
    """At density 0.5 the rows keep 3, 2, -4; -2, -3, 2; and 2, -5, 2. Rows two and four are mergekit's and peft's results."""
    torch.testing.assert_close(ties(ROWS, weights, density=0.5, **options), torch.tensor(expected, dtype=torch.float32))


def test_ties_with_one_update_is_its_trim_and_disagreement_is_not_averaged() -> None:
    torch.testing.assert_close(ties(ROWS[:1], [0.3], density=0.5), trim(ROWS[0], 0.5))
    a, b = torch.tensor([2.0, 2.0, -2.0]), torch.tensor([-1.0, 1.0, -1.0])
    torch.testing.assert_close(ties([a, b], [1, 1], density=1.0), torch.tensor([2.0, 1.5, -1.5]))


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 0.99, 1.0])
def test_trim_keeps_exactly_the_largest(density) -> None:
    x = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)).round(decimals=1)  # many ties
    kept = trim(x, density)
    count = max(1, int(density * x.numel()))
    order = x.abs().flatten().sort(descending=True, stable=True).indices[:count]
    expected = torch.zeros(x.numel()).index_copy_(0, order, x.flatten()[order]).reshape(x.shape)
    assert torch.equal(kept, expected)
    torch.testing.assert_close(magnitude_prune([x, 2 * x], [1, -0.5], density=density), torch.zeros_like(x))


def test_dare_keeps_the_expectation_and_its_seed() -> None:
    x = torch.randn(20, 20, generator=torch.Generator().manual_seed(0))
    draws = torch.stack([drop(x, 0.3, torch.Generator().manual_seed(i)) for i in range(4000)])
    error = (draws.mean(0) - x).abs() / (x.abs() * (0.7 / 0.3 / 4000) ** 0.5)
    assert error.max() < 5  # standard errors
    kept = draws[0] != 0
    torch.testing.assert_close(draws[0][kept], (x / 0.3)[kept])
    once, again = (dare([x], [1.0], density=0.3, rng=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(once, again)
    torch.testing.assert_close(dare([x, x], [0.5, 0.5], density=1.0, rng=torch.Generator()), x)


def test_rules_of_sums_take_factors() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = (Thin(torch.randn(6, 2, generator=g), torch.randn(2, 5, generator=g)) for _ in range(2))
    made = task_arithmetic([x, y], [1.0, -1.0], scale=0.5)
    assert isinstance(made, Thin)
    torch.testing.assert_close(made.dense(), 0.5 * (x.dense() - y.dense()))


def test_parameters_are_read_from_the_signature() -> None:
    entry = rule_entry("ties")
    assert dict(entry.parameters) == {"density": 0.2, "scale": 1.0, "vote": "weighted", "divisor": "weights"}
    assert entry.bind({"density": 1}) == {"density": 1, "scale": 1.0, "vote": "weighted", "divisor": "weights"}
    with pytest.raises(tt.NoMatch, match="nearest: density"):
        entry.bind({"densty": 0.3})
    with pytest.raises(tt.ShapeMismatch, match=r"vote as one of 'weighted', 'sum', 'count'; found 'majority'"):
        entry.bind({"vote": "majority"})
    with pytest.raises(tt.ShapeMismatch, match="2 problems"):
        entry.bind({"density": True, "scale": "1"})
    for density in (0, -0.1, 1.5, float("nan")):
        with pytest.raises(tt.ShapeMismatch, match="share of entries"):
            ties(ROWS, [1, 1, 1], density=density)
    assert entry.default_weights(4) == [0.25] * 4 and rule_entry("task_arithmetic").default_weights(2) == [1.0, 1.0]
    with pytest.raises(tt.NoMatch, match="without a rank"):
        rule_entry("cat")
    with pytest.raises(tt.NoMatch, match="nearest: dare"):
        rule_entry("dar")


def test_a_rule_of_someone_elses() -> None:
    @merge_rule("median of a test", url="https://example.org/median")
    def median(updates, weights, *, shrink: float = 1.0):
        """The median."""
        return shrink * torch.stack(updates).median(0).values

    entry = rule_entry("median of a test")
    assert torch.equal(entry(ROWS, [1, 1, 1], entry.bind({"shrink": 2}), seed=0), 2 * torch.stack(ROWS).median(0).values)
    assert "median of a test" in merge_rules().column("rule")
    with pytest.raises(tt.Unsupported, match="taken"):
        merge_rule("ties", url="")(lambda updates, weights: updates[0])
    with pytest.raises(tt.Unsupported, match="need defaults"):
        merge_rule("x", url="")(lambda updates, weights, *, a: updates[0])
