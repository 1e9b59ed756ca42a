"""Adapters written for diffusers, read by diffusers' own loaders on a tiny UNet."""

from __future__ import annotations

import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import trimtab as tt

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore")

INPUTS = (torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3]), torch.ones(1, 5, 32))


def unet() -> nn.Module:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(32, 64), cross_attention_dim=32, attention_head_dim=8,
        norm_num_groups=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip


@torch.no_grad()
def run(model: nn.Module) -> torch.Tensor:
    return model(*INPUTS).sample


def trained(method, targets=("to_q", "to_out.0", "conv1", "time_emb_proj", "proj_in"), **options) -> nn.Module:
    model = unet()
    tt.attach(model, method, targets=list(targets), name="style", **options)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in tt.parameters(model):
            value.add_(0.1 * torch.randn(value.shape, generator=rng))
    return model


@pytest.mark.parametrize(
    "method",
    [tt.LoRA(rank=4, alpha=10), tt.RsLoRA(rank=4, alpha=3), tt.DoRA(rank=2, alpha=7), tt.PiSSA(rank=2), tt.LoRA(rank=3, alpha=0.5)],
    ids=lambda m: f"{type(m).__name__}-{m.rank}",
)
@pytest.mark.parametrize("through", ["save", "convert"])
def test_diffusers_reads_what_is_written_and_computes_the_same(method, through, tmp_path) -> None:
    model = trained(method)
    expected = run(model)
    assert (expected - run(unet())).abs().max() > 1e-2
    if through == "save":
        tt.save(model, tmp_path / "out", format="diffusers")
    else:
        tt.save(model, tmp_path / "own")
        tt.convert(tmp_path / "own", tmp_path / "out", to="diffusers", base=unet())
    theirs = unet()
    theirs.load_lora_adapter(str(tmp_path / "out"), prefix="unet", use_safetensors=True)
    torch.testing.assert_close(run(theirs), expected, atol=2e-5, rtol=1e-4)
    again = unet()
    tt.load(again, tmp_path / "out")
    torch.testing.assert_close(run(again), expected, atol=2e-5, rtol=1e-4)


def test_several_ranks_are_one_for_every_version_of_diffusers(tmp_path) -> None:
    model = trained(tt.LoRA(rank=2, alpha=6), overrides={"conv1": tt.LoRA(rank=5, alpha=3)})
    tt.save(model, tmp_path / "out", format="diffusers")
    stored = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert {v.shape[0] for k, v in stored.items() if ".lora_A." in k} == {5}
    theirs = unet()
    theirs.load_lora_adapter(str(tmp_path / "out"), prefix="unet", use_safetensors=True)
    torch.testing.assert_close(run(theirs), run(model), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("rslora", [False, True])
def test_what_diffusers_writes_is_read(rslora, tmp_path) -> None:
    peft = pytest.importorskip("peft")
    theirs = unet()
    config = peft.LoraConfig(
        r=4, lora_alpha=10, use_rslora=rslora, rank_pattern={"to_k": 2}, alpha_pattern={"attn1.to_k": 7}, init_lora_weights=False,
        target_modules=["to_q", "to_k", "to_out.0", "conv1"],
    )  # fmt: skip
    theirs.add_adapter(config)
    theirs.save_lora_adapter(tmp_path / "x")
    model = unet()
    tt.load(model, tmp_path / "x")
    torch.testing.assert_close(run(model), run(theirs), atol=2e-5, rtol=1e-4)


def test_what_diffusers_cannot_hold_is_refused(tmp_path) -> None:
    with pytest.raises(tt.Unsupported, match="has no exact form as a LoRA of diffusers"):
        tt.save(trained(tt.OFT(block_size=4), targets=["to_q"]), tmp_path / "out", format="diffusers")
    assert not (tmp_path / "out").exists()
    model = trained(tt.LoRA(rank=2))
    tt.save(model, tmp_path / "own")
    with pytest.raises(tt.NotMergeable, match="holds an adapter of another format"):
        tt.save(model, tmp_path / "own", format="diffusers")
    net = nn.Sequential(nn.Linear(4, 4))
    tt.attach(net, tt.LoRA(rank=2), targets=["0"])
    with pytest.raises(tt.Unsupported, match="which component of a pipeline a Sequential is"):
        tt.save(net, tmp_path / "out", format="diffusers")
    tt.save(net, tmp_path / "out", format="diffusers", component="transformer")
    assert all(k.startswith("transformer.0.lora_") for k in load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors"))
    with pytest.raises(tt.Unsupported, match="of which compnent cannot be said; nearest: component"):
        tt.save(net, tmp_path / "out2", format="diffusers", compnent="unet")


def test_the_name_of_a_base_without_one_is_asked_for(tmp_path) -> None:
    import json

    net = nn.Sequential(nn.Linear(4, 4))
    tt.attach(net, tt.LoRA(rank=2), targets=["0"])
    with pytest.warns(UserWarning, match="has no name.*base_name="):
        tt.save(net, tmp_path / "a", format="peft")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tt.save(net, tmp_path / "b", format="peft", base_name="org/base")
        tt.save(net, tmp_path / "own")
        tt.convert(tmp_path / "own", tmp_path / "c", to="peft", writing={"base_name": "org/base"})
    for name in "bc":
        assert json.loads((tmp_path / name / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"
