"""PromptTuning and PTuning: the counts of the briefs, a prompt written in front by hand, starts, what is refused."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import trimtab as tt
from token_models import HEADS, VOCABULARY, WIDTH, bert, bloom, gpt2, llama, t5, vit
from trimtab.artifacts.fold import fold
from trimtab.core.account import count_flops


def ids(rows: int = 2, tokens: int = 6) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(1))


def seeded(build, **more) -> torch.nn.Module:
    torch.manual_seed(0)
    return build(**more).eval()


def prompted(model: torch.nn.Module, tokens: int = 3) -> torch.Tensor:
    """Attach a prompt of N(0, 1) entries; returns it."""
    tt.attach(model, tt.PromptTuning(tokens=tokens, init="normal", std=1.0), rng=torch.Generator().manual_seed(2))
    return tt.parameters(model)[0]


@pytest.mark.parametrize(("width", "count"), [(4096, 81_920), (2048, 40_960), (3072, 61_440), (1024, 20_480)])
def test_counts_of_the_briefs(width: int, count: int) -> None:
    """20 tokens: CodeLlama-7B, Qwen2.5-Coder-3B, StarCoder2-3B, CodeGen-350M."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(hidden_size=width, num_hidden_layers=2, num_attention_heads=width // 64))
    (row,) = tt.attach(model, tt.PromptTuning(), dry_run=True)
    assert row["parameters"] == count


@pytest.mark.parametrize("build", [llama, bloom])
def test_equals_a_prompt_in_front_of_the_sequence(build) -> None:
    """Positions by difference alone: the base on ``[P; x]``, outputs and the prompt's gradient.

    The models compute their rotations and softmax in float32, whatever their dtype.
    """
    model = seeded(build).double()
    p = prompted(model)
    got = model(ids()).logits
    got.pow(2).sum().backward()
    ours = p.grad.clone()
    with tt.disabled(model):
        front = p.detach().clone().requires_grad_()
        embedded = model.get_input_embeddings()(ids())
        want = model(inputs_embeds=torch.cat([front.expand(2, -1, -1), embedded], 1)).logits[:, 3:]
        want.pow(2).sum().backward()
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours, front.grad, atol=1e-4, rtol=1e-4)


def test_a_table_of_positions_keeps_the_sequences_own() -> None:
    """GPT-2: the prompt takes the table's first rows, the sequence its own; shifted by hand it is the prompt in front."""
    model = seeded(gpt2)
    p = prompted(model)
    got = model(ids(), position_ids=torch.arange(3, 9)[None]).logits
    with tt.disabled(model):
        embedded = model.get_input_embeddings()(ids())
        want = model(inputs_embeds=torch.cat([p.expand(2, -1, -1), embedded], 1)).logits[:, 3:]
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_an_encoders_prompt_is_in_the_sequence_inside_the_blocks() -> None:
    """BERT: the encoder's own blocks on ``[P; h]``, whatever the padding."""
    model = seeded(bert)
    p = prompted(model)
    x, mask = ids(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[0, 4:] = 0
    got = model.bert(x, attention_mask=mask).last_hidden_state
    with tt.disabled(model):
        h = model.bert.embeddings(x)
        full = torch.cat([torch.ones(2, 3), mask], 1)
        additive = torch.zeros(2, 1, 1, 9).masked_fill(full[:, None, None, :] == 0, torch.finfo(torch.float32).min)
        want = model.bert.encoder(torch.cat([p.expand(2, -1, -1), h], 1), attention_mask=additive).last_hidden_state[:, 3:]
    torch.testing.assert_close(got[1], want[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got[0, :4], want[0, :4], atol=1e-5, rtol=1e-5)
    alone = model.bert(x[:1, :4]).last_hidden_state
    torch.testing.assert_close(got[:1, :4], alone, atol=1e-5, rtol=1e-5)


def test_batches_of_one_and_of_many_predict_the_same() -> None:
    """And in a causal model one run of the prompt serves the whole batch: the extra work does not grow with it."""
    model = seeded(llama)
    x = ids(8)
    with count_flops() as counter:
        model(x)
    floor = counter.get_total_flops()
    prompted(model)
    together = model(x).logits
    for row in range(8):
        torch.testing.assert_close(model(x[row : row + 1]).logits, together[row : row + 1], atol=1e-4, rtol=1e-4)
    with count_flops() as counter:
        model(x)
    extra = counter.get_total_flops() - floor
    assert 0 < extra < 0.2 * floor  # in line it would be 3 of 6 tokens: a half


def test_a_window_does_not_hide_the_prompt() -> None:
    """Mistral with a window of 4: caches of the window, static and none agree, and late tokens still see the prompt."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 1, "intermediate_size": 24, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "sliding_window": 4, "initializer_range": 0.4}
    model = MistralForCausalLM(MistralConfig(**sizes, **HEADS)).eval()
    base = model(ids(1, 12)).logits
    prompted(model)
    more = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found = [model.generate(ids(), **more, **c) for c in ({"use_cache": False}, {}, {"cache_implementation": "static"})]
    for other in found[1:]:
        torch.testing.assert_close(torch.stack(other.logits), torch.stack(found[0].logits), atol=1e-4, rtol=1e-4)
    assert (model(ids(1, 12)).logits - base)[0, -1].abs().max() > 1e-3


def test_a_cache_keeps_what_the_prompt_gave() -> None:
    """One run of the prompt a generation; a cache that another adapter filled is not taken for one's own."""
    model = seeded(llama)
    prompted(model)
    runs = []
    model.model.layers[0].mlp.register_forward_hook(lambda m, args, y: runs.append(tuple(args[0].shape[:2])))
    model.generate(ids(), max_new_tokens=4, do_sample=False)
    assert runs == [(1, 3), (2, 6), (2, 1), (2, 1), (2, 1)]
    cache = model(ids(), use_cache=True).past_key_values
    with tt.disabled(model):
        plain = model(ids(2, 1), past_key_values=cache).logits
        assert torch.isfinite(plain).all()
    tt.attach(model, tt.PromptTuning(tokens=2, init="normal"), name="other")
    tt.activate(model, "other")
    runs.clear()
    model(ids(2, 1), past_key_values=cache)
    assert runs == [(1, 2), (2, 1)]


def test_starts_from_the_vocabulary() -> None:
    model = seeded(llama)
    tt.attach(model, tt.PromptTuning(tokens=5, ids=(4, 7)))
    assert torch.equal(tt.parameters(model)[0], model.get_input_embeddings().weight[[4, 7, 4, 7, 4]])
    drawn = seeded(llama)
    tt.attach(drawn, tt.PromptTuning(tokens=5), rng=torch.Generator().manual_seed(3))
    table = drawn.get_input_embeddings().weight
    assert all(any(torch.equal(row, entry) for entry in table) for row in tt.parameters(drawn)[0])
    encoder = seeded(bert)  # what enters its first block is normed
    tt.attach(encoder, tt.PromptTuning(tokens=2, ids=(4, 7)))
    assert torch.allclose(tt.parameters(encoder)[0], encoder.bert.embeddings(torch.tensor([[4, 7]]))[0])
    pair = seeded(t5)
    tt.attach(pair, tt.PromptTuning(tokens=2, ids=(4, 7)))
    assert torch.equal(tt.parameters(pair)[0], pair.shared.weight[[4, 7]])


def test_the_root_may_be_the_body(tmp_path) -> None:
    model = seeded(llama).model
    want_keys = list(model.state_dict())
    prompted(model)
    x = ids()
    want = model(x).last_hidden_state
    tt.save(model, tmp_path)
    fresh = seeded(llama).model
    tt.load(fresh, tmp_path)
    torch.testing.assert_close(fresh(x).last_hidden_state, want)
    tt.detach(model, "default")
    assert list(model.state_dict()) == want_keys


@pytest.mark.parametrize("config", [tt.PTuning(tokens=3, hidden=8), tt.PTuning(tokens=3, hidden=8, encoder="lstm")])
def test_p_tuning_folds_to_a_prompt(config: tt.MethodConfig) -> None:
    model = seeded(llama)
    tt.attach(model, config, name="p")
    count = sum(p.numel() for p in tt.parameters(model))
    lstm = sum(p.numel() for p in torch.nn.LSTM(WIDTH, 8, 2, bidirectional=True).parameters())
    mlp = {"mlp": 2 * WIDTH * 8 + 8 * 8 + 2 * 8 + WIDTH, "lstm": lstm + 16 * 16 + 16 + 16 * WIDTH + WIDTH}[config.encoder]
    assert count == 3 * WIDTH + mlp
    want = model(ids()).logits
    fold(model, "p")
    torch.testing.assert_close(model(ids()).logits, want)
    assert [p.shape for p in tt.parameters(model)] == [(3, WIDTH)]
    assert isinstance(tt.core.state.state_of(model).groups["p"].adapters[0].config, tt.get("PromptTuning"))


def test_what_is_refused() -> None:
    with pytest.raises(tt.Unsupported, match="target the encoder"):
        tt.attach(seeded(t5), tt.PromptTuning(), targets=lambda path, module: path in ("decoder.block.0", "decoder.block.1"))
    with pytest.raises(tt.Unsupported, match="enters at the first block"):
        tt.attach(seeded(llama), tt.PromptTuning(), layers=[1])
    with pytest.raises(tt.ShapeMismatch, match="init='normal'"):
        tt.attach(seeded(vit), tt.PromptTuning())
    with pytest.raises(tt.ShapeMismatch, match="0 to 31"):
        tt.attach(seeded(llama), tt.PromptTuning(ids=(99,)))
    with pytest.raises(tt.ShapeMismatch, match="at least 0, one or more"):
        tt.PromptTuning(ids=())


def test_tokens_on_their_way_between_blocks() -> None:
    """A hook that puts a copy in the hidden states' place changes nothing, recomputation or not; two checkpoints, one within the
    other, hand the inner one tensors without their tokens: an error, not another result."""
    model = seeded(bert)
    p = prompted(model)
    want = model(ids()).logits
    want.sum().backward()
    gradient, p.grad = p.grad, None
    hook = model.bert.encoder.layer[0].register_forward_hook(lambda module, args, y: y * 1)
    torch.testing.assert_close(model(ids()).logits, want)
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    model(ids()).logits.sum().backward()
    torch.testing.assert_close(p.grad, gradient, atol=1e-5, rtol=1e-4)
    hook.remove()
    with pytest.raises(tt.Unsupported, match="lost on the way to bert.encoder.layer.1"):
        checkpoint(lambda: model(ids()).logits, use_reentrant=False).sum().backward()
