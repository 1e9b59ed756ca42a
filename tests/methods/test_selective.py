"""BitFit, NormTuning, Unfreeze: exactly which tensors learn, that nothing else moves, and that the base is never written."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import trimtab as tt

WIDTH = 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks[1](self.blocks[0](x)))


CASES = [
    (tt.BitFit(), None, {"blocks.{}.norm.bias", "blocks.{}.up.bias"}),
    (tt.BitFit(), "up", {"blocks.{}.up.bias"}),
    (tt.NormTuning(), None, {"blocks.{}.norm.weight", "blocks.{}.norm.bias"}),
    (tt.Unfreeze(), None, {"head.weight", "head.bias"}),
    (tt.Unfreeze(), "down", {"blocks.{}.down.weight"}),
]


@pytest.mark.parametrize(("config", "targets", "names"), CASES)
def test_training_equals_training_those_parameters_themselves(config, targets, names):
    """Three SGD steps: the effective tensors are those of a plain net where only ``names`` learn; the base keeps its bytes."""
    names = {name.format(k) for name in names for k in (0, 1)}
    ours, plain = Net(), Net()
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    tt.attach(ours, config, targets=targets)
    for name, p in plain.named_parameters():
        p.requires_grad_(name in names)
    learning = [p for p in plain.parameters() if p.requires_grad]
    assert sum(p.numel() for p in tt.parameters(ours)) == sum(p.numel() for p in learning)
    for model, parameters in ((ours, list(tt.parameters(ours))), (plain, learning)):
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        x = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(1))
        for _ in range(3):
            optimizer.zero_grad()
            model(x).pow(2).sum().backward()
            optimizer.step()
    state = ours.state_dict()
    assert all(torch.equal(state[name], value) for name, value in before.items())
    for name, want in plain.named_parameters():
        path, tensor = name.rsplit(".", 1)
        if name in names:
            torch.testing.assert_close(tt.effective_weight(ours, path, tensor=tensor), want)
            assert not torch.equal(want, before[name])
    with tt.disabled(ours):
        torch.testing.assert_close(ours(x), Net()(x))


def test_a_model_without_biases_is_refused():
    with pytest.raises(tt.NoMatch):
        tt.attach(nn.Sequential(nn.Linear(4, 4, bias=False)), tt.BitFit(), targets="0")


def test_half_precision_base_learns_in_float32():
    model = Net().bfloat16()
    x = torch.randn(2, WIDTH).bfloat16()
    base = model(x)
    tt.attach(model, tt.NormTuning())
    assert torch.equal(model(x), base)
    assert {p.dtype for p in tt.parameters(model)} == {torch.float32}


def test_a_part_of_a_fused_projection_learns_its_rows_alone():
    model = nn.Sequential()
    model.add_module("attn", nn.MultiheadAttention(WIDTH, 2, batch_first=True))
    table = tt.attach(model, tt.Unfreeze(), targets="attn.v")
    assert [row["path"] for row in table] == ["attn.in_proj_weight[v]", "attn.in_proj_bias[v]"]
    assert sum(p.numel() for p in tt.parameters(model)) == WIDTH * WIDTH + WIDTH
