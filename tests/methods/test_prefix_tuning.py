"""PrefixTuning: the brief's counts, the gate identity, the network that makes it, what it keeps for backward."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import trimtab as tt
from token_models import VOCABULARY, WIDTH, bart, bloom, gpt2, llama, t5, vit
from trimtab.artifacts.fold import fold
from trimtab.core.account import saved_bytes


def ids(rows: int = 2, tokens: int = 6) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(1))


def seeded(build, **more) -> torch.nn.Module:
    torch.manual_seed(0)
    return build(**more).eval()


def large(name: str) -> torch.nn.Module:
    """The published shapes, on the meta device."""
    import transformers as hf

    d7, d13 = {"hidden_size": 4096, "num_hidden_layers": 32}, {"hidden_size": 5120, "num_hidden_layers": 40}
    configs = {
        "llama-7b": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**d7, intermediate_size=11008, num_attention_heads=32)),
        "llama-13b": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**d13, intermediate_size=13824, num_attention_heads=40)),
        "gpt-j": lambda: hf.GPTJForCausalLM(hf.GPTJConfig(n_embd=4096, n_layer=28, n_head=16)),
        "bloomz-7b1": lambda: hf.BloomForCausalLM(hf.BloomConfig(hidden_size=4096, n_layer=30, n_head=32)),
    }
    with torch.device("meta"):
        return configs[name]()


@pytest.mark.parametrize(
    ("name", "tokens", "count", "percent"),
    [
        ("llama-7b", 10, 2_621_440, 0.039),
        ("llama-7b", 30, 7_864_320, 0.117),
        ("llama-13b", 10, 4_096_000, 0.031),
        ("gpt-j", 10, 2_293_760, None),
        ("bloomz-7b1", 10, 2_457_600, None),
    ],
)
def test_counts_of_the_brief(name: str, tokens: int, count: int, percent: float | None) -> None:
    """``vt L 2 d``; shares over base and added together, as the papers print them."""
    model = large(name)
    table = tt.attach(model, tt.PrefixTuning(tokens=tokens), dry_run=True)
    assert sum(row["parameters"] for row in table) == count
    if percent is not None:
        base = sum(p.numel() for p in model.parameters())
        assert 100 * count / (base + count) == pytest.approx(percent, abs=5e-4)


def test_prefix_is_a_gate_between_two_attentions() -> None:
    """``attn(x with prefix) = (1 - l) attn(x) + l attn(prefix)``, l the prefix's share of all exponentials; in float64."""
    torch.manual_seed(0)
    net = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(12, 2, 16, 0.0, batch_first=True), 1).double().eval()
    tt.attach(net, tt.PrefixTuning(tokens=3, std=1.0))
    (adapter,) = tt.core.state.state_of(net).groups["default"].adapters
    attention, x = net.layers[0].self_attn, torch.randn(2, 5, 12, dtype=torch.float64)
    q, k, v = (y.unflatten(-1, (2, 6)).transpose(1, 2) for y in F.linear(x, *_packed(attention)).chunk(3, -1))
    kp, vp = (y.detach().unflatten(-1, (2, 6)).transpose(0, 1)[None] for y in (adapter.k, adapter.v))
    plain, prefix = (q @ key.transpose(-1, -2) * 6**-0.5 for key in (k, kp))
    share = prefix.exp().sum(-1, keepdim=True) / (prefix.exp().sum(-1, keepdim=True) + plain.exp().sum(-1, keepdim=True))
    mixed = (1 - share) * (plain.softmax(-1) @ v) + share * (prefix.softmax(-1) @ vp)
    want = attention.out_proj(mixed.transpose(1, 2).flatten(2))
    for need_weights in (False, True):
        got, weights = attention(x, x, x, need_weights=need_weights)
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    torch.testing.assert_close(weights.sum(-1), (1 - share).mean(1).squeeze(-1))  # what the prefix leaves, heads averaged


def _packed(attention: torch.nn.MultiheadAttention) -> tuple[torch.Tensor, torch.Tensor]:
    return attention._parameters["in_proj_weight"], attention._parameters["in_proj_bias"]  # the base's own


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_gated_starts_at_the_base_bit_for_bit_and_saturates_to_the_sum(implementation: str) -> None:
    model = seeded(llama, attn_implementation=implementation)
    base = model(ids()).logits
    tt.attach(model, tt.PrefixTuning(tokens=3, gated=True, std=1.0))
    assert torch.equal(model(ids()).logits, base)
    for adapter in tt.core.state.state_of(model).groups["default"].adapters:
        torch.nn.init.constant_(adapter.g, 30.0)  # tanh 1
        torch.nn.init.zeros_(adapter.v)
    torch.testing.assert_close(model(ids()).logits, base)  # values of zero add nothing, whatever the gate
    model(ids()).logits.sum().backward()
    assert all(p.grad is not None for p in tt.parameters(model))


def test_values_follow_the_heads_of_the_model() -> None:
    """Key-value heads, fused projections, cross-attention left alone."""
    assert [p.shape for p in _parameters(llama)] == [(3, WIDTH // 2)] * 4  # two of four heads
    assert [p.shape for p in _parameters(gpt2)] == [(3, WIDTH)] * 4
    assert [p.shape for p in _parameters(bloom)] == [(3, WIDTH)] * 4
    assert [p.shape for p in _parameters(t5)] == [(3, WIDTH)] * 8  # encoder and decoder, self-attention
    assert [p.shape for p in _parameters(bart, layers={"encoder": [0], "decoder": [1]})] == [(3, WIDTH)] * 4
    assert [p.shape for p in _parameters(vit, targets="layers.1|layer.1")] == [(3, WIDTH)] * 2


def _parameters(build, **more) -> list[torch.nn.Parameter]:
    model = seeded(build)
    if "targets" in more:
        more["targets"] = lambda path, module: path in tt.core.anatomy.of(model).blocks and path.endswith("1")
    tt.attach(model, tt.PrefixTuning(tokens=3), **more)
    return tt.parameters(model)


def test_the_network_is_shared_and_folds_away(tmp_path) -> None:
    """One embedding and first layer for all blocks, a second layer each; the fold gives the same outputs and is plain."""
    model = seeded(llama)
    tt.attach(model, tt.PrefixTuning(tokens=3, hidden=5, std=1.0), name="a")
    width, kv, layers = WIDTH, WIDTH // 2, 2
    assert sum(p.numel() for p in tt.parameters(model)) == 3 * width + 5 * (width + 1) + layers * (5 + 1) * 2 * kv
    want = model(ids()).logits
    model(ids()).logits.sum().backward()
    names = [n for n, p in model.named_parameters() if p.grad is not None]
    assert sum("down" in n for n in names) == 2  # the shared layer and its bias, once
    fold(model, "a")
    torch.testing.assert_close(model(ids()).logits, want)
    assert [p.shape for p in tt.parameters(model)] == [(3, kv)] * 4 and all(p.requires_grad for p in tt.parameters(model))
    tt.save(model, tmp_path)
    fresh = seeded(llama)
    tt.load(fresh, tmp_path)
    torch.testing.assert_close(fresh(ids()).logits, want)
    with pytest.raises(tt.Unsupported, match="no part that only training needs"):
        fold(model, "a")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_keeps_a_few_rows_for_backward(dtype: torch.dtype) -> None:
    """p rows of keys, values, queries and outputs a batch entry and block, beside what attention keeps anyway; no mask."""
    p, n, t, layers = 4, 3, 32, 2
    model = seeded(llama).to(dtype).train()
    x = torch.randn(n, t, WIDTH, dtype=dtype, requires_grad=True)
    model.requires_grad_(False)

    def kept() -> int:
        with saved_bytes(model, beside=(x,)) as saved:
            model.model(inputs_embeds=x, use_cache=False).last_hidden_state.sum()
        return saved.total

    floor = kept()
    tt.attach(model, tt.PrefixTuning(tokens=p))
    size = torch.finfo(dtype).bits // 8
    # keys and values stand in all four heads when attention keeps them; a float32 sum of exponentials a query and head
    rows = layers * n * p * (4 * WIDTH * size + 4 * 4)
    small = layers * 2 * p * WIDTH // 2 * size  # the parameters in the activations' dtype
    assert kept() - floor <= rows + small


def test_errors_say_what_to_do() -> None:
    with pytest.raises(tt.ShapeMismatch, match="tokens must be an integer of at least 1"):
        tt.PrefixTuning(tokens=0)
    with pytest.raises(tt.Unsupported, match="blocks and attention modules"):
        tt.attach(seeded(llama), tt.PrefixTuning(), targets="mlp.up")
    with pytest.raises(tt.Unsupported, match="gated=False"):
        tt.attach(seeded(bloom), tt.PrefixTuning(gated=True))
    model = seeded(llama)
    tt.attach(model, tt.PrefixTuning(), name="p")
    with pytest.raises(tt.NotMergeable):
        tt.merge(model, "p")
    with pytest.raises(tt.Unsupported, match="already acts"):
        tt.attach(model, tt.PrefixTuning(), name="p")


def test_a_prefix_stands_beside_lora_and_a_factor_weighs_it() -> None:
    model = seeded(llama)
    base = model(ids(), use_cache=False).logits
    tt.attach(model, tt.LoRA(rank=2), targets="attn.q | attn.v", name="lora")
    tt.attach(model, tt.PrefixTuning(tokens=3, std=1.0), name="prefix", layers=[0])
    both = model(ids(), use_cache=False).logits
    tt.activate(model, "prefix", "lora")
    torch.testing.assert_close(model(ids(), use_cache=False).logits, both)
    path = "model.layers.0.self_attn"
    tt.activate(model, "prefix")
    with tt.core.activation.scaled(model, {path: 0.0}):
        torch.testing.assert_close(model(ids(), use_cache=False).logits, base)
        with pytest.raises(tt.Unsupported, match="cache"):
            model(ids(), use_cache=True)
    torch.testing.assert_close(model(ids(), use_cache=False).logits, both)  # the LoRA starts at zero


def test_two_threads_run_one_model(tmp_path) -> None:
    """What tokens add is a value of the call, not a state of the modules."""
    from concurrent.futures import ThreadPoolExecutor

    model = seeded(llama)
    tt.attach(model, tt.PromptTuning(tokens=3), name="prompt")
    tt.attach(model, tt.VPT(tokens=2), name="deep")
    batches = [ids(2, 4 + i % 3) for i in range(12)]
    with torch.no_grad():
        want = [model(b).logits for b in batches]
        with ThreadPoolExecutor(4) as pool:
            got = list(pool.map(lambda b: _logits(model, b), batches))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def _logits(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(batch).logits
