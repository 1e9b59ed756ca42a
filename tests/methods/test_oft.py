"""OFT: orthogonality, kept geometry, the sign of both Cayley forms, COFT, counts, memory, bad input."""

from __future__ import annotations

import pytest
import torch
from structured_places import Opaque, assert_law, build, count, layer, saved_bytes, site
from torch import nn

from trimtab.core.errors import ShapeMismatch
from trimtab.core.kinds import EmbeddingSite
from trimtab.kernels.rotation import cayley, neumann, rotate, skew, turn
from trimtab.methods.reparameterized.oft import OFT

D = torch.float64


def test_worked_rotation():
    """b = 2, q = t: R = (I - Q)(I + Q)^{-1} turns by the angle -2 atan t as a matrix acting on rows; t = 1 gives -90 degrees."""
    R = cayley(skew(torch.tensor([[1.0]], dtype=D), 2))[0]
    torch.testing.assert_close(R, torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=D))
    place = site(layer(1, 2, bias=False))
    adapter = build(OFT(block_size=2), place)
    with torch.no_grad():
        adapter.q.fill_(1.0)
        place.module.weight.copy_(torch.tensor([[10.0, 1.0]]))
    # x R = [x1, -x0], so y = 10 x1 - x0
    torch.testing.assert_close(adapter(torch.tensor([3.0, 4.0], dtype=D), place), torch.tensor([37.0], dtype=D))


def test_skew_is_the_upper_triangle_row_by_row():
    Q = skew(torch.tensor([[1.0, 2.0, 3.0]]), 3)[0]
    assert torch.equal(Q, torch.tensor([[0.0, 1.0, 2.0], [-1.0, 0.0, 3.0], [-2.0, -3.0, 0.0]]))


@pytest.mark.parametrize("opaque", [False, True])
@pytest.mark.parametrize(
    "config",
    [OFT(block_size=4), OFT(blocks=2), OFT(block_size=2, block_share=True), OFT(block_size=4, neumann=5),
     OFT(block_size=4, eps=0.05)],
)
def test_law(config, opaque):
    place = site(layer(10, 12))
    assert_law(build(config, place), Opaque(place) if opaque else place)


def test_geometry_of_the_neurons_is_kept():
    place = site(layer(10, 12))
    for config in (OFT(block_size=4), OFT(block_size=3, block_share=True), OFT(blocks=2, eps=0.3)):
        W = build(config, place, move=1.0).weight(place.weight)
        assert not torch.allclose(W, place.weight)
        torch.testing.assert_close(W @ W.t(), place.weight @ place.weight.t())


def test_starts_at_the_base_to_the_bit():
    place = site(layer(6, 8, dtype=torch.float32))
    x = torch.randn(5, 8)
    for neumann_terms in (None, 5):
        assert torch.equal(build(OFT(block_size=4, neumann=neumann_terms), place, move=0)(x, place), place(x))


@pytest.mark.parametrize("terms", [3, 4, 5, 8])
def test_neumann_has_the_exact_sign_and_the_series_error(terms):
    """The cut series with top power K is |Q|^K away from the exact map, and far from its transpose."""
    torch.manual_seed(0)
    Q = skew(torch.randn(3, 6, dtype=D), 4)
    Q = 0.2 * Q / torch.linalg.matrix_norm(Q, 2)[:, None, None]
    exact = cayley(Q)
    error = torch.linalg.matrix_norm(neumann(Q, terms) - exact, 2)
    torch.testing.assert_close(error, torch.full((3,), 0.2 ** (terms - 1), dtype=D))
    assert (torch.linalg.matrix_norm(neumann(Q, terms) - exact.transpose(1, 2), 2) > 0.3).all()
    powers = [torch.linalg.matrix_power(-Q, k) for k in range(terms)]
    torch.testing.assert_close(neumann(Q, terms), powers[0] + 2 * sum(powers[1:-1]) + powers[-1])


def test_coft_keeps_the_ball():
    place = site(layer(10, 12))
    adapter = build(OFT(block_size=4, eps=0.05), place, move=1.0)
    limit = 0.05 / 3**0.5
    R = adapter.maker.blocks(adapter.q)[0]
    Q = torch.linalg.solve(torch.eye(4, dtype=D) + R, torch.eye(4, dtype=D) - R)
    torch.testing.assert_close(Q.flatten(1).norm(dim=1), torch.full((3,), limit, dtype=D))
    inside = build(OFT(block_size=4, eps=100.0), place)
    free = build(OFT(block_size=4), place)
    torch.testing.assert_close(inside.weight(place.weight), free.weight(place.weight))
    start = build(OFT(block_size=4, eps=0.05), place, move=0)
    start(torch.randn(2, 12, dtype=D), place).sum().backward()
    assert torch.isfinite(start.q.grad).all() and start.q.grad.abs().max() > 0


@pytest.mark.parametrize("config", [OFT(block_size=3), OFT(block_size=3, block_share=True), OFT(block_size=3, neumann=5, eps=0.2)])
def test_kernel_gradcheck_and_plain_form(config):
    place = site(layer(4, 6))
    adapter = build(config, place)
    x = torch.randn(2, 2, 6, dtype=D, requires_grad=True)
    made = adapter.maker.blocks(adapter.q)[0]
    torch.testing.assert_close(
        rotate(x, adapter.maker, adapter.q), x @ torch.block_diag(*made.expand(6 // 3, 3, 3)).detach()
    )
    torch.testing.assert_close(turn(x.reshape(-1, 6), made, 0).view(x.shape), rotate(x, adapter.maker, adapter.q))
    assert torch.autograd.gradcheck(lambda x, q: rotate(x, adapter.maker, q), (x, adapter.q))


def test_many_rows_run_in_pieces(monkeypatch):
    monkeypatch.setattr("trimtab.kernels.rotation._RUN", 1)
    place = site(layer(10, 12))
    assert_law(build(OFT(block_size=4), place), place, tokens=(150,))  # pieces of 64, 64 and 22 rows


def test_an_embedding_rotates_its_vectors():
    module = nn.Embedding(7, 6, dtype=D).requires_grad_(False)
    place = EmbeddingSite(module=module, path="e", tensor="weight", shape=(6, 7), dtype=D, adapter_dtype=D)
    adapter = build(OFT(block_size=3), place)
    tokens = torch.tensor([[0, 3], [6, 3]])
    torch.testing.assert_close(adapter(tokens, place), place.apply(tokens, adapter.weight(place.weight)))
    W = adapter.weight(place.weight)
    torch.testing.assert_close(W.t() @ W, place.weight.t() @ place.weight)


def test_count():
    assert count(OFT(blocks=32)) == 8_171_520
    assert count(OFT(block_size=32, block_share=True), (((64, 96), 1),)) == 32 * 31 // 2


def test_saves_the_input_alone():
    place = site(layer(20, 24, dtype=torch.float32))
    adapter = build(OFT(block_size=4), place)
    x = torch.randn(10, 24, requires_grad=True)
    constants = (place.module.weight, place.module.bias, *adapter.parameters())
    assert saved_bytes(lambda: adapter(x, place), *constants) == x.numel() * 4


def test_dropout_puts_blocks_back():
    place = site(nn.Linear(40, 40, bias=False, dtype=D))
    with torch.no_grad():
        place.module.weight.copy_(torch.eye(40))
    adapter = build(OFT(block_size=2, dropout=0.5), place, move=1.0).train()
    x = torch.randn(40, dtype=D)
    torch.manual_seed(0)
    moved = (adapter(x, place) - x).view(20, 2).abs().amax(1) > 1e-9
    assert 3 < moved.sum() < 17
    rotated = rotate(x, adapter.maker, adapter.q)
    torch.testing.assert_close(adapter.eval()(x, place), rotated)


@pytest.mark.parametrize(
    "p", [{"block_size": 0}, {"block_size": 4, "blocks": 2}, {"block_size": 1}, {"neumann": 2}, {"eps": 0.0},
          {"dropout": 1.0}, {"block_share": True, "dropout": 0.1}]
)
def test_bad_hyperparameters(p):
    with pytest.raises(ShapeMismatch):
        OFT(**p)


@pytest.mark.parametrize(
    ("config", "message"),
    [(OFT(block_size=32), r"block_size=32 .* width 12 .* 12"), (OFT(block_size=5), "4 and 6"),
     (OFT(blocks=5), "blocks=5 .* 4 and 6"),
     (OFT(blocks=12), "at most 6")],
)
def test_sizes_that_do_not_fit_name_the_nearest(config, message):
    with pytest.raises(ShapeMismatch, match=message):
        OFT.adapter_class.check(config, site(nn.Linear(12, 4)))
