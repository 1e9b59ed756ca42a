"""BOFT: butterfly structure against dense factors, reach, orthogonality, scale, counts, memory, bad input."""

from __future__ import annotations

import pytest
import torch
from structured_places import Opaque, assert_law, build, count, layer, saved_bytes, site
from torch import nn

from trimtab.core.errors import ShapeMismatch
from trimtab.kernels.rotation import rotate
from trimtab.methods.reparameterized.boft import BOFT

D = torch.float64


def rotation(adapter, width: int) -> torch.Tensor:
    """``R`` as a dense matrix."""
    return rotate(torch.eye(width, dtype=D), adapter.maker, adapter.x).detach()


def dense_factor(blocks: torch.Tensor, level: int) -> torch.Tensor:
    """``P D P^T`` written out: within groups of 2^(level+1) half blocks, the even and the odd positions are sorted apart."""
    count, size, _ = blocks.shape
    group = 2 ** (level + 1)
    order = [g * group + k for g in range(2 * count // group) for k in (*range(0, group, 2), *range(1, group, 2))]
    half = size // 2
    index = torch.tensor([chunk * half + j for chunk in order for j in range(half)])
    P = torch.eye(count * size, dtype=D)[index]
    return P @ torch.block_diag(*blocks) @ P.t()


@pytest.mark.parametrize(("width", "b", "m"), [(16, 4, 1), (16, 4, 2), (16, 4, 3), (24, 2, 3), (32, 4, 4)])
def test_rotation_is_the_product_of_dense_butterfly_factors(width, b, m):
    adapter = build(BOFT(block_size=b, factors=m), site(layer(5, width)), move=1.0)
    R = adapter.maker.blocks(adapter.x).detach()
    dense = torch.eye(width, dtype=D)
    for level in range(m):
        dense = dense_factor(R[level], level) @ dense
    torch.testing.assert_close(rotation(adapter, width), dense)
    torch.testing.assert_close(dense @ dense.t(), torch.eye(width, dtype=D))


def test_information_reach():
    """in = 16, b = 4: a quarter, half and all of R is nonzero for m = 1, 2, 3; a fourth factor is refused."""
    place = site(layer(5, 16))
    shares = [
        (rotation(build(BOFT(block_size=4, factors=m), place, move=1.0), 16).abs() > 1e-12).double().mean().item()
        for m in (1, 2, 3)
    ]
    assert shares == [0.25, 0.5, 1.0]
    with pytest.raises(ShapeMismatch, match="at most 3"):
        BOFT.adapter_class.check(BOFT(block_size=4, factors=4), place)


@pytest.mark.parametrize("opaque", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("config", [BOFT(block_size=4, factors=1), BOFT(blocks=4, factors=2), BOFT(block_size=2, factors=4)])
def test_law(config, bias, opaque):
    place = site(layer(10, 16, bias=bias))
    assert_law(build(config, place), Opaque(place) if opaque else place)


@pytest.mark.parametrize("factors", [1, 2])
def test_kernel_gradcheck(factors):
    adapter = build(BOFT(block_size=2, factors=factors), site(layer(3, 8)))
    x = torch.randn(2, 8, dtype=D, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, X: rotate(x, adapter.maker, X), (x, adapter.x))


def test_start_gram_and_scale():
    place = site(layer(10, 16))
    start = build(BOFT(block_size=4), place, move=0)
    torch.testing.assert_close(start(torch.eye(16, dtype=D), place), place(torch.eye(16, dtype=D)))
    adapter = build(BOFT(block_size=4), place, move=1.0)
    with torch.no_grad():
        adapter.s.fill_(1.0)
    W = adapter.weight(place.weight)
    torch.testing.assert_close(W @ W.t(), place.weight @ place.weight.t())
    with torch.no_grad():
        adapter.s.fill_(3.0)
    x = torch.zeros(2, 16, dtype=D)
    assert torch.equal(adapter(x, place), place.bias.expand(2, 10))  # the bias is not scaled
    torch.testing.assert_close(adapter.weight(place.weight), 3 * W)


def test_counts():
    assert count(BOFT(block_size=4, factors=1)) == 802_816
    assert count(BOFT(block_size=8, factors=4), (((100, 1024), 1),)) == 4 * 128 * 64 + 100


def test_saves_input_and_output():
    place = site(layer(20, 16, dtype=torch.float32))
    adapter = build(BOFT(block_size=4), place)
    x = torch.randn(10, 16, requires_grad=True)
    constants = (place.module.weight, place.module.bias, *adapter.parameters())
    assert saved_bytes(lambda: adapter(x, place), *constants) == (10 * 16 + 10 * 20) * 4


def test_dropout_puts_blocks_back():
    place = site(layer(40, 40, bias=False))
    adapter = build(BOFT(block_size=2, factors=1, dropout=0.5), place, move=0).train()
    with torch.no_grad():
        adapter.x.normal_()
        place.module.weight.copy_(torch.eye(40))
    x = torch.randn(40, dtype=D)
    moved = (adapter(x, place) - x).view(20, 2).abs().amax(1) > 1e-9
    assert 2 < moved.sum() < 18
    assert ((adapter.eval()(x, place) - x).view(20, 2).abs().amax(1) > 1e-9).all()


@pytest.mark.parametrize(
    "p", [{"block_size": 0}, {"block_size": 4, "blocks": 2}, {"block_size": 1}, {"factors": 0}, {"dropout": 1.0}]
)
def test_bad_hyperparameters(p):
    with pytest.raises(ShapeMismatch):
        BOFT(**p)


@pytest.mark.parametrize(
    ("config", "message"),
    [(BOFT(block_size=8), "block_size=8 .* width 12 .* 6 and 12"), (BOFT(blocks=5), "blocks=5 .* 4 and 6"),
     (BOFT(block_size=3, factors=2), "even block size.* at most 1"), (BOFT(block_size=4, factors=2), "3 blocks.* at most 1"),
     (BOFT(blocks=12, factors=1), "size 1")],
)
def test_sizes_that_do_not_fit_say_what_would(config, message):
    with pytest.raises(ShapeMismatch, match=message):
        BOFT.adapter_class.check(config, site(nn.Linear(12, 4)))
