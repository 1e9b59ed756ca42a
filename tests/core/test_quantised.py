"""Quantised bases: torchao int8 and int4 weight-only on the CPU, bitsandbytes where it works."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

import trimtab as tt
from trimtab.core import registry

WIDTH = 64


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 32)).to(torch.bfloat16)


def torchao(kind: str) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    from torchao.quantization.granularity import PerGroup

    model = net()
    config = (
        quantization.Int8WeightOnlyConfig()
        if kind == "int8"
        else quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    )
    quantization.quantize_(model, config)
    return model


def bitsandbytes(kind: str) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    model = net()
    for index in (0, 2):
        dense = model[index]
        if kind == "nf4":
            layer = bnb.nn.Linear4bit(dense.in_features, dense.out_features, compute_dtype=torch.bfloat16, quant_type="nf4")
            layer.weight = bnb.nn.Params4bit(dense.weight.data.clone(), requires_grad=False, quant_type="nf4")
        else:
            layer = bnb.nn.Linear8bitLt(dense.in_features, dense.out_features, has_fp16_weights=False)
            layer.weight = bnb.nn.Int8Params(dense.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
        layer.bias = nn.Parameter(dense.bias.data.clone())
        model[index] = layer.to("cpu")
    try:
        model(torch.randn(2, WIDTH, dtype=torch.bfloat16))
    except (RuntimeError, NotImplementedError) as error:  # the package's CPU kernels differ from build to build
        pytest.skip(f"bitsandbytes {kind} does not run on this machine: {error}")
    return model


BASES = [(torchao, "int8"), (torchao, "int4"), (bitsandbytes, "nf4"), (bitsandbytes, "int8")]
METHODS = [
    e
    for e in registry.entries()
    if e.adapter.__module__.startswith("trimtab.")
    and "linear" in e.adapter.kinds
    and e.adapter.tensors is None
    and issubclass(e.adapter, tt.Reparameterization)
    and not issubclass(e.adapter, tt.Selection)
    and not e.adapter.needs_gradient
]


@pytest.mark.parametrize("entry", METHODS, ids=lambda e: e.name)
@pytest.mark.parametrize(("make", "kind"), BASES, ids=lambda b: b if isinstance(b, str) else b.__name__)
def test_every_method_trains_on_a_quantised_base(entry, make, kind) -> None:
    """The output is that of a dense base with the dequantised weights, and a step lowers the loss."""
    model, x = make(kind), torch.randn(8, WIDTH, dtype=torch.bfloat16)
    twin = net()
    for index in (0, 2):
        site = tt.core.kinds.site_for(tt.core.selection.Place(str(index), model[index], None, None, None, None, None), "weight")
        with torch.no_grad():
            twin[index].weight.copy_(site.weight)
    config = entry.config(**(entry.tests[0] if entry.tests else {}))
    for each in (model, twin):
        tt.attach(each, config, targets=["0", "2"], rng=torch.Generator().manual_seed(1))
        rng = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for p in tt.parameters(each):
                p.add_(torch.randn(p.shape, generator=rng) * 0.05)
    # a sketch of the float32 values of an Int8Params and one of their bfloat16 roundings take different codes
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if "trimtab" in k}, strict=False)
    y, expected = model(x).float(), twin(x).float()
    assert (y - expected).norm() < 0.05 * expected.norm()
    before = copy.deepcopy([v for k, v in model.named_parameters() if "trimtab" not in k])
    optimizer = torch.optim.Adam(tt.parameters(model), lr=1e-2)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = (model(x).float() - 1).pow(2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = [v for k, v in model.named_parameters() if "trimtab" not in k]
    assert all(torch.equal(_values(a), _values(b)) for a, b in zip(before, after, strict=True))


def _values(stored: torch.Tensor) -> torch.Tensor:
    return stored.dequantize() if type(stored).__module__.startswith("torchao") else stored.data


@pytest.mark.parametrize(("make", "kind"), BASES[:3], ids=lambda b: b if isinstance(b, str) else b.__name__)
def test_merging_into_a_quantised_base_is_said_explicitly(make, kind) -> None:
    model, x = make(kind), torch.randn(8, WIDTH, dtype=torch.bfloat16)
    tt.attach(model, tt.LoRA(rank=4), targets=["0", "2"])
    with torch.no_grad():
        for p in tt.parameters(model):
            p.add_(torch.randn_like(p) * 0.05)
    adapted, stored = model(x), model[0].weight
    with pytest.raises(tt.NotMergeable, match="into="):
        tt.merge(model, "default")
    assert model[0].weight is stored
    for into in ("dequantised", "requantised"):
        if make is bitsandbytes and into == "dequantised":
            continue  # its module's forward insists on its own storage
        report = tt.merge(model, "default", into=into)
        bound = 0.01 if into == "dequantised" else 0.15
        assert all(row["output error"] < bound for row in report)
        assert (model(x) - adapted).float().norm() < 2 * bound * adapted.float().norm()
        tt.unmerge(model, "default")
        assert model[0].weight is stored
        assert torch.equal(model(x), adapted)


def test_a_storage_registered_first_leaves_the_others_known() -> None:
    """In a fresh process: what a user (or a sketch) registers before the first look does not hide torchao's."""
    code = """
import torch, trimtab as tt
from trimtab.core.site import is_quantised, register_storage
from torchao.quantization import Int8WeightOnlyConfig, quantize_
register_storage(lambda t: False, lambda t, module: t)
model = torch.nn.Sequential(torch.nn.Linear(32, 32))
quantize_(model, Int8WeightOnlyConfig())
print(is_quantised(model[0].weight))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"]
