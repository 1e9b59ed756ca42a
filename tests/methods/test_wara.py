"""WaRA: worked numbers, the literal transform, spectrum, Haar's Kronecker form, counts, memory, bad input (arXiv 2506.24092 v1)."""

from __future__ import annotations

import pytest
import torch
from structured_places import Opaque, assert_law, build, count, gradients, layer, site
from torch import Tensor, nn

import trimtab as tt
from trimtab.core.account import saved_bytes
from trimtab.core.errors import ShapeMismatch, Unsupported
from trimtab.kernels.wavelet import WAVELETS
from trimtab.methods.reparameterized.wara import WaRA

D = torch.float64
ORTHONORMAL = [name for name, wavelet in WAVELETS.items() if wavelet.orthonormal]


def circle(taps: tuple[float, ...], n: int) -> Tensor:
    """Rows of the periodic transform (n/2, n), entry by entry."""
    M = torch.zeros(n // 2, n, dtype=D)
    for k in range(n // 2):
        for i, tap in enumerate(taps):
            M[k, (2 * k + i + 1 - len(taps) // 2) % n] += tap
    return M


def line(taps: tuple[float, ...], n: int) -> Tensor:
    """Rows of the transform of n samples with zeros around them: every coefficient that meets a sample."""
    first = -(len(taps) // 2)
    M = torch.zeros((n + 1) // 2 - first, n, dtype=D)
    for k in range(M.shape[0]):
        for i, tap in enumerate(taps):
            if 0 <= 2 * (k + first) + i < n:
                M[k, 2 * (k + first) + i] += tap
    return M


def literal(X: Tensor, a: Tensor, b: Tensor, name: str) -> Tensor:
    """The paper's path on X (in, tokens): 2-D transform, the pair on every band, inverse transform; (out, tokens)."""
    w, total = WAVELETS[name], 0
    for p in range(2):
        for q in range(2):
            C = circle(w.analysis[p], X.shape[0]) @ X @ line(w.analysis[q], X.shape[1]).t()
            total = total + circle(w.synthesis[p], 2 * b.shape[0]).t() @ (b @ a @ C) @ line(w.synthesis[q], X.shape[1])
    return total


def update(adapter: tt.Reparameterization) -> Tensor:
    return adapter.weight(torch.zeros(adapter.site.shape, dtype=D))


def worked(wavelet: str) -> Tensor:
    adapter = build(WaRA(rank=1, wavelet=wavelet), site(layer(6, 4)))
    with torch.no_grad():
        adapter.a.copy_(torch.tensor([[1.0, 2.0]]))
        adapter.b.copy_(torch.tensor([[3.0], [1.0], [-1.0]]))
    return update(adapter)


def test_worked_example_haar():
    want = [[3, 0, 6, 0], [0, 3, 0, 6], [1, 0, 2, 0], [0, 1, 0, 2], [-1, 0, -2, 0], [0, -1, 0, -2]]
    torch.testing.assert_close(worked("haar"), torch.tensor(want, dtype=D))


def test_worked_example_db2():
    want = [
        [1.75, 3.0311, 4.25, 2.1651], [-2.1651, 2.75, -0.4330, 4.75], [2.25, -0.4330, 2.25, -2.1651],
        [-1.2990, 0.25, -1.2990, 1.25], [-0.25, -1.2990, -1.25, -1.2990], [2.1651, 0.75, 3.0311, -0.75],
    ]  # fmt: skip
    torch.testing.assert_close(worked("db2"), torch.tensor(want, dtype=D), atol=5e-5, rtol=0)


@pytest.mark.parametrize("k", [1, 7, 8, 13])
@pytest.mark.parametrize("name", WAVELETS)
def test_literal_transform_of_channels_and_tokens_is_the_static_update(name, k):
    adapter = build(WaRA(rank=3, wavelet=name), site(layer(16, 12)))
    X = torch.randn(12, k, dtype=D)
    torch.testing.assert_close(update(adapter) @ X, literal(X, adapter.a, adapter.b, name), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", WAVELETS)
def test_rank_and_spectrum(name):
    adapter = build(WaRA(rank=3, wavelet=name), site(layer(16, 12)))
    dW, core = update(adapter), adapter.b @ adapter.a
    assert torch.linalg.matrix_rank(dW) == 6
    if name in ORTHONORMAL:
        twice = torch.linalg.svdvals(core)[:3].repeat_interleave(2)
        torch.testing.assert_close(torch.linalg.svdvals(dW)[:6], twice, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(dW.square().sum(), 2 * core.square().sum())


def test_independent_bands_reach_four_times_the_rank():
    adapter = build(WaRA(rank=2, wavelet="db2", bands="independent"), site(layer(16, 20)))
    dW, w = update(adapter), WAVELETS["db2"]
    assert torch.linalg.matrix_rank(dW) == 8
    for i, (p, q) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
        coefficients = circle(w.analysis[p], 16) @ dW @ circle(w.analysis[q], 20).t()
        torch.testing.assert_close(coefficients, adapter.b[i] @ adapter.a[i], atol=1e-12, rtol=1e-12)


def test_coefficients_of_the_update_are_the_pair_on_the_diagonal():
    adapter, w = build(WaRA(rank=2, wavelet="sym4"), site(layer(16, 20))), WAVELETS["sym4"]
    dW, core = update(adapter), adapter.b @ adapter.a
    for p in range(2):
        for q in range(2):
            coefficients = circle(w.analysis[p], 16) @ dW @ circle(w.analysis[q], 20).t()
            torch.testing.assert_close(coefficients, core if p == q else torch.zeros_like(core), atol=1e-12, rtol=0)


def test_haar_is_a_kronecker_product_with_two_identical_halves():
    adapter = build(WaRA(rank=3), place := site(layer(8, 12, bias=False)))
    dW = update(adapter)
    torch.testing.assert_close(dW, torch.kron(adapter.b @ adapter.a, torch.eye(2, dtype=D)))
    swap = lambda n: torch.arange(n).view(-1, 2).flip(1).reshape(-1)  # noqa: E731
    torch.testing.assert_close(dW[swap(8)][:, swap(12)], dW)
    x = torch.randn(5, 12, dtype=D)
    odd = x.clone()
    odd[:, 1::2] += 1
    change = lambda x: adapter(x, place) - place(x)  # noqa: E731
    torch.testing.assert_close(change(odd)[:, 0::2], change(x)[:, 0::2])
    assert not torch.allclose(change(odd)[:, 1::2], change(x)[:, 1::2])


@pytest.mark.parametrize("bands", ["shared", "independent"])
def test_start_and_first_gradients(bands):
    place = site(layer(8, 12, dtype=torch.float32))
    adapter = build(WaRA(rank=2, wavelet="db2", bands=bands), place, move=0)
    x = torch.randn(5, 12)
    y = adapter(x, place)
    torch.testing.assert_close(y, place(x), atol=1e-6, rtol=1e-6)
    assert torch.count_nonzero(adapter.b) == 0
    ga, gb = gradients(y, [adapter.a, adapter.b])
    assert torch.count_nonzero(ga) == 0
    assert torch.count_nonzero(gb) == gb.numel()


@pytest.mark.parametrize("name", WAVELETS)
def test_merging_keeps_the_output(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12)).eval()
    tt.attach(model, WaRA(rank=3, wavelet=name, alpha=1.5), targets="0")
    with torch.no_grad():
        for p in tt.parameters(model):
            p.add_(0.3 * torch.randn_like(p))
    x = torch.randn(9, 16)
    before, W = model(x), model[0]._parameters["weight"].clone()
    tt.merge(model, "default")
    assert not torch.equal(model[0]._parameters["weight"], W)
    torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-5)
    tt.unmerge(model, "default")
    assert torch.equal(model[0]._parameters["weight"], W)


@pytest.mark.parametrize("name", WAVELETS)
def test_folded_equals_unfolded_in_value_and_gradients(name):
    place = site(layer(16, 12))
    adapter = build(WaRA(rank=3, wavelet=name), place)
    x = torch.randn(7, 12, dtype=D, requires_grad=True)
    folded = adapter(x, place)
    unfolded = place(x) + literal(x.t(), adapter.a, adapter.b, name).t()
    torch.testing.assert_close(folded, unfolded, atol=1e-12, rtol=1e-12)
    inputs = [x, adapter.a, adapter.b]
    for got, want in zip(gradients(folded, inputs), gradients(unfolded, inputs), strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("opaque", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("fan_in", "out", "config"),
    [
        (12, 16, WaRA(rank=3, alpha=1.5)),
        (12, 8, WaRA(rank=4, wavelet="db4")),
        (13, 7, WaRA(rank=2, wavelet="db2", pad=True)),
        (12, 16, WaRA(rank=2, wavelet="bior2.2", bands="independent")),
    ],
)
def test_law(fan_in, out, config, bias, opaque):
    place = site(layer(out, fan_in, bias=bias))
    adapter = build(config, place)
    assert_law(adapter, Opaque(place) if opaque else place)
    b, a = adapter.factors()
    torch.testing.assert_close(b @ a, adapter.weight(place.weight) - place.weight)


def test_padding_is_one_more_channel_of_zeros_cut_off_again():
    adapter = build(WaRA(rank=2, pad=True), site(layer(7, 13)))
    assert adapter.a.shape == (2, 7) and adapter.b.shape == (4, 2)
    whole = torch.kron(adapter.b @ adapter.a, torch.eye(2, dtype=D))
    torch.testing.assert_close(update(adapter), whole[:7, :13])


def test_pointwise_convolution():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 12, 1, dtype=D))
    tt.attach(model, WaRA(rank=2, wavelet="db2"), targets="0")
    with torch.no_grad():
        for p in tt.parameters(model):
            p.add_(torch.randn_like(p))
    x = torch.randn(2, 8, 5, 5, dtype=D)
    dense = tt.effective_weight(model, "0").to(D)
    want = nn.functional.conv2d(x, dense.view(12, 8, 1, 1), model[0]._parameters["bias"])
    torch.testing.assert_close(model(x), want, atol=1e-6, rtol=1e-6)


def test_counts():
    assert count(WaRA(rank=8), (((768, 768), 1),)) == 6_144
    vit = (((768, 768), 4 * 12), ((3072, 768), 12), ((768, 3072), 12))
    assert count(WaRA(rank=8), vit) == 663_552
    assert count(WaRA(rank=8, bands="independent"), (((768, 768), 1),)) == 2 * 8 * (768 + 768)
    assert count(WaRA(rank=8)) * 2 == count(tt.LoRA(rank=8))


def test_equal_norm_scale():
    """Divided by sqrt 2, the update has the norm of LoRA's with the same pair."""
    adapter = build(WaRA(rank=4, alpha=4 / 2**0.5, wavelet="db3"), site(layer(12, 16)))
    torch.testing.assert_close(update(adapter).norm(), (adapter.b @ adapter.a).norm())


def test_keeps_what_a_lora_of_twice_the_rank_keeps():
    place, tokens, r = site(layer(96, 64, dtype=torch.float32)), 128, 2
    x = torch.randn(tokens, 64, requires_grad=True)
    kept = {}
    for config in (WaRA(rank=r, wavelet="db2"), tt.LoRA(rank=2 * r)):
        adapter = build(config, place)
        with saved_bytes(place.module, adapter, beside=(x,)) as saved:
            adapter(x, place)
        kept[type(config).__name__] = saved.total
    assert kept["LoRA"] == 4 * tokens * 2 * r
    assert kept["WaRA"] == kept["LoRA"] + 4 * 2 * r * (96 + 64)


def test_half_precision_folds_in_float32():
    """Half factors through db4: the result is that of float32 factors of the same values."""
    place = site(layer(16, 12, dtype=torch.float16))
    half = build(WaRA(rank=2, wavelet="db4"), place)
    b, a = half.folded()
    assert half.a.dtype == torch.float16 and a.dtype == b.dtype == torch.float32
    w = WAVELETS["db4"]
    want = torch.cat([half.a.double() @ circle(taps, 12) for taps in w.analysis])
    torch.testing.assert_close(a.double(), want, atol=1e-6, rtol=1e-6)
    assert half(torch.randn(3, 12).half(), place).dtype == torch.float16


def test_dropout_drops_inputs_of_the_update_alone():
    place = site(layer(6, 8, bias=False))
    adapter = build(WaRA(rank=2, dropout=0.5), place)
    x = torch.ones(4000, 8, dtype=D)
    adapter.train()
    torch.manual_seed(0)
    dropped = adapter(x, place)
    assert not torch.allclose(dropped[0], dropped[1])
    adapter.eval()
    torch.testing.assert_close(dropped.mean(0), adapter(x, place)[0], atol=0.05, rtol=0)


@pytest.mark.parametrize("p", [{"rank": 0}, {"alpha": 0.0}, {"bands": "gated"}, {"dropout": 1.0}])
def test_bad_hyperparameters(p):
    with pytest.raises(ShapeMismatch):
        WaRA(**p)


def test_unknown_wavelet_lists_the_known_ones():
    with pytest.raises(ShapeMismatch, match=r"haar, db2, db3, db4, sym4, bior2\.2, found 'coif9'"):
        WaRA(wavelet="coif9")


@pytest.mark.parametrize(
    ("shape", "config", "match"),
    [
        ((8, 13), WaRA(rank=2), r"fc has 13 inputs, an odd number"),
        ((7, 12), WaRA(rank=2), r"fc has 7 outputs, an odd number"),
        ((6, 12), WaRA(rank=2, wavelet="db4"), r"the 8 taps of db4 are longer than the 6 outputs"),
        ((8, 12), WaRA(rank=5), r"2 times the rank 5 .* at most 4"),
    ],
)
def test_bad_shapes_name_the_numbers(shape, config, match):
    with pytest.raises(ShapeMismatch, match=match):
        WaRA.adapter_class.check(config, site(layer(*shape)))


def test_convolutions_with_a_kernel_and_embeddings_are_refused():
    model = nn.ModuleDict({"conv": nn.Conv2d(8, 8, 3), "table": nn.Embedding(8, 8)})
    with pytest.raises(Unsupported, match=r"kernel of \(3, 3\)"):
        tt.attach(model, WaRA(rank=2), targets="conv")
    with pytest.raises(Unsupported, match="embedding"):
        tt.attach(model, WaRA(rank=2), targets="table")
