"""Matrices that an attention or a feed-forward holds itself: "attention" and "mlp" reach them all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import trimtab as tt
from trimtab.core import anatomy
from trimtab.core.selection import select

WIDTH = 16


class Apart(nn.Module):
    """torch's attention with keys and values of another width, which keeps q, k and v as three parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, 2, kdim=12, vdim=12, batch_first=True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.attn(x, y, y, need_weights=False)[0]


class Bare(nn.Module):
    """Attention and feed-forward without layers, heads apart in some of their matrices."""

    def __init__(self) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        draw = lambda *shape: nn.Parameter(torch.randn(*shape, generator=rng) * 0.3)  # noqa: E731
        self.attention, self.mlp = nn.Module(), nn.Module()
        self.attention.w_q, self.attention.Wk = draw(WIDTH, WIDTH), draw(WIDTH, 2, 8)
        self.attention.v_proj_weight, self.attention.out_weight = draw(WIDTH, WIDTH), draw(2, 8, WIDTH)
        self.attention.mixing, self.attention.relative_position_bias_table = draw(WIDTH, WIDTH), draw(9, 2)
        self.mlp.w_in, self.mlp.w_out, self.mlp.strange = draw(32, WIDTH), draw(WIDTH, 32), draw(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        a, m = self.attention, self.mlp
        q, k, v = F.linear(x, a.w_q), torch.einsum("bti,ihd->bthd", x, a.Wk).flatten(2), F.linear(x, a.v_proj_weight)
        y = torch.softmax(q @ k.transpose(-1, -2), -1) @ v
        x = x + torch.einsum("bthd,hdo->bto", y.unflatten(-1, (2, 8)), a.out_weight) @ a.mixing
        return x + F.linear(F.linear(F.linear(x, m.w_in).relu(), m.w_out), m.strange)


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Holder() for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Holder(nn.Module):
    """A block: a linear layer that tells its width, and a bare branch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.bare = nn.LayerNorm(WIDTH), Bare()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.bare(self.norm(x))
        return x + self.fc2(self.fc1(x).relu())


def names(model: nn.Module, targets: str) -> set[str]:
    return {f"{place.path}.{place.tensor}" if place.tensor else place.path for place in select(model, targets)}


def test_an_attention_with_keys_of_another_width_is_reached_whole() -> None:
    model = Apart()
    every = {f"attn.{part}_proj_weight" for part in "qkv"} | {"attn.out_proj"}
    assert names(model, "attention") == names(model, "attn") == names(model, "linear") == every
    for part in "qkv":
        assert names(model, f"attn.{part}") == {f"attn.{part}_proj_weight"}


def test_what_is_attached_there_acts_and_merges() -> None:
    torch.manual_seed(0)
    model, x, y = Apart(), torch.randn(2, 3, WIDTH), torch.randn(2, 5, 12)
    tt.attach(model, tt.LoRA(rank=2), targets="attn.q | attn.k | attn.v")
    with torch.no_grad():
        for p in tt.parameters(model):
            p.add_(torch.randn(p.shape) * 0.3)
    expected = nn.MultiheadAttention(WIDTH, 2, kdim=12, vdim=12, batch_first=True)
    expected.load_state_dict({k: v for k, v in model.attn.state_dict().items() if "trimtab" not in k})
    with torch.no_grad():
        for part in "qkv":
            name = f"{part}_proj_weight"
            getattr(expected, name).copy_(tt.effective_weight(model, "attn", tensor=name))
        assert not torch.allclose(expected.q_proj_weight, model.attn._parameters["q_proj_weight"])
        out = model(x, y)
        torch.testing.assert_close(out, expected(x, y, y, need_weights=False)[0])
        tt.merge(model, "default")
        torch.testing.assert_close(model(x, y), out)


@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in blocks"])
def test_no_matrix_of_an_attention_or_feed_forward_is_passed_over(inside: bool) -> None:
    model = Blocks() if inside else Bare()
    home = "layers.0.bare." if inside else ""
    first = lambda found: {n.removeprefix(home) for n in found if n.startswith(home)}  # noqa: E731
    assert first(names(model, "attn.q")) == {"attention.w_q"}
    assert first(names(model, "attn.o")) == {"attention.out_weight"}
    attention = {f"attention.{n}" for n in ("w_q", "Wk", "v_proj_weight", "out_weight")}
    mlp = {f"mlp.{n}" for n in ("w_in", "w_out")}
    if inside:  # the block tells its width, so that names which say nothing count, too
        attention |= {"attention.mixing"}
        mlp |= {"mlp.strange"}
    assert first(names(model, "attention")) == attention, "and no table of positions"
    assert first(names(model, "mlp")) == mlp
    assert set(anatomy.of(model).count()) >= {"attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down"}


def test_heads_that_are_kept_apart_are_one_matrix() -> None:
    torch.manual_seed(0)
    model, x = Bare(), torch.randn(2, 3, WIDTH)
    table = tt.attach(model, tt.LoRA(rank=2), targets="attn.k | attn.o")
    assert table.column("shape") == ["16x16", "16x16"]
    with torch.no_grad():
        for p in tt.parameters(model):
            p.add_(torch.randn(p.shape) * 0.3)
        out, weight = model(x), tt.effective_weight(model, "attention", tensor="Wk")
        plain = Bare()
        plain.load_state_dict({k: v for k, v in model.state_dict().items() if "trimtab" not in k})
        assert not torch.allclose(plain(x), out)
        plain.attention.Wk.copy_(weight.t().reshape(WIDTH, 2, 8))
        plain.attention.out_weight.copy_(tt.effective_weight(model, "attention", tensor="out_weight").t().reshape(2, 8, WIDTH))
        torch.testing.assert_close(plain(x), out)
