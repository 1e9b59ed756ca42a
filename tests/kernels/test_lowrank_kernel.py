"""The low-rank kernel: gradients, equality with the plain composition, kept bytes, dtypes, skipped work."""

from __future__ import annotations

import pytest
import torch
from dense_base import DenseBase, SlicedBase, kept_bytes
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.core.site import Rows
from trimtab.kernels import lowrank
from trimtab.kernels.dropout import keep_mask, keep_rate
from trimtab.kernels.lowrank import low_rank

IN, OUT, R = 10, 14, 3


@pytest.fixture
def fixed_seed(monkeypatch):
    """Every forward draws the same mask, so that finite differences see one function."""
    monkeypatch.setattr(lowrank, "draw_seed", lambda: 11)
    return 11


def tensors(*shape, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    make = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    x, W, bias = make(*shape, IN), make(OUT, IN), make(OUT)
    return x, W, bias, make(R, IN), make(OUT, R), (make(2, IN), make(OUT, 2))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("show", [True, False], ids=["dense", "beside"])
@pytest.mark.parametrize("moved", [False, True], ids=["", "start"])
def test_gradcheck(dropout, show, moved, fixed_seed):
    x, W, bias, a, b, start = tensors(2, 3)
    for t in (x, W, bias, a, b):
        t.requires_grad_()

    def f(x, W, bias, a, b):
        base = DenseBase(W, bias, show=show)
        return low_rank(x, base, a, b, scale=1.7, dropout=dropout, start=start if moved else None)

    assert torch.autograd.gradcheck(f, (x, W, bias, a, b))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("show", [True, False], ids=["dense", "beside"])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3), (2, 0, 3), (2, 2, 2, 2)], ids=str)
def test_equals_the_composition_with_the_same_mask(shape, show, dropout, fixed_seed):
    x, W, bias, a, b, (a0, b0) = tensors(*shape)
    for t in (x, a, b):
        t.requires_grad_()
    y = low_rank(x, DenseBase(W, bias, show=show), a, b, scale=0.7, dropout=dropout, start=(a0, b0))
    mask = keep_mask(fixed_seed, dropout, x.reshape(-1, IN)) / keep_rate(dropout) if dropout else torch.ones(1)
    d = x * (mask.view(x.shape) if dropout else 1)
    z = F.linear(x, W, bias) + 0.7 * d @ (b @ a - b0 @ a0).t()
    torch.testing.assert_close(y, z)
    g = torch.randn_like(y)
    for ours, plain in zip(torch.autograd.grad(y, (x, a, b), g), torch.autograd.grad(z, (x, a, b), g), strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_three_layers_on_one_input_keep_it_once(dropout, dtype):
    n, fan_in, out, r = 128, 256, 384, 8
    x = torch.randn(n, fan_in, dtype=dtype, requires_grad=True)
    W = nn.Parameter(torch.randn(out, fan_in, dtype=dtype), requires_grad=False)
    pairs = [(nn.Parameter(torch.randn(r, fan_in)), nn.Parameter(torch.randn(out, r))) for _ in range(3)]
    run = lambda: sum(low_rank(x, DenseBase(W), a, b, dropout=dropout).sum() for a, b in pairs)  # noqa: E731
    # x once, and each layer's x A^T, which is a thirty-second of it
    assert kept_bytes(run) == (n * fan_in + 3 * n * r) * dtype.itemsize


def test_a_wide_update_keeps_the_input_alone():
    x = torch.randn(128, 64, requires_grad=True)
    W = nn.Parameter(torch.randn(96, 64), requires_grad=False)
    for r, more in ((4, 128 * 4 * 4), (5, 0)):  # 16 r <= 64
        a, b = nn.Parameter(torch.randn(r, 64)), nn.Parameter(torch.randn(96, r))
        assert kept_bytes(lambda a=a, b=b: low_rank(x, DenseBase(W), a, b), without=(W, a, b)) == x.nbytes + more


def test_a_base_of_any_kind_keeps_the_input_and_the_thin_product():
    x = torch.randn(128, 256, requires_grad=True)
    W = nn.Parameter(torch.randn(384, 256), requires_grad=False)
    a, b = nn.Parameter(torch.randn(8, 256)), nn.Parameter(torch.randn(384, 8))
    assert kept_bytes(lambda: low_rank(x, DenseBase(W, show=False), a, b, dropout=0.1), without=(W,)) == 128 * (256 + 8) * 4


def test_wide_parameters_beside_a_narrow_input():
    x, W, bias, a, b, _ = tensors(4, 5, dtype=torch.float32)
    xh = x.bfloat16().requires_grad_()
    a.requires_grad_(), b.requires_grad_()
    y = low_rank(xh, DenseBase(W.bfloat16(), bias.bfloat16()), a, b)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert (xh.grad.dtype, a.grad.dtype, b.grad.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    exact = F.linear(x, W + b @ a, bias)
    assert (y.float() - exact).abs().max() < 0.03 * exact.abs().max()
    ga = b.detach().t() @ torch.ones(OUT, 20) @ xh.detach().float().reshape(20, IN)
    assert (a.grad - ga).abs().max() < 0.03 * ga.abs().max()


@pytest.mark.parametrize("show", [True, False], ids=["dense", "beside"])
def test_autocast_computes_in_its_dtype_and_keeps_the_callers_input(show):
    x, W, bias, a, b, _ = tensors(64, dtype=torch.float32)
    for t in (x, a, b):
        t.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = low_rank(x, DenseBase(W, bias, show=show), a, b, dropout=0.0)
        plain = F.linear(x, W, bias) + F.linear(F.linear(x, a), b)
    assert y.dtype == plain.dtype == torch.bfloat16
    assert (y - plain).abs().max() <= 0.02 * plain.abs().max()
    y.float().sum().backward()
    assert x.grad.dtype == a.grad.dtype == b.grad.dtype == torch.float32
    kept = kept_bytes(
        lambda: torch.autocast("cpu", torch.bfloat16)(lambda: low_rank(x, DenseBase(W), a, b))(), without=(W, a, b)
    )
    assert kept == x.nbytes


@pytest.mark.parametrize("frozen", ["x", "a", "b"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_what_needs_no_gradient_costs_no_product(frozen, dropout):
    x, W, _, a, b, _ = tensors(32, dtype=torch.float32)
    for name, t in (("x", x), ("a", a), ("b", b)):
        t.requires_grad_(name != frozen)

    def products() -> int:
        y = low_rank(x, DenseBase(W), a, b, dropout=dropout)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            y.sum().backward()
        return sum(e.count for e in profile.key_averages() if e.key in ("aten::mm", "aten::addmm_"))

    some = products()
    {"x": x, "a": a, "b": b}[frozen].requires_grad_()
    x.grad = a.grad = b.grad = None
    skipped = {"x": 2, "a": 1, "b": 2}[frozen]  # (v A and G W), (v^T d), (d A^T and its product with G)
    assert products() - some == skipped


def test_an_output_that_is_a_view_is_not_written():
    x, W, _, a, b, _ = tensors(6)
    base = SlicedBase(W, Rows(2, 5))
    x.requires_grad_()
    y = low_rank(x, base, a, b[:5])
    torch.testing.assert_close(y, F.linear(x, W[2:7] + b[:5] @ a))
    y.sum().backward()
    torch.testing.assert_close(x.grad, (W[2:7] + b[:5] @ a).sum(0).expand(6, IN))


def test_compiles_whole_and_maps_and_differentiates_twice_where_the_plain_form_runs():
    x, W, bias, a, b, start = tensors(6)
    base = DenseBase(W, bias)
    f = lambda x, a, b: low_rank(x, base, a, b, scale=2.0, start=start)  # noqa: E731
    expected = f(x, a, b)
    torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(x, a, b), expected)
    torch.testing.assert_close(torch.func.vmap(f, in_dims=(0, None, None))(x, a, b), expected)
    gradient = torch.func.grad(lambda a: f(x, a, b).square().sum())
    torch.testing.assert_close(
        gradient(a), torch.autograd.functional.jacobian(lambda a: f(x, a, b).square().sum(), a)
    )
    second = torch.func.hessian(lambda b: f(x, a, b).square().sum())(b)
    u = x @ a.t()
    torch.testing.assert_close(second[0, :, 0, :], 8 * u.t() @ u)


def test_a_chain_writes_the_output_of_the_first_in_place(monkeypatch):
    x, W, bias, a, b, (a2, b2) = tensors(6)
    x.requires_grad_(), a2.requires_grad_(), a.requires_grad_()

    class First(DenseBase):
        def __call__(self, x):
            return low_rank(x, DenseBase(W, bias), a, b)

    y = low_rank(x, First(W, show=False), a2, b2)
    torch.testing.assert_close(y, F.linear(x, W + b @ a + b2 @ a2, bias))
    monkeypatch.setattr(Tensor, "clone", lambda self: pytest.fail("a chain needs no copy"))
    y = low_rank(x, First(W, show=False), a2, b2)
    monkeypatch.undo()
    for ours, plain in zip(
        torch.autograd.grad(y.sum(), (x, a, a2)),
        torch.autograd.grad(F.linear(x, W + b @ a + b2 @ a2, bias).sum(), (x, a, a2)),
        strict=True,
    ):
        torch.testing.assert_close(ours, plain)


def test_checkpointing_repeats_the_mask():
    from torch.utils.checkpoint import checkpoint

    x, W, _, a, b, _ = tensors(32)
    x.requires_grad_(), b.requires_grad_()
    f = lambda x: low_rank(x, DenseBase(W), a, b, dropout=0.5).sin()  # noqa: E731
    torch.manual_seed(1)
    plain = torch.autograd.grad(f(x).sum(), (x, b))
    torch.manual_seed(1)
    again = torch.autograd.grad(checkpoint(f, x, use_reentrant=False).sum(), (x, b))
    for one, other in zip(plain, again, strict=True):
        assert torch.equal(one, other)
