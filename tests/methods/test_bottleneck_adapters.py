"""Series and parallel adapters and AdaptFormer: the briefs' numbers, starts, places, merging, what is kept, bad input."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import trimtab as tt
from trimtab.core.account import saved_bytes

transformers = pytest.importorskip("transformers")
D = torch.float64
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def vit(**more) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.ViTConfig(**SIZES | more, image_size=32, patch_size=8)
    return transformers.ViTModel(config, add_pooling_layer=False).to(D).eval()


def llama() -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaModel(transformers.LlamaConfig(**SIZES, vocab_size=50)).to(D).eval()


def linear(W: list[list[float]]) -> nn.Sequential:
    weight = torch.tensor(W, dtype=D)
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=D))
    model[0].weight.data = weight
    return model


def attached(model: nn.Module, config: tt.MethodConfig, **more) -> list:
    tt.attach(model, config, rng=torch.Generator().manual_seed(0), **more)
    return model.__dict__["_trimtab_state"].groups["default"].adapters


def fill(adapter: nn.Module, **values: list) -> None:
    with torch.no_grad():
        for name, value in values.items():
            getattr(adapter, name).copy_(torch.tensor(value, dtype=D))


def shake(model: nn.Module, std: float = 0.3) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for p in tt.parameters(model):
            p.add_(torch.randn_like(p) * std)


# -- LLM-Adapters, oracle 3

X = torch.tensor([[1.0, 2.0]], dtype=D)
W = [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
PLAIN = {"bottleneck": 1, "act": "tanh", "bias": False}


def test_the_parallel_kind_of_llm_adapters() -> None:
    model = linear(W)
    (adapter,) = attached(model, tt.ParallelAdapter(**PLAIN), targets="0")
    fill(adapter, down=[[0.5, -0.5]], up=[[1.0], [2.0], [3.0]])
    want = torch.tensor([[0.537883, 1.075766, 1.613649]], dtype=D)
    torch.testing.assert_close(model(X), want, atol=5e-7, rtol=0)


def test_the_before_kind_of_llm_adapters() -> None:
    model = linear(W)
    (adapter,) = attached(model, tt.SeriesAdapter(**PLAIN, position="before"), targets="0")
    fill(adapter, down=[[0.5, -0.5]], up=[[1.0], [-1.0]])
    torch.testing.assert_close(model(X), torch.tensor([[0.537883, 2.462117, 3.0]], dtype=D), atol=5e-7, rtol=0)


def test_the_after_kind_of_llm_adapters() -> None:
    model = linear(W)
    (adapter,) = attached(model, tt.SeriesAdapter(**PLAIN), targets="0")
    fill(adapter, down=[[0.1, 0.2, -0.3]], up=[[1.0], [2.0], [3.0]])
    torch.testing.assert_close(model(X), torch.tensor([[0.620051, 1.240102, 1.860153]], dtype=D), atol=5e-7, rtol=0)


def test_the_placement_of_llm_adapters_is_before_gate_and_up_and_after_down() -> None:
    model = llama()
    adapters = attached(model, tt.SeriesAdapter(bottleneck=2, placement="llm"), layers=[0])
    found = {a.site.path.rpartition(".")[2]: (a.at_input, tuple(a.down.shape)) for a in adapters}
    assert found == {"gate_proj": (True, (2, 32)), "up_proj": (True, (2, 32)), "down_proj": (False, (2, 32))}


@pytest.mark.parametrize("kind", ["before", "after", "parallel"])
def test_an_up_of_zero_is_the_linear_layer_bit_for_bit(kind) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 48, dtype=dtype))
        x = torch.randn(5, 64, dtype=dtype)
        want = model(x)
        config = tt.ParallelAdapter(bottleneck=8) if kind == "parallel" else tt.SeriesAdapter(bottleneck=8, position=kind)
        attached(model, config, targets="0")
        assert torch.equal(model(x), want)


def test_the_bert_start_moves_outputs_by_a_fifth() -> None:
    """d = 4096, m = 256, inputs of unit variance: ||adapter(x)|| / ||x|| = 0.22."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4096, 4096, device="meta"))
    model[0].to_empty(device="cpu")
    (adapter,) = attached(model, tt.SeriesAdapter(bottleneck=256, act="tanh", bias=False, init="bert"), targets="0")
    y = torch.randn(16, 4096)
    assert ((adapter(y, y) - y).norm() / y.norm()).item() == pytest.approx(0.22, abs=0.01)


# -- what a branch's adapter computes, against the blocks written out


def run_vit_block(block: nn.Module, x: Tensor, attn, mlp) -> Tensor:
    """A pre-norm ViT block, with changes of its branches: functions of (residual stream, normed, branch output)."""
    normed = block.layernorm_before(x)
    x = x + attn(x, normed, block.attention(normed)[0])
    normed = block.layernorm_after(x)
    return x + mlp(x, normed, block.mlp(normed))


def network(a: nn.Module, x: Tensor, act) -> Tensor:
    return F.linear(act(F.linear(x, a.down, a.down_bias)), a.up, a.up_bias)


def same(x: Tensor, normed: Tensor, y: Tensor) -> Tensor:
    return y


#: config, the branches that have one, and for an adapter what it makes of (residual stream, normed, branch output)
CASES = {
    "series": (tt.SeriesAdapter(bottleneck=3), "attn mlp", lambda a, x, n, y: y + network(a, y, F.gelu)),
    "parallel": (tt.ParallelAdapter(bottleneck=3, scale=4.0), "mlp", lambda a, x, n, y: y + 4 * network(a, n, F.relu)),
    "both": (tt.ParallelAdapter(bottleneck=3, placement="both"), "attn mlp", lambda a, x, n, y: y + network(a, n, F.relu)),
    "adaptformer": (tt.AdaptFormer(bottleneck=3), "mlp", lambda a, x, n, y: y + 0.1 * network(a, x, F.relu)),
    "paper's": (tt.AdaptFormer(bottleneck=3, pre_norm=True), "mlp", lambda a, x, n, y: y + 0.1 * network(a, n, F.relu)),
}


@pytest.mark.parametrize("name", CASES)
def test_branches_of_a_vision_transformer(name) -> None:
    config, where, change = CASES[name]
    model, plain, x = vit(), vit(), torch.randn(2, 3, 32, 32, dtype=D)
    adapters = attached(model, config)
    torch.testing.assert_close(model(x).last_hidden_state, plain(x).last_hidden_state)
    shake(model)
    found = iter(adapters)
    h = plain.embeddings(x)
    for block in plain.layers:
        attn = partial(change, next(found)) if "attn" in where else same
        h = run_vit_block(block, h, attn, partial(change, next(found)))
    assert next(found, None) is None
    torch.testing.assert_close(model(x).last_hidden_state, plain.layernorm(h))


def test_a_feed_forward_spread_over_its_block() -> None:
    """BERT: the adapter reads what intermediate.dense reads, and adds to output.dense, before dropout, residual and norm."""
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**SIZES, vocab_size=50), add_pooling_layer=False).to(D).eval()
    plain, ids = copy.deepcopy(model), torch.arange(10).reshape(2, 5)
    adapters = attached(model, tt.ParallelAdapter(bottleneck=3), layers=[0])
    assert [a.site.path for a in adapters] == ["encoder.layer.0.output.dense"]
    shake(model)
    layer = plain.encoder.layer[0]
    seen = {}
    layer.intermediate.dense.register_forward_pre_hook(lambda m, args: seen.update(x=args[0]))
    layer.output.dense.register_forward_hook(lambda m, args, y: y + network(adapters[0], seen["x"], F.relu))
    torch.testing.assert_close(model(ids).last_hidden_state, plain(ids).last_hidden_state)


@pytest.mark.parametrize("norm_first", [True, False])
def test_the_residual_stream_is_there_in_blocks_with_norms_in_front(norm_first) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 2, 16, 0.0, batch_first=True, norm_first=norm_first, dtype=D)
    model, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(2, 3, 12, dtype=D)
    tt.attach(model, tt.AdaptFormer(bottleneck=2))
    if norm_first:
        assert model(x).shape == x.shape
        return
    for _ in range(2):  # and what the first run left behind does not serve the second
        with pytest.raises(tt.Unsupported, match="layers.0.norm2, which has not run before it"):
            model(x)


def test_a_norm_that_the_branch_does_not_read_is_noticed() -> None:
    """Norms registered in another order than they are used in."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm_mlp, self.norm_attn = nn.LayerNorm(8), nn.LayerNorm(8)
            self.attn = nn.Module()
            self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8) for _ in range(4))
            self.mlp = nn.Sequential()
            self.mlp.add_module("fc1", nn.Linear(8, 16))
            self.mlp.add_module("fc2", nn.Linear(16, 8))

        def forward(self, x: Tensor) -> Tensor:
            n = self.norm_attn(x)
            x = x + self.o_proj(self.q_proj(n) * self.k_proj(n) * self.v_proj(n))
            return x + self.mlp(self.norm_mlp(x))

    model = nn.Sequential(Block(), Block())
    tt.attach(model, tt.AdaptFormer(bottleneck=2))
    with pytest.raises(tt.Unsupported, match="0.mlp does not read that norm's output"):
        model(torch.randn(1, 3, 8))


def test_dropout_of_adaptformer_is_of_the_hidden_activation() -> None:
    """Kept entries of the hidden activation are divided by the keep rate; in eval mode there is none."""
    model = nn.Sequential(nn.Linear(8, 8, dtype=D))
    (a,) = attached(model, tt.AdaptFormer(bottleneck=4, dropout=0.5, pre_norm=True, scale=1.0), targets="0")
    shake(model)
    x = torch.randn(500, 8, dtype=D)
    hidden = F.relu(F.linear(x, a.down, a.down_bias))
    got = torch.linalg.lstsq(a.up.detach(), (model(x) - F.linear(x, *model[0]._parameters.values()) - a.up_bias).t()).solution.t()
    ratio = (got / hidden)[hidden > 0.1]
    assert bool(((ratio.abs() < 1e-9) | ((ratio - 2).abs() < 1e-9)).all()) and 0.4 < (ratio > 1).double().mean() < 0.6
    torch.testing.assert_close(model.eval()(x), F.linear(x, *model[0]._parameters.values()) + network(a, x, F.relu))


def test_the_wheat_start_and_its_count() -> None:
    """Both layers start like nn.Linear; the count of arXiv 2310.01825, 2 D a + a + D a block."""
    model = vit()
    base = model(torch.ones(1, 3, 32, 32, dtype=D)).last_hidden_state
    adapters = attached(model, tt.AdaptFormer(bottleneck=8, init="wheat", scale=1.0, dropout=0.0))
    assert sum(p.numel() for p in tt.parameters(model)) == 2 * (2 * 32 * 8 + 8 + 32)
    assert (model(torch.ones(1, 3, 32, 32, dtype=D)).last_hidden_state - base).norm() > 0.05 * base.norm()
    for a in adapters:
        assert a.up.abs().max() <= 8**-0.5 and a.down.abs().max() <= 32**-0.5 and a.down_bias.abs().max() > 0


def test_no_weight_is_without_a_gradient_at_the_start() -> None:
    """A start of all zeros would train the last bias alone; here Up learns from the first step, and Down from the second."""
    model, x = vit(), torch.randn(2, 3, 32, 32, dtype=D)
    adapters = attached(model, tt.SeriesAdapter(bottleneck=3))
    optimizer = torch.optim.SGD(tt.parameters(model), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).last_hidden_state.square().sum().backward()
        assert all(bool(a.up.grad.any()) for a in adapters)
        optimizer.step()
    assert all(bool(a.down.grad.any()) for a in adapters)


# -- merging, memory, bad input


@pytest.mark.parametrize("position", ["before", "after"])
def test_linear_adapters_merge_exactly(position) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 4, dtype=D, bias=position == "after")), torch.randn(5, 6, dtype=D)
    (a,) = attached(model, tt.SeriesAdapter(bottleneck=2, act="none", bias=position == "after", position=position), targets="0")
    shake(model)
    W, U, V = model[0]._parameters["weight"].detach(), a.up.detach(), a.down.detach()
    want = W @ (torch.eye(6, dtype=D) + U @ V) if position == "before" else (torch.eye(4, dtype=D) + U @ V) @ W
    torch.testing.assert_close(tt.effective_weight(model, "0"), want)
    if position == "after":
        b = model[0]._parameters["bias"].detach()
        torch.testing.assert_close(tt.effective_weight(model, "0", tensor="bias"), b + U @ (V @ b + a.down_bias) + a.up_bias)
    y = model(x)
    tt.merge(model, "default")
    torch.testing.assert_close(model(x), y)


def test_no_bias_is_made_where_none_is_needed() -> None:
    model = nn.Sequential(nn.Linear(6, 4, bias=False, dtype=D))
    attached(model, tt.ParallelAdapter(bottleneck=2, act="none", bias=False), targets="0")
    shake(model)
    tt.merge(model, "default", permanent=True)
    assert model[0].bias is None and list(model.state_dict()) == ["0.weight"]


def test_a_bias_that_the_adapter_brings_is_merged_and_taken_away_again() -> None:
    model, x = nn.Sequential(nn.Linear(6, 4, bias=False, dtype=D)), torch.randn(3, 6, dtype=D)
    attached(model, tt.ParallelAdapter(bottleneck=2, act="none"), targets="0")
    shake(model)
    y = model(x)
    tt.merge(model, "default")
    assert model[0]._parameters["bias"] is not None
    torch.testing.assert_close(model(x), y)
    tt.unmerge(model, "default")
    assert model[0]._parameters["bias"] is None


def test_bytes_kept_on_a_decoder() -> None:
    """Beyond the frozen model: the branch's input (parallel) or the two outputs (series) a block, and m numbers a token."""
    torch.manual_seed(0)
    n, d, m = 24, 64, 4
    config = transformers.LlamaConfig(**SIZES | {"hidden_size": d, "num_hidden_layers": 3}, vocab_size=9)
    cases = (tt.ParallelAdapter(bottleneck=m), 1), (tt.SeriesAdapter(bottleneck=m), 2), (tt.AdaptFormer(bottleneck=m), 0)
    for adapter, activations in cases:
        model = transformers.LlamaModel(config).requires_grad_(False)
        x = torch.randn(1, n, d, requires_grad=True)
        run = lambda model=model, x=x: model(inputs_embeds=x, use_cache=False).last_hidden_state  # noqa: E731
        with saved_bytes(model, beside=(x,)) as floor:
            run()
        attached(model, adapter)
        with saved_bytes(model, beside=(x,)) as saved:
            run()
        places = 2 if isinstance(adapter, tt.SeriesAdapter) else 1
        # AdaptFormer reads the residual stream, which the norm keeps anyway
        assert saved.total - floor.total == 3 * n * (activations * d + places * m) * 4


@pytest.mark.parametrize(
    ("config", "values"),
    [
        (tt.SeriesAdapter, {"bottleneck": 0}),
        (tt.SeriesAdapter, {"act": "swish"}),
        (tt.SeriesAdapter, {"scale": 0}),
        (tt.SeriesAdapter, {"scale": "learnt"}),
        (tt.SeriesAdapter, {"scale": True}),
        (tt.SeriesAdapter, {"dropout": 1.0}),
        (tt.SeriesAdapter, {"init": "normal"}),
        (tt.SeriesAdapter, {"placement": "everywhere"}),
        (tt.SeriesAdapter, {"position": "beside"}),
        (tt.ParallelAdapter, {"placement": "houlsby"}),
        (tt.ParallelAdapter, {"bottleneck": 2.0}),
        (tt.AdaptFormer, {"init": "bert"}),
        (tt.AdaptFormer, {"dropout": -0.1}),
    ],
)
def test_bad_hyperparameters(config, values) -> None:
    with pytest.raises(tt.ShapeMismatch, match=next(iter(values))):
        config(**values)


def test_indices_and_convolutions_are_refused() -> None:
    model = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 8))
    with pytest.raises(tt.Unsupported, match="reads indices"):
        tt.attach(model, tt.ParallelAdapter(bottleneck=2), targets="0")
    tt.attach(model, tt.SeriesAdapter(bottleneck=2), targets="0")
    with pytest.raises(tt.Unsupported, match="is a convolution, whose channels are not its last axis"):
        tt.attach(nn.Sequential(nn.Conv2d(3, 8, 1)), tt.SeriesAdapter(bottleneck=2), targets="0")


def test_a_learned_scale_starts_at_one_and_learns() -> None:
    model, x = nn.Sequential(nn.Linear(6, 6, dtype=D)), torch.randn(4, 6, dtype=D)
    (a,) = attached(model, tt.ParallelAdapter(bottleneck=2, scale="learned", init="bert"), targets="0")
    assert a.gain.tolist() == [1.0]
    model(x).square().sum().backward()
    step = 1e-6
    with torch.no_grad():
        a.gain += step
        up = model(x).square().sum()
        a.gain -= 2 * step
        down = model(x).square().sum()
    assert a.gain.grad.item() == pytest.approx(((up - down) / (2 * step)).item(), rel=1e-5)
