"""The bottleneck kernel: gradients, equality with the plain composition, kept bytes, dtypes, made matrices, bad input."""

from __future__ import annotations

import pytest
import torch
from dense_base import kept_bytes
from torch import Tensor, nn
from torch.nn import functional as F

import trimtab as tt
from trimtab.kernels import bottleneck as kernel
from trimtab.kernels.bottleneck import ACTIVATIONS, bottleneck
from trimtab.kernels.dropout import keep_mask, keep_rate

IN, OUT, M = 7, 6, 3
PLAIN = {
    "none": lambda u: u,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda u: F.gelu(u, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
}


@pytest.fixture
def fixed_seed(monkeypatch):
    """Every forward draws the same masks, so that finite differences see one function."""
    monkeypatch.setattr(kernel, "draw_seed", lambda: 11)
    return 11


def tensors(*shape: int, series: bool = False, bias: bool = True, dtype=torch.float64) -> tuple:
    """``(y, x or None, factors)``; factors need gradients."""
    g = torch.Generator().manual_seed(0)
    make = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    fan_in = OUT if series else IN
    y, x = make(*shape, OUT).requires_grad_(), None if series else make(*shape, IN).requires_grad_()
    factors = (make(M, fan_in), make(M), make(OUT, M), make(OUT)) if bias else (make(M, fan_in), None, make(OUT, M), None)
    return y, x, tuple(None if f is None else f.requires_grad_() for f in factors)


def composed(y: Tensor, x: Tensor | None, factors: tuple, act: str, scale, p: float = 0.0, q: float = 0.0) -> Tensor:
    """The definition, by torch's own operations and the same masks."""
    A, a, B, b = factors
    x = y if x is None else x
    drop = lambda t, p: t if not p else t * (keep_mask(11, p, t.reshape(-1, t.shape[-1])) / keep_rate(p)).view(t.shape)  # noqa: E731
    return y + scale * F.linear(drop(PLAIN[act](F.linear(drop(x, p), A, a)), q), B, b)


@pytest.mark.parametrize("series", [True, False], ids=["series", "parallel"])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("q", [0.0, 0.4])
def test_gradcheck(series, p, q, fixed_seed):
    y, x, factors = tensors(2, 3, series=series)
    s = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    inputs = tuple(t for t in (y, x, s, *factors) if t is not None)

    def f(*given):
        given = iter(given)
        y, x, s = next(given), None if series else next(given), next(given)
        return bottleneck(y, x, tuple(given), act="gelu", scale=s, dropout=p, hidden_dropout=q)

    assert torch.autograd.gradcheck(f, inputs)


@pytest.mark.parametrize("act", list(ACTIVATIONS))
@pytest.mark.parametrize("bias", [True, False], ids=["bias", ""])
@pytest.mark.parametrize("series", [True, False], ids=["series", "parallel"])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3), (2, 0, 3)], ids=str)
def test_equals_the_composition(shape, series, bias, act, fixed_seed):
    y, x, factors = tensors(*shape, series=series, bias=bias)
    for rates in ((0.0, 0.0), (0.3, 0.2)):
        got = bottleneck(y, x, factors, act=act, scale=0.7, dropout=rates[0], hidden_dropout=rates[1])
        want = composed(y, x, factors, act, 0.7, *rates)
        torch.testing.assert_close(got, want)
        inputs = [t for t in (y, x, *factors) if t is not None]
        G = torch.randn_like(got)
        for ours, plain in zip(torch.autograd.grad(got, inputs, G), torch.autograd.grad(want, inputs, G), strict=True):
            torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", ["none", "relu", "gelu"])
@pytest.mark.parametrize("rates", [(0.0, 0.0), (0.1, 0.1)], ids=["", "dropout"])
def test_keeps_the_input_and_the_thin_pre_activation(rates, act, dtype):
    n, d, m = 128, 256, 8
    y, x = (torch.randn(n, d, dtype=dtype, requires_grad=True) for _ in range(2))
    factors = tuple(nn.Parameter(torch.randn(*s) * 0.1) for s in ((m, d), (m,), (d, m), (d,)))
    more = {"act": act, "dropout": rates[0], "hidden_dropout": rates[1]}
    assert kept_bytes(lambda: bottleneck(y, x, factors, **more)) == n * (d + m) * dtype.itemsize
    assert kept_bytes(lambda: bottleneck(y, None, factors, **more)) == n * (d + m) * dtype.itemsize
    both = lambda: bottleneck(y, x, factors, **more) + bottleneck(y, x, factors, **more)  # noqa: E731
    assert kept_bytes(both) == n * (d + 2 * m) * dtype.itemsize, "two adapters on one input keep it once"


def test_a_wide_middle_is_made_again():
    y = torch.randn(128, 64, requires_grad=True)
    for m, thin in ((4, 4), (5, 0)):  # 16 m <= 64
        factors = (nn.Parameter(torch.randn(m, 64)), None, nn.Parameter(torch.randn(64, m)), None)
        assert kept_bytes(lambda f=factors: bottleneck(y, None, f, act="tanh")) == 128 * (64 + thin) * 4


@pytest.mark.parametrize("series", [True, False], ids=["series", "parallel"])
@pytest.mark.parametrize(("act", "thin"), [("none", 0), ("relu", 16)])
def test_frozen_factors_keep_nothing_of_the_input(series, act, thin):
    y, x = torch.randn(128, 64, requires_grad=True), None if series else torch.randn(128, 64, requires_grad=True)
    factors = tuple(nn.Parameter(torch.randn(*s), requires_grad=False) for s in ((16, 64), (16,), (64, 16), (64,)))
    kept = kept_bytes(lambda: bottleneck(y, x, factors, act=act, dropout=0.2))
    assert kept <= (128 * thin + 1) * 4
    torch.manual_seed(0)
    got = bottleneck(y, x, factors, act=act, dropout=0.2)
    torch.manual_seed(0)
    want = bottleneck(y, x, tuple(nn.Parameter(f) for f in factors), act=act, dropout=0.2)
    inputs = [t for t in (y, x) if t is not None]
    for a, b in zip(torch.autograd.grad(got.sum(), inputs), torch.autograd.grad(want.sum(), inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_made_matrices_are_not_kept_and_their_factors_learn():
    n, d, m = 64, 48, 8
    y = torch.randn(n, d, dtype=torch.float64, requires_grad=True)
    factors = tuple(nn.Parameter(torch.randn(*s, dtype=torch.float64)) for s in ((m, 2), (2, d), (d, m)))
    make = lambda s, t, up: (torch.tanh(s @ t), None, up, None)  # noqa: E731
    assert kept_bytes(lambda: bottleneck(y, None, factors, make=make, act="silu")) == n * d * 8
    got = bottleneck(y, None, factors, make=make, act="silu")
    want = composed(y, None, make(*factors), "silu", 1.0)
    torch.testing.assert_close(got, want)
    G = torch.randn_like(got)
    for ours, plain in zip(torch.autograd.grad(got, (y, *factors), G), torch.autograd.grad(want, (y, *factors), G), strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("series", [True, False], ids=["series", "parallel"])
def test_wider_parameters_and_autocast(series):
    """Parameters in float32 beside bf16 activations, and fp32 activations under autocast: dtypes of results and gradients."""
    y, x, factors = tensors(4, series=series, dtype=torch.float32)
    exact = composed(y, x, factors, "relu", 1.0)
    half = bottleneck(y.bfloat16(), None if series else x.bfloat16(), factors, act="relu")
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, atol=0.15, rtol=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = bottleneck(y, x, factors, act="relu")
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, exact, atol=0.15, rtol=0.02)
    for y2 in (half, mixed):
        for g, f in zip(torch.autograd.grad(y2.float().sum(), factors, retain_graph=True), factors, strict=True):
            assert g.dtype == f.dtype == torch.float32 and bool(torch.isfinite(g).all())


def test_only_asked_gradients(fixed_seed):
    """Frozen factors, or an input that needs no gradient: the rest is right."""
    y, x, factors = tensors(2, 3)
    want = torch.autograd.grad(composed(y, x, factors, "gelu", 1.0).sum(), (y, x, factors[2]))
    frozen = (factors[0].detach(), None, factors[2], factors[3].detach())
    half = composed(y, x, (factors[0], None, factors[2], factors[3]), "gelu", 1.0).sum()
    got = torch.autograd.grad(bottleneck(y, x.detach(), frozen, act="gelu").sum(), (y, factors[2]))
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[1], torch.autograd.grad(half, factors[2])[0])
    (gx,) = torch.autograd.grad(bottleneck(y.detach(), x, tuple(f.detach() for f in factors), act="gelu").sum(), x)
    torch.testing.assert_close(gx, want[1])


def test_other_tokens_are_refused():
    y, x, factors = tensors(2, 3)
    with pytest.raises(tt.ShapeMismatch, match="same tokens"):
        bottleneck(y, x[:, :1], factors)
