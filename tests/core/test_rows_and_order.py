"""What a mixed batch and a chain of adapters owe to each row and to their order, against batches and products made one by one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import trimtab as tt
from trimtab.core.host import Host

WIDTH = 12


class Net(nn.Module):
    """One attention with a fused qkv projection."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.num_heads = 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return torch.softmax(q @ k.transpose(-1, -2), -1) @ v


def moved(model: nn.Module, name: str, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in tt.parameters(model, name):
            p.add_(torch.randn(p.shape, generator=rng) * 0.3)


def llama() -> nn.Module:
    from token_models import llama as build

    torch.manual_seed(0)
    return build().eval()


@pytest.mark.parametrize("method", [tt.PromptTuning, tt.PrefixTuning])
def test_rows_with_prompts_of_different_lengths_equal_batches_of_one(method: type) -> None:
    model = llama()
    for name, tokens in (("short", 2), ("long", 5)):
        tt.attach(model, method(tokens=tokens), name=name)
        moved(model, name, tokens)
    ids = torch.randint(1, 32, (4, 6), generator=torch.Generator().manual_seed(1))
    rows = ["long", "short", None, "long"]
    with torch.no_grad():
        expected = []
        for row, name in enumerate(rows):
            tt.activate(model, *([] if name is None else [name]))
            expected.append(model(ids[row : row + 1]).logits)
        with tt.routed(model, rows):
            found = model(ids).logits
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-5, rtol=1e-5)


def test_rows_of_a_mixed_batch_drop_out_different_entries() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64))
    for name in "ab":
        tt.attach(model, tt.LoRA(rank=4, dropout=0.5), targets="0", name=name, rng=torch.Generator().manual_seed(1))
        moved(model, name, 1)  # equal adapters, so that masks alone tell rows apart
    x = torch.ones(1, 3, 64).expand(4, 3, 64)
    with tt.routed(model, ["a", "a", "b", "b"]):
        y = model.train()(x)
    for i in range(4):
        for j in range(i):
            assert not torch.allclose(y[i], y[j]), (i, j)
    with tt.routed(model, ["a", "a", "b", "b"]), torch.no_grad():
        plain = model.eval()(x)
    torch.testing.assert_close(plain[0], plain[2])


@pytest.mark.parametrize("first", ["rows", "columns"])
def test_what_changes_a_whole_matrix_comes_before_what_changes_a_part_of_it(first: str) -> None:
    """A part of a fused matrix turns what the whole's adapter made, whichever was attached or activated first."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"attn": Net()}).double()
    W = model["attn"].qkv.weight.detach().clone()
    put = {
        "rows": lambda: tt.attach(model, tt.DoRA(rank=2), targets="attn.qkv", name="rows"),
        "columns": lambda: tt.attach(model, tt.OFT(block_size=4), targets="attn.v", name="columns"),
    }
    for name in (first, "columns" if first == "rows" else "rows"):
        put[name]()
        moved(model, name, len(name))
    expected = tt.effective_weight(model, "attn.qkv", "rows").clone()
    turned = tt.effective_weight(model, "attn.qkv", "columns")
    rotation = torch.linalg.solve(W[2 * WIDTH :], turned[2 * WIDTH :])  # OFT: W' = W Q
    expected[2 * WIDTH :] = expected[2 * WIDTH :] @ rotation
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    for order in (("rows", "columns"), ("columns", "rows")):
        tt.activate(model, *order)
        torch.testing.assert_close(tt.effective_weight(model, "attn.qkv"), expected)
        torch.testing.assert_close(model["attn"].qkv(x), x @ expected.T + model["attn"].qkv.bias)


def test_every_place_starts_with_numbers_of_its_own_and_a_seed_gives_them_again() -> None:
    starts = []
    for seed in (1, 1, 2):
        model = llama()
        tt.attach(model, tt.LoRA(rank=2), targets="attn.q | attn.o", rng=torch.Generator().manual_seed(seed))
        starts.append([p for key, p in tt.named_parameters(model) if key.endswith(".a")])
    for one, again, other in zip(*starts, strict=True):
        assert torch.equal(one, again)
        assert not torch.equal(one, other)
    for i, one in enumerate(starts[0]):
        for other in starts[0][:i]:
            assert not torch.equal(one, other)


@pytest.mark.parametrize("name", sorted({*vars(Host()), *dir(nn.Module), "weight", "trimtab", "a.b", "ä b%"}))
def test_an_adapter_may_have_any_name(name: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    x = torch.randn(2, 4)
    base = model(x)
    tt.attach(model, tt.LoRA(rank=2), targets="0", name=name)
    moved(model, name, 1)
    adapted = model(x)
    assert not torch.allclose(base, adapted)
    tt.activate(model)
    torch.testing.assert_close(model(x), base)
    with tt.routed(model, [name, None]):
        torch.testing.assert_close(model(x), torch.stack([adapted[0], base[1]]))
    copy.deepcopy(model)
    tt.detach(model, name)
    assert torch.equal(model(x), base)
