"""Defaults fit every model that they can and say what they left out; what a user gave is never changed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import trimtab as tt
from trimtab.kernels.divisors import divisors, nearest_divisor


class Block(nn.Module):
    def __init__(self, width: int, wide: int):
        super().__init__()
        self.self_attn = nn.Module()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.self_attn.add_module(name, nn.Linear(width, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("up_proj", nn.Linear(width, wide))
        self.mlp.add_module("down_proj", nn.Linear(wide, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, h = self.self_attn, self.norm1(x)
        x = x + a.o_proj((a.q_proj(h) @ a.k_proj(h).transpose(-1, -2)).softmax(-1) @ a.v_proj(h))
        return x + self.mlp(self.norm2(x))


def model(width: int, wide: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, width), nn.ModuleList([Block(width, wide) for _ in range(2)]))


def forward(net: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    x = net[0](x)
    for block in net[1]:
        x = block(x)
    return x


OPEN = [tt.OFT(), tt.BOFT(), tt.HUT(), tt.TLoRA(), tt.S2FT(), tt.Bat(), tt.Consolidator(), tt.Compacter()]


@pytest.mark.parametrize("widths", [(16, 32), (15, 45), (13, 52), (22, 33), (30, 70), (97, 101)])
@pytest.mark.parametrize("method", OPEN, ids=lambda m: type(m).__name__)
def test_a_default_fits_odd_and_prime_widths_and_is_the_same_after_a_load(method, widths, tmp_path) -> None:
    net, x = model(*widths), torch.randn(2, 4, 3)
    base = forward(net, x)
    tt.attach(net, method, targets="attn.o | mlp.down" if isinstance(method, tt.S2FT) else None)
    optimizer = torch.optim.SGD(tt.parameters(net), lr=0.1)
    forward(net, x).square().sum().backward()
    optimizer.step()
    after = forward(net, x)
    assert not torch.allclose(after, base)
    tt.save(net, tmp_path)
    fresh = model(*widths)
    tt.load(fresh, tmp_path)
    torch.testing.assert_close(forward(fresh, x), after, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("method", "shape", "shown"),
    [
        (tt.OFT(), (96, 96), "block_size=32"),
        (tt.OFT(), (40, 40), "block_size=40"),
        (tt.OFT(), (50, 50), "block_size=25"),
        (tt.BOFT(), (64, 64), "block_size=8, blocks=None, factors=2"),
        (tt.BOFT(), (30, 30), "block_size=10, blocks=None, factors=1"),
        (tt.BOFT(factors=2), (36, 36), "block_size=6, blocks=None, factors=2"),
        (tt.HUT(), (64, 32), "rank=8"),
        (tt.HUT(), (33, 99), "rank=11"),
        (tt.HUT(), (7, 16), "rank=1"),
        (tt.Bat(), (256, 128), "rank=64"),
        (tt.Bat(), (48, 36), "rank=12"),
        (tt.Consolidator(), (768, 3072), "groups=384"),
        (tt.TLoRA(), (768, 768), "order=None"),
        (tt.TLoRA(), (96, 96), "order=3"),
    ],
)
def test_the_choice_is_shown_in_the_table(method, shape, shown) -> None:
    net = nn.Sequential(nn.Linear(*reversed(shape)))
    (row,) = tt.attach(net, method, targets="0", dry_run=True)
    assert shown in row["method"]


@pytest.mark.parametrize(
    "method",
    [tt.OFT(block_size=32), tt.OFT(blocks=7), tt.BOFT(block_size=8), tt.HUT(rank=8), tt.Bat(rank=64), tt.Consolidator(groups=384),
     tt.WaRA(pad=False), tt.TLoRA(shapes=((4, 4),)), tt.S2FT(ratio=0.01), tt.LoRA(rank=64)],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("targets", [None, "mlp.down"])
def test_what_was_given_is_refused_where_it_fits_nowhere(method, targets) -> None:
    with pytest.raises((tt.ShapeMismatch, tt.NoMatch)):
        tt.attach(model(15, 45), method, targets=targets)


@pytest.mark.parametrize(
    "method", [tt.LoRA(rank=8), tt.DoRA(rank=8), tt.PiSSA(rank=8), tt.LoHa(rank=8), tt.AdaLoRA(rank=8), tt.Bone(rank=8)], ids=repr
)
def test_a_default_passes_by_what_is_smaller_and_says_so(method) -> None:
    net = model(16, 32)  # its first matrix is (16, 3)
    planned = tt.attach(net, method, dry_run=True)
    assert "0" not in planned.column("path") and len(planned) == 12
    assert any(note.startswith("left out: 0: ") and "rank 8" in note for note in planned.notes)
    assert "left out: 0: " in str(planned)
    table = tt.attach(net, method)
    assert table.notes == planned.notes
    with pytest.raises(tt.ShapeMismatch, match="rank 8"):
        tt.attach(model(16, 32), method, targets=["0", "mlp"])
    with pytest.raises(tt.ShapeMismatch, match="rank 8"):
        tt.attach(model(16, 32), method, overrides={"0": type(method)(rank=8, **{})}, targets="linear")


def test_a_rank_that_fits_nowhere_is_an_error() -> None:
    with pytest.raises(tt.ShapeMismatch, match="rank 64"):
        tt.attach(model(16, 32), tt.LoRA(rank=64))


def test_a_model_of_32_heads_has_one_that_learns() -> None:
    net = model(64, 32)
    for block in net[1]:
        block.self_attn.num_heads, block.self_attn.head_dim = 32, 2
    table = tt.attach(net, tt.S2FT(), targets="attn.o", layers=[0])
    assert table.total("parameters") == 2 * 64  # one head of two columns
    with pytest.raises(tt.ShapeMismatch, match="takes 0 of the 32 units"):
        tt.attach(model_like(net), tt.S2FT(ratio=0.03), targets="attn.o", layers=[0])


def model_like(net: nn.Module) -> nn.Module:
    fresh = model(64, 32)
    for block in fresh[1]:
        block.self_attn.num_heads, block.self_attn.head_dim = 32, 2
    return fresh


def test_what_is_open_alone_is_chosen() -> None:
    """Where one of two numbers that belong together is given, the other is the usual one, and is not bent to it."""
    with pytest.raises(tt.ShapeMismatch, match="reduction 8 and 4 divisions"):
        tt.attach(model(16, 32), tt.Compacter(reduction=8))
    (row, *_) = tt.attach(model(16, 32), tt.Compacter())
    assert "reduction=4, divisions=4" in row["method"]


def test_an_odd_width_is_padded_where_nothing_is_given() -> None:
    odd = nn.Sequential(nn.Linear(33, 35))
    (row,) = tt.attach(odd, tt.WaRA(), targets="0")
    assert "pad=True" in row["method"]
    with pytest.raises(tt.ShapeMismatch, match="odd number"):
        tt.attach(nn.Sequential(nn.Linear(33, 35)), tt.WaRA(rank=2), targets="0")


def test_divisors() -> None:
    for n in (1, 2, 12, 36, 97, 360):
        assert divisors(n) == [d for d in range(1, n + 1) if n % d == 0]
    assert nearest_divisor(12, 5) == 6 and nearest_divisor(16, 16) == 16 and nearest_divisor(12, 3, where=lambda d: d % 2 == 0) == 4
    assert nearest_divisor(1, 4, least=2) is None


# -- methods whose default names several roles


class Decoder(nn.Module):
    """Attention and norms, of which some have a bias."""

    def __init__(self, linear: bool, norm: bool):
        super().__init__()
        self.layers = nn.ModuleList([Block(8, 16)])
        for module in self.modules():
            keep = norm if isinstance(module, nn.LayerNorm) else linear
            if isinstance(module, nn.Linear | nn.LayerNorm) and not keep:
                module.bias = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[0](x)


@pytest.mark.parametrize(("linear", "norm", "count"), [(True, True, 8), (True, False, 6), (False, True, 2)])
def test_bitfit_takes_the_biases_that_there_are(linear, norm, count) -> None:
    table = tt.attach(Decoder(linear, norm), tt.BitFit())
    assert len(table) == count and all(path.endswith(".bias") for path in table.column("path"))
    assert bool(table.notes) == (count != 8)


def test_bitfit_says_that_there_is_none() -> None:
    with pytest.raises(tt.NoMatch, match=r"'linear' means 6 places .*, of which none has a parameter called bias"):
        tt.attach(Decoder(False, False), tt.BitFit())
    with pytest.raises(tt.NoMatch, match=r"'norm' means 2 places .*, of which none has a parameter called bias"):
        tt.attach(Decoder(True, False), tt.BitFit(), targets="linear | norm")


def test_bitfit_takes_a_packed_bias() -> None:
    table = tt.attach(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), tt.BitFit(), targets="self_attn | linear")
    assert "self_attn.in_proj_bias" in table.column("path")


def test_ia3_scales_keys_and_values_of_a_packed_attention_with_their_biases() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    net, x = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), torch.randn(2, 5, 8)
    inner = net.layers[0]
    with torch.no_grad():
        inner.self_attn.in_proj_bias.normal_()
    twin = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    twin.load_state_dict(net.state_dict())
    assert set(tt.attach(net, tt.IA3()).column("role")) == {"attn.k", "attn.v", "mlp.down"}
    with torch.no_grad():
        for p in tt.parameters(net):
            p.copy_(torch.rand_like(p) + 0.5)
        gains = {name: p for name, p in net.named_parameters() if "trimtab" in name}
        k, v, down = (next(p for name, p in gains.items() if part in name) for part in ("weight_k", "weight_v", "linear2"))
        rows = torch.cat([torch.ones(8), k, v])
        twin.layers[0].self_attn.in_proj_weight.mul_(rows[:, None])
        twin.layers[0].self_attn.in_proj_bias.mul_(rows)
        twin.layers[0].linear2.weight.mul_(down)
    torch.testing.assert_close(net(x), twin(x))
    net.eval(), twin.eval()
    with torch.no_grad():
        before = net(x)
        torch.testing.assert_close(before, twin(x))
        tt.merge(net, "default")
        torch.testing.assert_close(net(x), before)


class Experts(nn.Module):
    def __init__(self, biased: bool = False):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 12, 8))
        self.down_proj = nn.Parameter(torch.randn(3, 8, 6))
        self.gate_up_proj_bias = nn.Parameter(torch.randn(3, 12)) if biased else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = torch.einsum("ni,eoi->neo", x, self.gate_up_proj).chunk(2, -1)
        return torch.einsum("nei,eoi->no", gate.sigmoid() * up, self.down_proj)


def test_ia3_scales_what_experts_read() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(Experts()), torch.randn(5, 8)
    (row,) = tt.attach(net, tt.IA3())
    assert (row["path"], row["parameters"]) == ("0.down_proj", 18)
    (gain,) = tt.parameters(net)
    with torch.no_grad():
        gain.copy_(torch.rand_like(gain) + 0.5)
    twin = Experts()
    twin.load_state_dict({k: v for k, v in net[0].state_dict().items() if "trimtab" not in k})
    with torch.no_grad():
        twin.down_proj.mul_(gain[:, None, :])
    torch.testing.assert_close(net(x), twin(x))
    with pytest.raises(tt.Unsupported, match="biases of its own"):
        tt.attach(nn.Sequential(Experts(biased=True)), tt.IA3(side="output"), targets="gate_up_proj")


def test_ssf_scales_the_patch_embedding() -> None:
    net = nn.Module()
    net.patch, net.layers = nn.Conv2d(3, 8, 2, stride=2), nn.ModuleList([Block(8, 16)])
    assert "patch" in tt.attach(net, tt.SSF()).column("path")
    assert any("finds no 'conv'" in note for note in tt.attach(Decoder(True, True), tt.SSF()).notes)


def test_a_method_of_linear_layers_acts_on_convolutions_where_there_is_nothing_else() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
    assert tt.attach(net, tt.LoRA(rank=4)).column("kind") == ["conv", "conv"]
