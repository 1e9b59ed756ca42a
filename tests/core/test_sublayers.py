"""Branches of blocks over real architectures, written by hand from reading their modules; places for methods on activations."""

from __future__ import annotations

import pytest
import torch
from test_anatomy import MODELS, build
from torch import nn

import trimtab as tt
from trimtab.core import anatomy
from trimtab.core.selection import select
from trimtab.core.sublayers import Sublayer

# name: for the first block {role: (module or None, reader, output, norm in front or None)}, paths below the block
WHOLE = {
    "llama": {
        "attn": ("self_attn", "self_attn.q_proj", "self_attn.o_proj", "input_layernorm"),
        "mlp": ("mlp", "mlp.up_proj", "mlp.down_proj", "post_attention_layernorm"),
    },
    "gpt2": {"attn": ("attn", "attn.c_attn", "attn.c_proj", "ln_1"), "mlp": ("mlp", "mlp.c_fc", "mlp.c_proj", "ln_2")},
    "gptj": {"attn": ("attn", "attn.q_proj", "attn.out_proj", "ln_1"), "mlp": ("mlp", "mlp.fc_in", "mlp.fc_out", "ln_1")},
    "bloom": {
        "attn": ("self_attention", "self_attention.query_key_value", "self_attention.dense", "input_layernorm"),
        "mlp": ("mlp", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "post_attention_layernorm"),
    },
    "bert": {
        "attn": (None, "attention.self.query", "attention.output.dense", None),
        "mlp": (None, "intermediate.dense", "output.dense", None),
    },
    "deberta": {
        "attn": (None, "attention.self.query_proj", "attention.output.dense", None),
        "mlp": (None, "intermediate.dense", "output.dense", None),
    },
    "opt": {
        "attn": ("self_attn", "self_attn.q_proj", "self_attn.out_proj", "self_attn_layer_norm"),
        "mlp": (None, "fc1", "fc2", "final_layer_norm"),
    },
    "phi3": {
        "attn": ("self_attn", "self_attn.qkv_proj", "self_attn.o_proj", "input_layernorm"),
        "mlp": ("mlp", "mlp.gate_up_proj", "mlp.down_proj", "post_attention_layernorm"),
    },
    "qwen3": {"attn": ("self_attn", "self_attn.q_proj", "self_attn.o_proj", "input_layernorm")},
    "mixtral": {"mlp": ("mlp", "mlp", None, "post_attention_layernorm")},
    "t5": {
        "attn": ("layer.0.SelfAttention", "layer.0.SelfAttention.q", "layer.0.SelfAttention.o", "layer.0.layer_norm"),
        "mlp": ("layer.1.DenseReluDense", "layer.1.DenseReluDense.wi_1", "layer.1.DenseReluDense.wo", "layer.1.layer_norm"),
    },
    "vit": {
        "attn": ("attention", "attention.q_proj", "attention.o_proj", "layernorm_before"),
        "mlp": ("mlp", "mlp.fc1", "mlp.fc2", "layernorm_after"),
    },
    "swin": {"mlp": ("mlp", "mlp.fc1", "mlp.fc2", "layernorm_after")},
}


@pytest.mark.parametrize("name", WHOLE)
def test_branches_of_the_first_block(name: str) -> None:
    found = anatomy.of(build(name))
    first = found.blocks[0]
    below = lambda path: None if path is None else path.removeprefix(f"{first}.")  # noqa: E731
    here = {s.role: (below(s.path), below(s.reader), below(s.output), below(s.norm)) for s in found.sublayers if s.block == 0}
    for role, want in WHOLE[name].items():
        assert here[role] == want


@pytest.mark.parametrize("name", [n for n in MODELS if n != "mamba"])
def test_every_block_has_one_attention_and_one_feed_forward(name: str) -> None:
    found = anatomy.of(build(name))
    for index in range(len(found.blocks)):
        roles = [s.role for s in found.sublayers if s.block == index]
        assert [r for r in roles if r != "cross"] == ["attn", "mlp"]
    for s in found.sublayers:
        assert all(path is None or path.startswith(found.blocks[s.block]) for path in (s.path, s.reader, s.output, s.norm))


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_attention_to_the_encoder_is_another_role(name: str) -> None:
    found = anatomy.of(build(name))
    cross = [s for s in found.sublayers if s.role == "cross"]
    assert {s.block for s in cross} == {2, 3}, "the decoder's blocks"
    assert all("cross" not in s.role for s in found.sublayers if s.block < 2)


def test_torchs_own_layers() -> None:
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 32, batch_first=True, norm_first=True), 1)
    attn, cross, mlp = anatomy.of(decoder).sublayers
    home = "layers.0."
    assert attn == Sublayer("attn", 0, home + "self_attn", home + "self_attn", home + "self_attn", home + "norm1")
    assert cross == Sublayer("cross", 0, home + "multihead_attn", home + "multihead_attn", home + "multihead_attn", home + "norm2")
    assert mlp == Sublayer("mlp", 0, None, home + "linear1", home + "linear2", home + "norm3")
    assert anatomy.of(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))).sublayers == ()


class PreNorm(nn.Module):
    """A norm wrapped around a branch, as in many vision transformers."""

    def __init__(self, fn: nn.Module, width: int = 8):
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(width), fn

    def forward(self, x):
        return self.fn(self.norm(x))


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x):
        return self.net(x)


class WrappedAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_qkv, self.to_out = nn.Linear(8, 24), nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.0))

    def forward(self, x):
        q, k, v = self.to_qkv(x).chunk(3, -1)
        return self.to_out(torch.softmax(q @ k.transpose(-1, -2), -1) @ v)


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([PreNorm(WrappedAttention()), PreNorm(FeedForward())]) for _ in range(2))

    def forward(self, x):
        for attn, ff in self.layers:
            x = x + attn(x)
            x = x + ff(x)
        return x


def test_branches_wrapped_in_their_norm() -> None:
    attn, mlp, *_ = anatomy.of(Wrapped()).sublayers
    assert (attn.path, attn.norm) == ("layers.0.0.fn", "layers.0.0.norm")
    assert (mlp.path, mlp.norm) == ("layers.0.1.fn.net", "layers.0.1.norm")


# -- places


def places(model: nn.Module, targets: str, reads: str) -> list[tuple[str, str | None]]:
    """(path, source) in the first block."""
    found = select(model, targets, leaves=lambda m: True, containers=True, reads=reads)
    return [(place.path, place.source) for place in found if place.block == 0]


def test_what_is_read_decides_the_place() -> None:
    llama, bert, mixtral = build("llama"), build("bert"), build("mixtral")
    home = "model.layers.0."
    assert places(llama, "attn | mlp", "output") == [(home + "self_attn.o_proj", None), (home + "mlp.down_proj", None)]
    assert places(llama, "attn | mlp", "input") == [(home + "self_attn", None), (home + "mlp", None)]
    assert places(llama, "mlp", "residual") == [(home + "mlp", home + "post_attention_layernorm")]
    assert places(llama, "mlp.up", "input") == [(home + "mlp.up_proj", None)]
    assert places(mixtral, "mlp", "output") == [(home + "mlp", None)]
    home = "bert.encoder.layer.0."
    assert places(bert, "mlp", "output") == [(home + "output.dense", None)]
    assert places(bert, "attn | mlp", "input") == [
        (home + "attention.output.dense", home + "attention.self.query"),
        (home + "output.dense", home + "intermediate.dense"),
    ]
    with pytest.raises(tt.Unsupported, match="no norm in front of bert.encoder.layer.0.output.dense"):
        places(bert, "mlp", "residual")


def test_methods_on_matrices_read_mlp_as_before() -> None:
    found = [place.path for place in select(build("llama"), "mlp") if place.block == 0]
    assert found == [f"model.layers.0.mlp.{n}_proj" for n in ("gate", "up", "down")]


def test_packed_attention_is_a_place_as_a_whole() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1, enable_nested_tensor=False)
    for targets in ("attn", "attn.o", "self_attn", "self_attn.out_proj"):
        assert places(model, targets, "output") == [("layers.0.self_attn", None)]
    with pytest.raises(tt.Unsupported, match="target the attention"):
        places(model, "attn.qkv", "output")


def test_containers_that_nobody_calls_are_refused() -> None:
    from small_net import net

    with pytest.raises(tt.Unsupported, match=r"layers.0.attn is a container that is never called"):
        tt.attach(net(), tt.SeriesAdapter(bottleneck=2), targets="layers.0.attn")


def test_the_error_tells_of_branches() -> None:
    with pytest.raises(tt.NoMatch, match=r"nearest: .*mlp.*attn x 2 \(whole\), mlp x 2 \(whole\)"):
        tt.attach(build("llama"), tt.ParallelAdapter(), targets="mpl")
