"""The same factors in, the same output and gradients out, as peft's layers of these methods.

Where peft differs on purpose or by mistake, the test says so: DoRA with dropout (peft drops the input of W too), PiSSA and
OLoRA (peft writes the residual into the base; here W stays), AdaLoRA's divisor (kept), LoRA-GA's start (``form="peft"``).
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from trimtab.core.contracts import Adapter

peft = pytest.importorskip("peft")

OUT, IN, R = 12, 16, 4


def base(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(IN, OUT, bias=bias, dtype=torch.float64))


def theirs(model: nn.Module, config) -> tuple[nn.Module, nn.Module]:
    model = peft.inject_adapter_in_model(config, copy.deepcopy(model)).double()
    return model, model[0]


def ours(model: nn.Module, config: tt.MethodConfig, **more) -> tuple[nn.Module, Adapter]:
    model = copy.deepcopy(model)
    tt.attach(model, config, targets="0", rng=torch.Generator().manual_seed(1), **more)
    return model, next(m for m in model.modules() if isinstance(m, Adapter))


def tie(pairs: list[tuple[Tensor, Tensor]], *, keep: bool = False) -> None:
    """Random (or, with ``keep``, the present) values of ours into theirs."""
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for mine, other in pairs:
            if not keep:
                mine.copy_(0.5 * torch.randn(mine.shape, generator=g, dtype=torch.float64))
            other.copy_(mine.view(other.shape))


def same(mine: nn.Module, other: nn.Module, pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Output, input gradient and parameter gradients agree."""
    g = torch.Generator().manual_seed(5)
    x = torch.randn(2, 7, IN, generator=g, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(2, 7, OUT, generator=g, dtype=torch.float64)
    y, z = mine(x), other(x)
    torch.testing.assert_close(y, z)
    grads = torch.autograd.grad(y, [x, *(a for a, _ in pairs)], dy)
    for a, b in zip(grads, torch.autograd.grad(z, [x, *(b for _, b in pairs)], dy), strict=True):
        torch.testing.assert_close(a, b.view(a.shape))


def lora_pairs(adapter: Adapter, layer: nn.Module) -> list[tuple[Tensor, Tensor]]:
    return [(adapter.a, layer.lora_A["default"].weight), (adapter.b, layer.lora_B["default"].weight)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("config", "flags"),
    [
        (tt.LoRA(rank=R, alpha=6), {}),
        (tt.RsLoRA(rank=R, alpha=6), {"use_rslora": True}),
        (tt.DoRA(rank=R, alpha=6), {"use_dora": True}),
    ],
    ids=["LoRA", "RsLoRA", "DoRA"],
)
def test_lora_family(config, flags, bias):
    model = base(bias)
    other, layer = theirs(model, peft.LoraConfig(r=R, lora_alpha=6, target_modules=["0"], **flags))
    mine, adapter = ours(model, config)
    pairs = lora_pairs(adapter, layer)
    tie(pairs)
    if "use_dora" in flags:
        magnitude = (adapter.m, layer.lora_magnitude_vector["default"].weight)
        torch.testing.assert_close(*magnitude)
        with torch.no_grad():
            adapter.m.mul_(torch.linspace(0.5, 1.5, OUT))
        tie([magnitude], keep=True)
        pairs.append(magnitude)
    same(mine, other, pairs)
    tt.merge(mine, "default")
    layer.merge()
    torch.testing.assert_close(mine[0].weight, layer.base_layer.weight)


@pytest.mark.parametrize(
    ("config", "kind"), [(tt.PiSSA(rank=R, alpha=6), "pissa"), (tt.OLoRA(rank=R, alpha=6), "olora")]
)
def test_moved_starts(config, kind):
    """peft decomposes fp32 weights alone and overwrites them with the residual; so compare in fp32 precision."""
    model = base().float()
    W = model[0].weight.detach().clone()
    other = peft.inject_adapter_in_model(
        peft.LoraConfig(r=R, lora_alpha=6, target_modules=["0"], init_lora_weights=kind), copy.deepcopy(model)
    )
    layer = other[0]
    mine, adapter = ours(model, config)
    torch.testing.assert_close(adapter.b0 @ adapter.a0, (layer.lora_B["default"].weight @ layer.lora_A["default"].weight))
    assert torch.equal(mine[0].weight, W) and not torch.equal(layer.base_layer.weight, W)
    torch.testing.assert_close(layer.base_layer.weight + 1.5 * adapter.b0 @ adapter.a0, W)
    other, mine = other.double(), mine.double()
    pairs = lora_pairs(adapter, layer)
    tie(pairs)
    with torch.no_grad():  # theirs from the residual of our factors, exact in float64
        layer.base_layer.weight.copy_(W.double() - 1.5 * adapter.b0 @ adapter.a0)
    same(mine, other, pairs)


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
@pytest.mark.parametrize("size", ["stable", "weight_svd", "gd_scale", "unit"])
def test_loraga_peft_form_starts_where_pefts_does(direction, size):
    model = base().float()
    x = torch.randn(32, IN, generator=torch.Generator().manual_seed(2))
    loss = lambda m: m(x).square().mean()  # noqa: E731
    sub = peft.LoraGAConfig(direction=direction, scale=size, stable_gamma=16)
    config = peft.LoraConfig(
        r=R, lora_alpha=8, target_modules=["0"], init_lora_weights="lora_ga", lora_ga_config=sub, use_rslora=True
    )
    other = copy.deepcopy(model)
    peft.tuners.lora.preprocess_loraga(other, config, lambda: loss(other).backward())
    layer = peft.inject_adapter_in_model(config, other)[0]
    _, adapter = ours(model, tt.LoRAGA(rank=R, alpha=8, direction=direction, size=size, form="peft"), loss=loss)
    theirs_a, theirs_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    # the sign of a singular pair is arbitrary, and A and B come from different pairs; peft finds the weight's largest
    # singular value from a sketch of r columns without any to spare, to some tenths of a percent
    rtol = 1e-2 if size == "weight_svd" else 1e-3
    torch.testing.assert_close(adapter.a.abs(), theirs_a.abs(), atol=1e-4, rtol=rtol)
    torch.testing.assert_close(adapter.b.abs(), theirs_b.abs(), atol=1e-4, rtol=rtol)


def test_vera():
    model = base()
    wrapped = nn.ModuleDict({"0": copy.deepcopy(model[0])})
    config = peft.VeraConfig(r=R, target_modules=["0"], projection_prng_key=3)
    layer = peft.get_peft_model(wrapped, config).double().base_model.model["0"]
    mine, adapter = ours(model, tt.VeRA(rank=R, seed=3))
    A, B = layer.vera_A["default"], layer.vera_B["default"]
    torch.testing.assert_close(adapter.A, A, atol=1e-6, rtol=0)  # equal seeds, equal projections
    torch.testing.assert_close(adapter.B, B, atol=1e-6, rtol=0)
    A.copy_(adapter.A), B.copy_(adapter.B)
    pairs = [(adapter.d, layer.vera_lambda_d["default"]), (adapter.e, layer.vera_lambda_b["default"])]
    tie(pairs)
    same(mine, layer, pairs)


def test_adalora():
    model = base()
    config = peft.AdaLoraConfig(init_r=R, lora_alpha=6, target_modules=["0"], total_step=100)
    wrapped = peft.get_peft_model(nn.ModuleDict({"0": copy.deepcopy(model[0])}), config).double()
    layer = wrapped.base_model.model["0"]
    mine, adapter = ours(model, tt.AdaLoRA(rank=R, alpha=6))
    pairs = [
        (adapter.q, layer.lora_A["default"]),
        (adapter.e, layer.lora_E["default"]),
        (adapter.p, layer.lora_B["default"]),
    ]
    tie(pairs)
    same(mine, layer, pairs)
    eye = torch.eye(R, dtype=torch.float64)
    expected = sum((g - eye).norm() for g in (layer.lora_B["default"].mT @ layer.lora_B["default"],
                                              layer.lora_A["default"] @ layer.lora_A["default"].mT))
    torch.testing.assert_close(adapter.orthogonality(), expected)


def test_lora_on_convolution_and_embedding():
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(3, OUT, 3, padding=1, stride=2, dtype=torch.float64))
    other, layer = theirs(conv, peft.LoraConfig(r=R, lora_alpha=6, target_modules=["0"]))
    mine, adapter = ours(conv, tt.LoRA(rank=R, alpha=6))
    tie([(adapter.a, layer.lora_A["default"].weight), (adapter.b, layer.lora_B["default"].weight)])
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(mine(x), other(x))

    table = nn.Sequential(nn.Embedding(20, OUT, dtype=torch.float64))
    other, layer = theirs(table, peft.LoraConfig(r=R, lora_alpha=6, target_modules=["0"]))
    mine, adapter = ours(table, tt.LoRA(rank=R, alpha=6))
    tie([(adapter.a, layer.lora_embedding_A["default"]), (adapter.b, layer.lora_embedding_B["default"])])
    x = torch.randint(0, 20, (2, 5))
    torch.testing.assert_close(mine(x), other(x))
