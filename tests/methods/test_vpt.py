"""VPT: the counts of the brief, the literal version, and the work that keys and values spare."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import trimtab as tt
from contract.contract_cases import Attention, Fused
from token_models import vit
from trimtab.core.account import count_flops, saved_bytes


class ByHand(Attention):
    """An attention that writes its scores out: nothing can join there."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, d = x.shape
        q, k, v = (z.reshape(n, t, self.num_heads, -1).transpose(1, 2) for z in self.qkv(x).chunk(3, -1))
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(n, t, d))


def net(by_hand: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = Fused().double()
    for block in model.blocks:
        block.attn.__class__ = ByHand if by_hand else Attention
    return model


def literal(model: nn.Module, x: torch.Tensor, prompts: list[torch.Tensor], *, deep: bool) -> torch.Tensor:
    """``[P_i; x]`` through each block, the prompts' outputs thrown away (deep) or carried on (shallow)."""
    p = prompts[0].shape[0]
    tokens = prompts[0].expand(x.shape[0], -1, -1)
    for index, block in enumerate(model.blocks):
        tokens = prompts[index].expand(x.shape[0], -1, -1) if deep else tokens
        full = block(torch.cat([tokens, x], 1))
        tokens, x = full[:, :p], full[:, p:]
    return model.head(x)


@pytest.mark.parametrize("by_hand", [False, True], ids=["joined", "in line"])
@pytest.mark.parametrize("deep", [True, False])
def test_equals_the_literal_version(deep: bool, by_hand: bool) -> None:
    """Outputs, and gradients of inputs and prompts; also where the attention cannot be reached and the tokens go in line."""
    model, x = net(by_hand), torch.randn(3, 5, 12, dtype=torch.float64, requires_grad=True)
    tt.attach(model, tt.VPT(tokens=4, deep=deep))
    prompts = tt.parameters(model)
    assert len(prompts) == (2 if deep else 1)
    got = model(x)
    grads = torch.autograd.grad(got.pow(2).sum(), [x, *prompts])
    with tt.disabled(model):
        want = literal(model, x, prompts, deep=deep)
    wanted = torch.autograd.grad(want.pow(2).sum(), [x, *prompts])
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-10)
    for g, w in zip(grads, wanted, strict=True):
        torch.testing.assert_close(g, w, atol=1e-11, rtol=1e-9)


def test_the_place_in_the_sequence_is_all_the_same() -> None:
    """Behind the class token, as the paper has it, or in front: a vision transformer's blocks have no order."""
    model, x = net(), torch.randn(3, 5, 12, dtype=torch.float64)
    prompt = torch.randn(4, 12, dtype=torch.float64)
    full = model.blocks[0](torch.cat([x[:, :1], prompt.expand(3, -1, -1), x[:, 1:]], 1))
    front = model.blocks[0](torch.cat([prompt.expand(3, -1, -1), x], 1))
    torch.testing.assert_close(torch.cat([full[:, :1], full[:, 5:]], 1), front[:, 4:])


@pytest.mark.parametrize(("config", "count"), [(tt.VPT(tokens=100, deep=False), 76_800), (tt.VPT(tokens=50), 460_800)])
def test_counts_and_start_on_vit_b(config: tt.MethodConfig, count: int) -> None:
    from transformers import ViTConfig, ViTModel

    with torch.device("meta"):
        model = ViTModel(ViTConfig())
    assert sum(row["parameters"] for row in tt.attach(model, config, dry_run=True)) == count
    small = ViTModel(ViTConfig(num_hidden_layers=1, intermediate_size=8))
    tt.attach(small, tt.VPT(tokens=200))
    (p,) = tt.parameters(small)
    assert 0.0624 < p.abs().max() <= 0.0625 and abs(p.std() - 0.0625 / 3**0.5) < 1e-3


@pytest.mark.parametrize("deep", [True, False])
def test_samples_do_not_leak_into_each_other(deep: bool) -> None:
    torch.manual_seed(0)
    model = vit().eval()
    tt.attach(model, tt.VPT(tokens=4, deep=deep))
    x = torch.randn(3, 3, 8, 8)
    other = torch.cat([x[:1], torch.randn(2, 3, 8, 8)])
    torch.testing.assert_close(model(x).logits[0], model(other).logits[0])
    assert model(x, output_hidden_states=True).hidden_states[1].shape == (3, 5, 16)


def test_keys_and_values_spare_the_prompts_own_work() -> None:
    """Against the literal version on a batch: fewer operations, and fewer bytes kept."""
    model, x = net().float(), torch.randn(8, 16, 12)
    tt.attach(model, tt.VPT(tokens=8))
    prompts = tt.parameters(model)

    def cost(run) -> tuple[int, int]:
        with count_flops() as counter:
            run().sum().backward()
        with saved_bytes(model, beside=(x,)) as saved:
            run()
        return counter.get_total_flops(), saved.total

    def by_hand() -> torch.Tensor:
        with tt.disabled(model):
            return literal(model, x, prompts, deep=True)

    with tt.disabled(model):
        grad = x.clone().requires_grad_()
        floor = cost(lambda: model(grad))
    ours, literals = cost(lambda: model(x)), cost(by_hand)
    assert ours[0] - floor[0] < 0.6 * (literals[0] - floor[0])
    assert ours[1] < literals[1]


def test_dropout_acts_while_training_alone() -> None:
    model = net()
    tt.attach(model, tt.VPT(tokens=4, dropout=0.5))
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    model.eval()
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_a_prefix_needs_an_attention_that_can_be_reached() -> None:
    model = net(by_hand=True)
    tt.attach(model, tt.PrefixTuning(tokens=2))
    with pytest.raises(tt.Unsupported, match="scaled_dot_product_attention"):
        model(torch.randn(1, 5, 12, dtype=torch.float64))
