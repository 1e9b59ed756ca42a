"""LoRA+'s groups: two rates, one ratio (arXiv 2402.12354)."""

from __future__ import annotations

import pytest
import torch
from small_blocks import adamw, net, same, scheduled, steps

import trimtab as tt


def rates(optimizer: torch.optim.Optimizer) -> dict[int, float]:
    return {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}


def test_b_learns_faster_whatever_the_scheduler_does():
    model = net()
    optimizer = adamw(model, 2e-4)
    with scheduled(model, optimizer, tt.LoRAPlus(ratio=16)) as s:
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
        warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
        for step in range(6):
            found = rates(optimizer)
            for adapter in s.adapters():
                if hasattr(adapter, "a"):
                    assert found[id(adapter.b)] == pytest.approx(16 * found[id(adapter.a)])
                else:
                    assert found[id(adapter.value)] == pytest.approx(found[id(s.adapters()[0].a)])
            steps(model, optimizer, s, [step])
            warm.step()
            scheduler.step()
    model = net()
    optimizer = adamw(model, 2e-4)
    scheduled(model, optimizer, tt.LoRAPlus(ratio=16)).close()
    assert sorted({round(rate, 8) for rate in rates(optimizer).values()}) == [2e-4, 3.2e-3]


def test_ratio_1_is_plain_lora_to_the_bit():
    plain, equal = net(), net()
    steps(plain, adam := adamw(plain), None, range(5))
    optimizer = adamw(equal)
    with scheduled(equal, optimizer, tt.LoRAPlus(ratio=1)) as s:
        steps(equal, optimizer, s, range(5))
    assert same(plain, equal) and len(optimizer.param_groups) == len(adam.param_groups) + 1


def test_groups_keep_what_else_they_say():
    model = net()
    a = [p for n, p in model.named_parameters() if p.requires_grad and n.endswith(".a")]
    b = [p for n, p in model.named_parameters() if p.requires_grad and not n.endswith(".a")]
    options = [{"params": a, "weight_decay": 0.3}, {"params": b, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(options, lr=1e-3, betas=(0.8, 0.9))
    scheduled(model, optimizer, tt.LoRAPlus(ratio=4)).close()
    assert [(g["weight_decay"], g["lr"], g["betas"]) for g in optimizer.param_groups] == [
        (0.3, 1e-3, (0.8, 0.9)), (0.0, 1e-3, (0.8, 0.9)), (0.0, 4e-3, (0.8, 0.9)),
    ]  # fmt: skip


def test_embeddings_have_a_rate_of_their_own():
    model = net(targets=["embed", "attn.q"], layers=None)
    for given, expected in ((tt.LoRAPlus(16), 1e-6), (tt.LoRAPlus(16, embedding_rate=None), 1e-3)):
        optimizer = adamw(model, 1e-3)
        with scheduled(model, optimizer, given) as s:
            (embedded,) = (adapter for adapter in s.adapters() if adapter.site.kind == "embedding")
            assert rates(optimizer)[id(embedded.a)] == pytest.approx(expected)


def test_bad_input():
    for wrong in ({"ratio": 0.0}, {"embedding_rate": -1.0}):
        with pytest.raises(ValueError, match="above 0"):
            tt.LoRAPlus(**wrong)
    with pytest.warns(UserWarning, match="turned round"):
        tt.LoRAPlus(0.5)
    model = net(tt.OFT(block_size=4))
    with pytest.raises(tt.Unsupported, match="attached: OFT, Unfreeze"):
        scheduled(model, adamw(model), tt.LoRAPlus())
    model = net()
    optimizer = adamw(model)
    torch.optim.lr_scheduler.StepLR(optimizer, 3)
    with pytest.raises(tt.Unsupported, match="make the scheduler after tt.scheduled"):
        scheduled(model, optimizer, tt.LoRAPlus())
    with pytest.raises(ValueError, match="LoRAPlus and LoRAPlus both own rates"):
        scheduled(model, optimizer, tt.LoRAPlus(), tt.LoRAPlus())
