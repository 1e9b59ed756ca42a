"""WaRA on patch tokens: collapse to LoRA, projectors, shifts, TinyWaRA, counts, memory, bad input (arXiv 2506.24092 v2)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import trimtab as tt
from trimtab.core.account import saved_bytes
from trimtab.core.errors import NotMergeable, ShapeMismatch, Unsupported
from trimtab.kernels.wavelet import WAVELETS
from trimtab.methods.additive.wara_spatial import TinyWaRA, WaRASpatial

D = torch.float64


def attached(config: WaRASpatial, *, out: int = 12, fan_in: int = 16, dtype: torch.dtype = D, moved: bool = True):
    """``(model, adapter)``: one Linear; ``moved``: parameters other than the gates a random step from their start."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(fan_in, out, dtype=dtype))
    tt.attach(model, config, targets="0", rng=torch.Generator().manual_seed(0))
    adapter = next(m for m in model.modules() if isinstance(m, tt.ActivationAdapter))
    if moved:
        with torch.no_grad():
            for name, p in adapter.named_parameters():
                if name != "g":
                    p.add_(torch.randn_like(p))
    return model, adapter


def gates(adapter: nn.Module, *values: float) -> None:
    with torch.no_grad():
        adapter.g.copy_(torch.tensor(values))


def change(model: nn.Module, x: Tensor) -> Tensor:
    return model(x) - F.linear(x, model[0]._parameters["weight"], model[0]._parameters["bias"])


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("name", WAVELETS)
def test_equal_gates_and_no_activation_are_a_lora(name, prefix):
    model, adapter = attached(WaRASpatial(rank=3, alpha=1.5, wavelet=name, grid=(8, 10), prefix=prefix))
    x = torch.randn(2, prefix + 80, 16, dtype=D)
    want = 0.5 * x @ adapter.a.t() @ adapter.b.t()
    torch.testing.assert_close(change(model, x), want, atol=1e-12, rtol=1e-12)
    with torch.no_grad():
        adapter.g.mul_(2)
    torch.testing.assert_close(change(model, x)[:, prefix:], 2 * want[:, prefix:], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(change(model, x)[:, :prefix], want[:, :prefix], atol=1e-12, rtol=1e-12)


def test_the_coarse_haar_band_is_constant_on_every_group_of_patches():
    model, adapter = attached(WaRASpatial(rank=3, grid=(6, 8), prefix=1))
    gates(adapter, 1, 0, 0, 0)
    x = torch.randn(2, 49, 16, dtype=D)
    groups = change(model, x)[:, 1:].view(2, 3, 2, 4, 2, 12)
    mean = (x @ adapter.a.t() @ adapter.b.t())[:, 1:].view(2, 3, 2, 4, 2, 12).mean((2, 4), keepdim=True)
    torch.testing.assert_close(groups, mean.expand_as(groups))


@pytest.mark.parametrize("name", WAVELETS)
def test_bands_are_projectors_of_a_quarter_of_the_grid_each_and_sum_to_the_identity(name):
    model, adapter = attached(WaRASpatial(rank=1, wavelet=name))
    total = 0
    for band in range(4):
        gates(adapter, *(float(i == band) for i in range(4)))
        P = adapter.mix(torch.eye(196, dtype=D)[..., None])[..., 0]
        torch.testing.assert_close(P @ P, P, atol=1e-12, rtol=0)
        assert torch.linalg.matrix_rank(P) == 49
        if WAVELETS[name].orthonormal:
            torch.testing.assert_close(P, P.t(), atol=1e-12, rtol=0)
        total = total + P
    torch.testing.assert_close(total, torch.eye(196, dtype=D), atol=1e-12, rtol=0)


@pytest.mark.parametrize("act", ["none", "gelu"])
@pytest.mark.parametrize("axis", [1, 2])
def test_shifts_by_two_cells_commute_and_by_one_do_not(axis, act):
    model, adapter = attached(WaRASpatial(rank=2, wavelet="db2", grid=(6, 8), prefix=0, act=act))
    gates(adapter, 1.0, 0.5, -0.5, 2.0)
    x = torch.randn(2, 6, 8, 16, dtype=D)
    run = lambda x: model(x.flatten(1, 2)).view(2, 6, 8, 12)  # noqa: E731
    torch.testing.assert_close(run(x.roll(2, axis)), run(x).roll(2, axis))
    assert not torch.allclose(run(x.roll(1, axis)), run(x).roll(1, axis))


def test_the_transform_commutes_with_the_channels():
    """Down, transform, gate, inverse, up: the same as the transform of all input channels."""
    model, adapter = attached(WaRASpatial(rank=2, wavelet="sym4", grid=(8, 8), prefix=0))
    gates(adapter, 1.0, 0.5, -0.5, 2.0)
    x = torch.randn(3, 64, 16, dtype=D)
    torch.testing.assert_close(change(model, x), adapter.mix(x) @ adapter.a.t() @ adapter.b.t(), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("config", [WaRASpatial(rank=2), WaRASpatial(rank=2, act="gelu", bands="shared"), TinyWaRA(rank=3)])
def test_start_and_first_gradients(config):
    model, adapter = attached(config, moved=False)
    x = torch.randn(2, 197, 16, dtype=D)
    y = model(x)
    assert torch.equal(y, F.linear(x, model[0]._parameters["weight"], model[0]._parameters["bias"]))
    y.square().sum().backward()
    late = adapter.core if isinstance(config, TinyWaRA) else adapter.b
    assert torch.count_nonzero(late.grad) == late.numel()
    others = [p.grad for p in adapter.parameters() if p is not late]
    assert others and all(torch.count_nonzero(g) == 0 for g in others)


def test_tiny_wara_learns_between_singular_vectors():
    model, adapter = attached(TinyWaRA(rank=3, grid=(4, 4), prefix=0))
    U, S, Vh = torch.linalg.svd(model[0]._parameters["weight"].detach())
    x = torch.randn(2, 16, 16, dtype=D)
    with torch.no_grad():
        adapter.core.copy_(torch.eye(3, dtype=D))
    want = x @ ((U[:, :3] * S[:3]) @ Vh[:3]).t()
    torch.testing.assert_close(change(model, x), want, atol=1e-12, rtol=1e-12)


def test_counts():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(768, 768), nn.Linear(768, 3072))
    for config, want in (
        (WaRASpatial(rank=8), 8 * (768 + 768) + 4 + 8 * (768 + 3072) + 4),
        (WaRASpatial(rank=8, bands="shared", act="gelu"), 8 * (768 + 768) + 8 * (768 + 3072)),
        (TinyWaRA(rank=16), 2 * (16 * 16 + 4)),
    ):
        tt.attach(model, config, targets=["0", "1"])
        assert sum(p.numel() for p in tt.parameters(model)) == want
        tt.detach(model, "default")


def test_keeps_thin_features_beside_the_input():
    x, thin = torch.randn(4, 64, 16, requires_grad=True), 4 * 4 * 64 * 2
    kept = {}
    for config in (WaRASpatial(rank=2, grid=(8, 8), prefix=0), TinyWaRA(rank=2, grid=(8, 8), prefix=0)):
        model, _ = attached(config, dtype=torch.float32)
        with saved_bytes(model, beside=(x,)) as saved:
            model(x)
        kept[type(config).__name__] = saved.total
    grid = 4 * 64  # the gates' grid
    assert kept["WaRASpatial"] == 2 * thin + grid  # coefficients, mixed features
    assert kept["TinyWaRA"] == 2 * thin + grid  # features before the core, coefficients


def test_it_does_not_merge():
    model, _ = attached(WaRASpatial(rank=2))
    with pytest.raises(NotMergeable):
        tt.merge(model, "default")


@pytest.mark.parametrize(
    "p",
    [
        {"rank": 0}, {"grid": (7, 8)}, {"grid": (14,)}, {"grid": (6, 14), "wavelet": "db4"}, {"prefix": -1}, {"act": "relu"},
        {"bands": "independent"}, {"wavelet": "db99"}, {"alpha": 0.0},
    ],
)  # fmt: skip
def test_bad_hyperparameters(p):
    with pytest.raises(ShapeMismatch):
        WaRASpatial(**p)


def test_a_wrong_number_of_tokens_is_named():
    model, _ = attached(WaRASpatial(rank=2))
    with pytest.raises(ShapeMismatch, match=r"got 196 tokens, .* grid of 14 x 14 patches make 197"):
        model(torch.randn(1, 196, 16, dtype=D))


def test_other_modules_are_refused():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2, 16, batch_first=True), 1, enable_nested_tensor=False)
    with pytest.raises(Unsupported, match="acts on Linear layers.*LayerNorm"):
        tt.attach(model, WaRASpatial(rank=2), targets="layers.0.norm1")


def test_a_part_of_a_fused_layer_is_refused():
    """``attn.q`` of a fused qkv has no activations of its own: the whole layer would learn, silently."""
    from transformers import GPT2Config, GPT2Model

    model = GPT2Model(GPT2Config(n_embd=12, n_head=2, n_layer=1, vocab_size=10, n_positions=8))
    with pytest.raises(tt.Unsupported, match="rows of the fused layer"):
        tt.attach(model, tt.WaRASpatial(rank=2, grid=(2, 2), prefix=0), targets="attn.q")
