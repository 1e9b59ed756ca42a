"""The gain on output features: gradients, runs of rows, skipped work, dtypes."""

from __future__ import annotations

import pytest
import torch
from dense_base import DenseBase, kept_bytes

from trimtab.kernels import gain
from trimtab.kernels.gain import Unbiased, gained


@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 7)], ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_gradcheck_in_runs_of_rows(shape, with_bias, monkeypatch):
    monkeypatch.setattr(gain, "_RUN", 12)  # two rows a run
    v = torch.randn(*shape, 6, dtype=torch.float64, requires_grad=True)
    g, bias = (torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    if with_bias:
        torch.testing.assert_close(gained(v, g, bias), g * v + bias)
        assert torch.autograd.gradcheck(gained, (v, g, bias))
    else:
        torch.testing.assert_close(gained(v, g, None), g * v)
        assert torch.autograd.gradcheck(lambda v, g: gained(v, g, None), (v, g))


def test_keeps_v_alone_and_nothing_for_a_fixed_gain():
    v, g = torch.randn(64, 32, requires_grad=True), torch.randn(32, requires_grad=True)
    assert kept_bytes(lambda: gained(v, g, None), without=(g,)) == 64 * 32 * 4
    assert kept_bytes(lambda: gained(v, g.detach(), None), without=(g,)) == 0


def test_narrow_activations_beside_a_wide_gain():
    v, g = torch.randn(500, 8).bfloat16().requires_grad_(), torch.randn(8, requires_grad=True)
    y = gained(v, g, None)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert g.grad.dtype == torch.float32 and v.grad.dtype == torch.bfloat16
    torch.testing.assert_close(g.grad, v.detach().float().sum(0), atol=0.5, rtol=0.02)


def test_unbiased_is_the_base_without_its_bias():
    W, bias, x = torch.randn(6, 4), torch.randn(6), torch.randn(3, 4)
    base = DenseBase(W, bias)
    torch.testing.assert_close(Unbiased(base)(x), x @ W.t())
    assert Unbiased(base).bias is None and Unbiased(base).dense is W
