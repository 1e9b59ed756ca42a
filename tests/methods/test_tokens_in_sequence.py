"""Prompts and prefixes in models whose tokens see each other by other ways than plain attention: recurrent and hybrid models,
several rotary tables, compressed keys, attention of another kind."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import trimtab as tt
from sweep.tiny_models import Built, build
from sweep.tokens import P, T, cached, ids, prefix, prompt, prompted, widened
from token_models import llama

#: one of a kind: recurrent alone; attention in later blocks; both in one block; two softmaxes; a dynamic mask; a norm behind the
#: rotation; several rotary tables; compressed keys; a convolution; a decoder alone of a pair
KINDS = ["mamba", "jamba", "falcon_h1", "diffllama", "doge", "hunyuan_v1_dense", "gemma3_text", "deepseek_v3", "lfm3", "trocr"]
LINE = ["mamba", "jamba", "falcon_h1", "diffllama", "doge", "hunyuan_v1_dense", "lfm3"]


def model_of(kind: str) -> nn.Module:
    classes = {"trocr": "TrOCRForCausalLM"}
    built = build(kind, classes.get(kind))
    assert isinstance(built, Built), built
    torch.manual_seed(0)
    return widened(built)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_equals_the_tokens_in_front_and_a_cache_changes_nothing(kind: str) -> None:
    model = model_of(kind)
    assert prompt(model) == "equal"
    assert cached(model) == "equal"


@pytest.mark.parametrize("kind", ["jamba", "falcon_h1", "gemma3_text", "deepseek_v3", "lfm3"])
def test_a_prefix_acts_where_there_is_attention(kind: str) -> None:
    model = model_of(kind)
    assert prefix(model) == "equal"
    assert cached(model) == "equal"


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("mamba", "none was found"), *((kind, r"cannot join at|does more with its keys") for kind in ("diffllama", "doge"))],
)
def test_a_prefix_is_refused_where_keys_do_not_act_as_those_in_front(kind: str, reason: str) -> None:
    model = model_of(kind)
    before = list(model.state_dict())
    with pytest.raises(tt.Unsupported, match=reason):
        tt.attach(model, tt.PrefixTuning(tokens=P))
    assert list(model.state_dict()) == before and all(p.requires_grad for p in model.parameters())


def test_a_prefix_equals_a_cache_that_was_filled_with_it() -> None:
    """The learned keys and values in the model's own cache, the text's positions told by hand."""
    from transformers import DynamicCache

    torch.manual_seed(0)
    model = llama().eval()
    tt.attach(model, tt.PrefixTuning(tokens=P, std=1.0))
    x, cache = ids() % 32, DynamicCache(config=model.config)
    got = model(input_ids=x).logits
    with tt.disabled(model):
        for index, adapter in enumerate(tt.core.state.state_of(model).groups["default"].adapters):
            key, value = (t.unflatten(-1, (2, -1)).transpose(0, 1).expand(2, -1, -1, -1) for t in adapter.keys_values())
            cache.update(key, value, index)
        mask, positions = torch.ones(2, P + T, dtype=torch.long), torch.arange(T)[None]
        want = model(input_ids=x, past_key_values=cache, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", LINE)
def test_the_prompts_gradient_is_that_of_the_tokens_in_front(kind: str) -> None:
    model = model_of(kind)
    p = prompted(model)
    model(input_ids=ids()).logits.pow(2).mean().backward()
    with tt.disabled(model):
        front = p.detach().clone().requires_grad_()
        both = torch.cat([front.expand(2, -1, -1), model.get_input_embeddings()(ids())], 1)
        model(inputs_embeds=both).logits[:, P:].pow(2).mean().backward()
    torch.testing.assert_close(p.grad, front.grad, atol=1e-5, rtol=1e-3)


def test_rows_of_a_batch_may_have_prompts_of_several_lengths() -> None:
    """Also with padding, and over several calls with a cache: each row as if it were alone."""
    model = model_of("jamba")
    for name, count in (("a", 2), ("b", 4)):
        tt.attach(model, tt.PromptTuning(tokens=count, init="normal", std=1.0), name=name)
    x, mask = ids(3), torch.ones(3, T, dtype=torch.long)
    mask[0, :2] = 0
    more = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        with tt.routed(model, ["b", None, "a"]):
            got = model.generate(x * mask, attention_mask=mask, pad_token_id=0, **more).logits
        for row, names in enumerate((["b"], [], ["a"])):
            tt.activate(model, *names)
            seen = mask[row].bool()
            alone = model.generate(x[row : row + 1, seen], attention_mask=mask[row : row + 1, seen], pad_token_id=0, **more).logits
            torch.testing.assert_close(torch.stack(got)[:, row], torch.stack(alone)[:, 0], atol=1e-4, rtol=1e-4)


def test_a_cache_that_begins_with_learned_tokens_is_as_long_as_the_text() -> None:
    """What counts its tokens goes on: a second turn, beams, copies. Without the adapter it is refused, and so is one that it did
    not begin, or one without room."""
    from transformers import StaticCache

    model = model_of("jamba")
    prompted(model)
    x, more = ids(), {"do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        cache = model(input_ids=x[:, :4], use_cache=True).past_key_values
        assert cache.get_seq_length() == 4
        for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
            assert other.get_seq_length() == 4
            got = model(input_ids=x[:, 4:5], past_key_values=other).logits
            torch.testing.assert_close(got, model(input_ids=x[:, :5]).logits[:, 4:])
        whole = model.generate(x, max_new_tokens=4, min_new_tokens=4, use_cache=False, num_beams=2, **more)
        assert torch.equal(model.generate(x, max_new_tokens=4, min_new_tokens=4, num_beams=2, **more), whole)
        with tt.disabled(model):
            plain = model(input_ids=x, use_cache=True).past_key_values
            with pytest.raises(tt.Unsupported, match="does not act in this call"):
                model(input_ids=x[:, 4:5], past_key_values=cache)
        with pytest.raises(tt.Unsupported, match="filled without the learned tokens"):
            model(input_ids=x[:, :1], past_key_values=plain)
        with pytest.raises(tt.Unsupported, match="static cache has room for the text"):
            model(input_ids=x, past_key_values=StaticCache(config=model.config, max_cache_len=16), use_cache=True)


def test_padding_does_not_move_a_text_away_from_its_prompt() -> None:
    """Without positions in the call, a model counts padding in them, which differences alone do not show; a prompt would."""
    torch.manual_seed(0)
    model = llama().eval()
    prompted(model)
    x, mask = ids() % 32, torch.ones(2, T, dtype=torch.long)
    mask[0, :3] = 0
    got = model(input_ids=x, attention_mask=mask).logits
    torch.testing.assert_close(got[:1, 3:], model(input_ids=x[:1, 3:]).logits, atol=1e-5, rtol=1e-5)


def test_a_second_turn_with_the_cache_of_the_first() -> None:
    model = model_of("diffllama")
    prompted(model)
    more = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    first = model.generate(ids(1), use_cache=True, **more)
    longer = torch.cat([first.sequences, ids(1, 4)], 1)
    want = model.generate(longer, use_cache=False, **more).sequences
    got = model.generate(longer, past_key_values=first.past_key_values, use_cache=True, **more).sequences
    assert torch.equal(got, want)


def test_checkpointing_and_what_is_collected() -> None:
    """Gradient checkpointing changes no gradient; hidden states, attentions and routers are the text's."""
    model = model_of("jamba").train()
    p = prompted(model)
    model(input_ids=ids()).logits.pow(2).mean().backward()
    plain, p.grad = p.grad, None
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(input_ids=ids(), use_cache=False).logits.pow(2).mean().backward()
    torch.testing.assert_close(p.grad, plain, atol=1e-6, rtol=1e-4)
    model.eval().gradient_checkpointing_disable()
    model.set_attn_implementation("eager")
    more = {"output_hidden_states": True, "output_attentions": True, "output_router_logits": True, "labels": ids()}
    found = model(input_ids=ids(), **more)
    with tt.disabled(model):
        base = model(input_ids=ids(), **more)
    for key in ("hidden_states", "attentions", "router_logits"):
        assert [t.shape for t in found[key]] == [t.shape for t in base[key]], key
    assert torch.isfinite(found.loss)


@pytest.mark.parametrize("kind", ["gemma3n_text", "gemma4_text"])
def test_models_that_read_ids_beside_embeddings_are_refused(kind: str) -> None:
    model = model_of(kind)
    before = {path: type(module) for path, module in model.named_modules()}
    with pytest.raises(tt.Unsupported, match="reads more of its tokens than their embeddings"):
        tt.attach(model, tt.PromptTuning(tokens=P, init="normal"))
    assert {path: type(module) for path, module in model.named_modules()} == before
    assert all(p.requires_grad for p in model.parameters())


def test_a_model_without_weights_is_tried_when_it_has_some() -> None:
    with torch.device("meta"):
        model = llama()
    tt.attach(model, tt.PromptTuning(tokens=P, init="normal"))
    body = model.model._modules["trimtab"]
    assert body.manner is None
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
        for name, buffer in llama().named_buffers():
            model.get_buffer(name).copy_(buffer)
    model(input_ids=ids() % 32)
    assert body.manner == "beside"


@pytest.mark.parametrize("kind", ["openai-gpt", "jamba"])
def test_fresh_tokens_that_no_block_takes_are_refused_at_once(kind: str) -> None:
    """VPT in blocks that know nothing of a longer sequence: a mask of the text's length, in a written-out attention or a mixer."""
    model = model_of(kind)
    before = list(model.state_dict())
    with pytest.raises(tt.Unsupported, match="the model fails with it"):
        tt.attach(model, tt.VPT(tokens=P))
    assert list(model.state_dict()) == before


def test_a_prompt_of_an_encoder_does_not_go_on_from_a_cache() -> None:
    """BERT as a language model, not as a decoder: its tokens look at later ones, so that a cache would hold the prompt twice."""
    from transformers import BertLMHeadModel

    from token_models import bert

    torch.manual_seed(0)
    model = BertLMHeadModel(bert().config).eval()
    prompted(model)
    more = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    assert model.generate(ids() % 32, use_cache=False, **more).shape == (2, T + 2)
    with pytest.raises(tt.Unsupported, match="use_cache=False"):
        model.generate(ids() % 32, use_cache=True, **more)
