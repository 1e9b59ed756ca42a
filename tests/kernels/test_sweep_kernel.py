"""The sweep: its factor against inverses, its codes against a plain loop, and the order of quality of the published recipes."""

from __future__ import annotations

import pytest
import torch

from trimtab.core.errors import ShapeMismatch
from trimtab.kernels.sweep import Hessian, SingularHessian, codebook, curvature, nearest_codes, sweep


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def layer(out: int = 192, fan_in: int = 512, tokens: int = 2048) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight with 1 % outliers and the second moments of correlated inputs."""
    rng = seeded()
    mix = torch.eye(fan_in) * 0.5 + torch.randn(fan_in, fan_in, generator=rng) / fan_in**0.5
    x = torch.randn(tokens, fan_in, generator=rng) @ mix * (torch.randn(fan_in, generator=rng) * 0.8).exp()
    W = torch.randn(out, fan_in, generator=rng) * 0.02
    W[torch.rand(out, fan_in, generator=rng) < 0.01] *= 8
    hessian = Hessian(fan_in)
    hessian.add(x)
    return W, hessian.value


def read(table: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    return table.gather(-1, codes.long()).flatten(1)


def loss(W: torch.Tensor, H: torch.Tensor, table: torch.Tensor, codes: torch.Tensor) -> float:
    D = W - read(table, codes)
    return ((D @ H * D).sum() / (W @ H * W).sum()).item()


def test_the_factor():
    """Oracle 8: U_ii^2 is the first entry of the inverse of what is left; H^-1 = U^T U."""
    _, H = layer(fan_in=96)
    H = H.double()
    found = curvature(H, damping=0.0)
    H = H[found.order][:, found.order]
    for i in (0, 1, 40, 94, 95):
        want = torch.linalg.inv(H[i:, i:])[0, 0]
        torch.testing.assert_close(found.upper[i, i] ** 2, want, rtol=1e-9, atol=0)
    torch.testing.assert_close(found.upper.t() @ found.upper, torch.linalg.inv(H))
    assert torch.equal(found.upper, found.upper.triu())
    assert (H.diagonal().diff() <= 0).all()


@pytest.mark.parametrize("groups", [1, 3])
def test_blocks_equal_a_loop_over_columns(groups):
    """The definition, a column at a time, on more columns than a block holds."""
    W, H = layer(7, 300)
    W, found = W.double(), curvature(H.double(), damping=0.1)
    table = codebook(W, 2, groups, rng=seeded())
    rest, codes = W[:, found.order].clone(), torch.empty(7, 300, dtype=torch.uint8)
    for i, column in enumerate(found.order.tolist()):
        own = table[:, column // (300 // groups)]
        codes[:, column] = (own - rest[:, i : i + 1]).abs().argmin(1).to(torch.uint8)
        error = (rest[:, i] - own.gather(1, codes[:, column, None].long())[:, 0]) / found.upper[i, i]
        rest[:, i:] -= error[:, None] * found.upper[i, i:]
    assert torch.equal(sweep(W, table, found).flatten(1), codes)


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_order_of_quality(bits):
    """Oracle 9: min-max rounding > with a sweep > k-means and sweep, weighted better than not; more groups better."""
    W, H = layer()
    found = curvature(H, damping=0.1)
    low, high = W.min(1).values[:, None], W.max(1).values[:, None]
    grid = (low + (high - low) * torch.linspace(0, 1, 1 << bits))[:, None]

    def learnt(power: float, groups: int = 1) -> torch.Tensor:
        return codebook(W, bits, groups, weights=found.importance(power), rng=seeded()).float()

    rounded = loss(W, H, grid, nearest_codes(W, grid))
    swept = loss(W, H, grid, sweep(W, grid, found))
    plain, unswept = learnt(0), learnt(2)
    assert rounded > swept > loss(W, H, plain, nearest_codes(W, plain)) > loss(W, H, unswept, nearest_codes(W, unswept))
    best = {p: loss(W, H, t, sweep(W, t, found)) for p in (0, 1, 2, 3, 4) for t in (learnt(p),)}
    assert loss(W, H, unswept, nearest_codes(W, unswept)) > best[2]
    assert best[0] > best[1] > best[2] and best[0] > best[3] and best[0] > best[4]
    flat = curvature(H, damping=0.1, act_order=False)
    table = codebook(W, bits, 1, weights=flat.importance(4), rng=seeded()).float()
    assert loss(W, H, table, sweep(W, table, flat)) > best[4]
    grouped = [best[4]] + [loss(W, H, t, sweep(W, t, found)) for g in (2, 4, 8) for t in (learnt(4, g),)]
    assert grouped == sorted(grouped, reverse=True)
    assert best[3] < {4: 0.005, 3: 0.02, 2: 0.1}[bits]


def test_few_distinct_values_survive_the_sweep():
    """Oracle 1 with calibration: nothing to make up for."""
    _, H = layer(fan_in=64)
    W = torch.randn(16, generator=seeded())[torch.randint(0, 16, (5, 64), generator=seeded())]
    found = curvature(H)
    table = codebook(W, 4, 1, weights=found.importance(3), rng=seeded()).float()
    assert torch.equal(read(table, sweep(W, table, found)), W)


def test_dead_inputs_and_running_mean():
    """A dead input has no say in the tables; the mean does not depend on how sequences are batched."""
    x = torch.randn(6, 10, 32, generator=seeded())
    x[..., 5] = 0
    one, many = Hessian(32), Hessian(32)
    one.add(x)
    for part in (x[:1], x[1:3], x[3:]):
        many.add(part)
    torch.testing.assert_close(one.value, many.value)
    torch.testing.assert_close(one.value, 2 / 6 * (x.flatten(0, 1).t() @ x.flatten(0, 1)))
    assert one.tokens == many.tokens == 60
    found = curvature(one.value)
    assert found.dead.nonzero().flatten().tolist() == [5]
    assert found.importance(3)[5] == 0 and (found.importance(3) > 0).sum() == 31
    assert (found.importance(0)[torch.arange(32) != 5] > 0).all()


def test_bad_second_moments():
    with pytest.raises(ShapeMismatch, match="square"):
        curvature(torch.ones(2, 3))
    with pytest.raises(ShapeMismatch, match="NaN"):
        curvature(torch.full((2, 2), float("nan")))
    with pytest.warns(UserWarning, match="trying 0.01"):
        assert curvature(torch.ones(4, 4), damping=0.0).damping > 0
    bad = torch.tensor([[1.0, 50.0], [50.0, 1.0]])
    with pytest.warns(UserWarning, match="trying"), pytest.raises(SingularHessian, match="damping="):
        curvature(bad, damping=0.01)
