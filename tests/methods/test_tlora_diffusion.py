"""TLoRA on the attention of diffusers' models: a tiny UNet with cross attention, and a tiny diffusion transformer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import trimtab as tt

diffusers = pytest.importorskip("diffusers")

CONFIG = dict(rank=2, residual="ttv", transform_rank=2, init="broken_symmetry", order=3)


def unet() -> tuple[nn.Module, dict]:
    """Three blocks of transformers at the widths 16 and 32, each with self and cross attention to 24 features."""
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=4,
    )
    return model, {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([3, 7]),
        "encoder_hidden_states": torch.randn(2, 5, 24),
    }


def transformer() -> tuple[nn.Module, dict]:
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=2, sample_size=8, in_channels=4)
    for block in model.transformer_blocks:  # its gates start at zero, which would hide the attention
        nn.init.normal_(block.norm1.linear.weight, std=0.1)
    nn.init.normal_(model.proj_out_2.weight, std=0.1)
    return model, {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([3, 7]),
        "class_labels": torch.tensor([1, 2]),
    }


MODELS = pytest.mark.parametrize(("make", "places"), [(unet, 4 * 2 * 4), (transformer, 2 * 4)], ids=["unet", "transformer"])


@torch.no_grad()
def out(model: nn.Module, inputs: dict) -> torch.Tensor:
    return model.eval()(**inputs).sample


@MODELS
def test_acts_on_every_attention_projection_and_starts_at_the_base(make, places):
    model, inputs = make()
    base = out(model, inputs)
    table = tt.attach(model, tt.TLoRA(**CONFIG))
    assert len(table) == places
    assert {row["path"].split(".attn")[1][2:] for row in table} == {"to_q", "to_k", "to_v", "to_out.0"}
    torch.testing.assert_close(out(model, inputs), base)


@MODELS
def test_trains_on_noise_prediction_and_leaves_the_base_alone(make, places):
    model, inputs = make()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    tt.attach(model, tt.TLoRA(**CONFIG))
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.Adam(tt.parameters(model), lr=1e-2)
    losses = []
    model.train()
    for _ in range(15):
        optimizer.zero_grad()
        loss = (model(**inputs).sample[:, :4] - noise).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1e-3
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


@MODELS
def test_merges_saves_and_loads(make, places, tmp_path):
    model, inputs = make()
    base = out(model, inputs)
    tt.attach(model, tt.TLoRA(**CONFIG))
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in tt.parameters(model):
            p.add_(0.1 * torch.randn(p.shape, generator=rng))
    adapted = out(model, inputs)
    assert (adapted - base).abs().max() > 1e-3
    tt.save(model, tmp_path)
    tt.merge(model, "default")
    torch.testing.assert_close(out(model, inputs), adapted, atol=1e-4, rtol=1e-4)
    tt.unmerge(model, "default")
    tt.detach(model, "default")
    assert torch.equal(out(model, inputs), base)
    tt.load(model, tmp_path)
    torch.testing.assert_close(out(model, inputs), adapted)
