"""Factors on units: value, gradients, what is kept, and a unit that is off."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from trimtab.core.account import saved_bytes
from trimtab.kernels.gate import gated

D = torch.float64


@pytest.mark.parametrize("size", [1, 4])
def test_value_and_gradients(size: int):
    torch.manual_seed(0)
    x, m = torch.randn(3, 5, 12, dtype=D, requires_grad=True), torch.randn(12 // size, dtype=D, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, m: gated(x, m, size), (x, m))
    assert torch.equal(gated(x, m, size), x * m.repeat_interleave(size))
    assert torch.equal(torch.vmap(lambda x: gated(x, m, size))(x), gated(x, m, size))


def test_ones_change_no_bit():
    """Oracle 4."""
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(7, 12, dtype=dtype)
        assert torch.equal(gated(x, torch.ones(3), 4), x)


def test_only_the_product_is_kept():
    x, m, W = torch.randn(40, 12, requires_grad=True), torch.rand(12, requires_grad=True), torch.randn(5, 12, requires_grad=True)
    with saved_bytes(beside=(x, m, W)) as saved:
        gated(x, m, 1) @ W.t()  # the product of W's gradient keeps its input anyway
    assert saved.total == x.numel() * 4


def test_a_unit_that_is_off_stays_off():
    x, m = torch.randn(5, 6, dtype=D, requires_grad=True), torch.tensor([1.0, 0.0, -2.0], dtype=D, requires_grad=True)
    gated(x, m, 2).square().sum().backward()
    assert m.grad[1] == 0 and not x.grad[:, 2:4].any() and m.grad[0] != 0


def test_a_factor_on_a_heads_context_is_one_on_its_probabilities():
    """Oracle 9: value and gradient; H heads of size s, T tokens."""
    torch.manual_seed(0)
    n, H, T, s = 2, 3, 5, 4
    q, k, v = (torch.randn(n, H, T, s, dtype=D) for _ in range(3))
    seed = torch.randn(n, T, H * s, dtype=D)
    factors = torch.rand(H, dtype=D)
    on_probabilities, on_context = (factors.clone().requires_grad_() for _ in range(2))
    p = (q @ k.mT / s**0.5).softmax(-1) * on_probabilities.view(1, H, 1, 1)
    first = (p @ v).transpose(1, 2).reshape(n, T, H * s)
    second = gated(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, T, H * s), on_context, s)
    torch.testing.assert_close(first, second)
    (first * seed).sum().backward()
    (second * seed).sum().backward()
    torch.testing.assert_close(on_probabilities.grad, on_context.grad)
