"""What the sample of a base's weights tells: the same base however it is stored passes, another one does not."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import trimtab as tt
from trimtab.core import fingerprint
from trimtab.core.checkpoint import _seal

WIDTH = 128


def base(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)), nn.Linear(WIDTH, 5))


def noisy(share: float, only: int | None = None) -> nn.Module:
    """The base with noise of ``share`` of each weight's size."""
    model = base()
    torch.manual_seed(7)
    with torch.no_grad():
        for i, layer in enumerate(model):
            if only in (None, i):
                layer.weight.add_(share * layer.weight.std() * torch.randn_like(layer.weight))
    return model


def torchao(model: nn.Module, kind: str) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    from torchao.quantization.granularity import PerGroup

    config = (
        quantization.Int8WeightOnlyConfig()
        if kind == "int8"
        else quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    )
    quantization.quantize_(model.bfloat16(), config, filter_fn=lambda m, path: isinstance(m, nn.Linear) and m.out_features > 5)
    return model


def bitsandbytes(model: nn.Module, kind: str) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    for index in range(4):
        dense = model[index]
        if kind == "int8":
            layer = bnb.nn.Linear8bitLt(WIDTH, WIDTH, has_fp16_weights=False)
            layer.weight = bnb.nn.Int8Params(dense.weight.data.half(), requires_grad=False, has_fp16_weights=False)
        else:
            layer = bnb.nn.Linear4bit(WIDTH, WIDTH, compute_dtype=torch.float32, quant_type=kind)
            layer.weight = bnb.nn.Params4bit(dense.weight.data.clone(), requires_grad=False, quant_type=kind)
        layer.bias = dense.bias
        model[index] = layer.to("cpu")
    return model


STORED = {
    "float32": lambda m: m,
    "bfloat16": lambda m: m.bfloat16(),
    "float16": lambda m: m.half(),
    "float64": lambda m: m.double(),
    "ao-int8": lambda m: torchao(m, "int8"),
    "ao-int4": lambda m: torchao(m, "int4"),
    "bnb-int8": lambda m: bitsandbytes(m, "int8"),
    "nf4": lambda m: bitsandbytes(m, "nf4"),
    "fp4": lambda m: bitsandbytes(m, "fp4"),
}
DENSE = ("float32", "bfloat16", "float16", "float64")


def saved(folder, model: nn.Module, *, old: bool = False):
    tt.attach(model, tt.LoRA(rank=2), targets=["0", "1", "2", "3"])
    tt.save(model, folder)
    if old:  # as manifests were before storages were noted
        file = folder / "manifest.json"
        manifest = json.loads(file.read_text())
        del manifest["base"]["storage"]
        manifest["base"]["samples"] = {k: [round(x, 8) for x in v] for k, v in manifest["base"]["samples"].items()}
        file.write_text(json.dumps(manifest | {"seal": _seal(manifest)}))
    return folder


@pytest.mark.parametrize("then", STORED)
@pytest.mark.parametrize("old", [False, True], ids=["", "old"])
def test_the_same_base_passes_however_it_is_stored(then, old, tmp_path) -> None:
    folder = saved(tmp_path / "a", STORED[then](base()), old=old)
    for now in STORED:
        tt.load(STORED[now](base()), folder)


@pytest.mark.parametrize(("then", "now"), [(a, b) for a in DENSE[:3] for b in DENSE[:3]])
@pytest.mark.parametrize("share", [0.3, 0.1, 0.03])
def test_dense_weights_with_noise_are_another_base(then, now, share, tmp_path) -> None:
    folder = saved(tmp_path / "a", STORED[then](base()))
    with pytest.raises(tt.CheckpointMismatch, match="made for another base.*rounding"):
        tt.load(STORED[now](noisy(share)), folder)


def test_one_tuned_tensor_is_enough_to_be_another_base(tmp_path) -> None:
    folder = saved(tmp_path / "a", base())
    with pytest.raises(tt.CheckpointMismatch, match="32 of 128 sampled values.*first in 2.weight"):
        tt.load(noisy(0.002, only=2), folder)


@pytest.mark.parametrize("then", STORED)
@pytest.mark.parametrize("now", STORED)
@pytest.mark.parametrize("old", [False, True], ids=["", "old"])
def test_thirty_percent_of_noise_is_another_base_in_every_storage(then, now, old, tmp_path) -> None:
    folder = saved(tmp_path / "a", STORED[then](base()), old=old)
    with pytest.raises(tt.CheckpointMismatch, match="made for another base"):
        tt.load(STORED[now](noisy(0.3)), folder)
    with pytest.raises(tt.CheckpointMismatch, match="made for another base"):
        tt.load(STORED[now](base(1)), folder)


@pytest.mark.parametrize("kind", ["ao-int8", "ao-int4", "bnb-int8", "nf4", "fp4"])
def test_two_bases_in_the_same_storage_are_told_apart_more_finely(kind, tmp_path) -> None:
    folder = saved(tmp_path / "a", STORED[kind](base()))
    with pytest.raises(tt.CheckpointMismatch, match="explain 3 %"):
        tt.load(STORED[kind](noisy(0.1)), folder)


def test_what_the_adapter_replaces_may_be_anything(tmp_path) -> None:
    """A head that is drawn anew in every process belongs to the adapter."""
    model = base()
    tt.attach(model, tt.LoRA(rank=2), targets=["0", "1"])
    tt.attach(model, tt.Unfreeze(), targets="4")
    tt.save(model, tmp_path / "a")
    samples = json.loads((tmp_path / "a" / "manifest.json").read_text())["base"]["samples"]
    assert set(samples) == {"0.weight", "1.weight"}
    fresh = base()
    fresh[4].reset_parameters()
    tt.load(fresh, tmp_path / "a")
    x = torch.randn(3, WIDTH)
    assert torch.equal(fresh(x), model(x))


def test_an_adapter_that_only_replaces_is_checked_by_the_blocks(tmp_path) -> None:
    from small_net import net

    model = net()
    tt.attach(model, tt.NormTuning())
    tt.save(model, tmp_path / "a")
    tt.load(net(), tmp_path / "a")
    with pytest.raises(tt.CheckpointMismatch, match="another base"):
        tt.load(net(seed=1), tmp_path / "a")


def test_every_part_of_a_deep_model_is_sampled() -> None:
    deep = nn.Sequential(*(nn.Linear(4, 4) for _ in range(60)))
    tt.attach(deep, tt.LoRA(rank=1), targets=[str(i) for i in range(60)])
    group = deep.__dict__["_trimtab_state"].groups["default"]
    taken = fingerprint.take(deep, group.adapters)["samples"]
    assert len(taken) == 32 and "0.weight" in taken and "59.weight" in taken


def test_merged_adapters_are_no_other_base(tmp_path) -> None:
    folder = saved(tmp_path / "a", base())
    model = base()
    tt.attach(model, tt.LoRA(rank=2), targets=["0"], name="other")
    with torch.no_grad():
        for p in tt.parameters(model):
            p.add_(torch.ones_like(p))
    tt.merge(model, "other")
    tt.load(model, folder)


def test_a_compressed_file_is_checked_unless_it_is_said_not_to(tmp_path) -> None:
    model = base()
    tt.attach(model, tt.LoRA(rank=2), targets=["0", "1", "2", "3"])
    with torch.no_grad():
        for p in tt.parameters(model):
            p.add_(0.1 * torch.randn_like(p))
    tt.save(model, tmp_path / "a")
    tt.compress(tmp_path / "a", tmp_path / "a.tern")
    for kind in STORED:
        tt.load(STORED[kind](base()), tmp_path / "a.tern")
    for other in (noisy(0.3), noisy(0.03), base(1)):
        with pytest.raises(tt.CheckpointMismatch, match="another base"):
            tt.load(copy.deepcopy(other), tmp_path / "a.tern")
        assert tt.load(other, tmp_path / "a.tern", check_base=False) == "default"
