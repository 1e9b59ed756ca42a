"""A model that is changed after adapters came: every verb notices, a grown vocabulary is followed, nothing goes on in silence."""

from __future__ import annotations

import copy

import pytest
import torch
from small_net import IDS, net, shake
from torch import nn

import trimtab as tt


def adapted(**more) -> nn.Module:
    model = net(**more)
    tt.attach(model, tt.LoRA(rank=2), name="a")
    shake(model, "a")
    return model


def replaced(model: nn.Module) -> None:
    model.layers[1].up_proj = nn.Linear(16, 32)


def removed(model: nn.Module) -> None:
    model.layers[1].up_proj = nn.Identity()


def deleted(model: nn.Module) -> None:
    del model.layers[1].down_proj


def cut_at_the_end(model: nn.Module) -> None:
    model.layers = model.layers[:1]


def cut_in_front(model: nn.Module) -> None:
    del model.layers[0]


def swapped(model: nn.Module) -> None:
    model.layers[0], model.layers[1] = model.layers[1], model.layers[0]


def quantised(model: nn.Module) -> None:
    from bitsandbytes.nn import Linear8bitLt

    model.layers[0].up_proj = Linear8bitLt(16, 32)


def shrunk(model: nn.Module) -> None:
    layer = model.layers[1].up_proj
    layer.weight = nn.Parameter(layer.weight.detach()[:20].clone())
    layer.out_features = 20


CHANGES = [replaced, removed, deleted, cut_at_the_end, cut_in_front, swapped, quantised, shrunk]
VERBS = {
    "save": lambda m, tmp: tt.save(m, tmp / "x", name="a"),
    "save for peft": lambda m, tmp: tt.save(m, tmp / "x", name="a", format="peft"),
    "merge": lambda m, tmp: tt.merge(m, "a"),
    "summary": lambda m, tmp: tt.summary(m),
    "parameters": lambda m, tmp: tt.parameters(m),
    "activate": lambda m, tmp: tt.activate(m, "a"),
    "disabled": lambda m, tmp: tt.disabled(m).__enter__(),
    "routed": lambda m, tmp: tt.routed(m, ["a", None]).__enter__(),
    "effective weight": lambda m, tmp: tt.effective_weight(m, "layers.0.attn.q_proj", "a"),
    "attach": lambda m, tmp: tt.attach(m, tt.LoRA(rank=1), targets="layers.0.attn.q_proj", name="b"),
    "load": lambda m, tmp: tt.load(m, tmp / "other", name="b"),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("change", CHANGES)
def test_every_verb_notices_that_a_place_is_gone(change, verb, tmp_path) -> None:
    other = net()
    tt.attach(other, tt.LoRA(rank=1), targets="layers.0.attn.q_proj")
    tt.save(other, tmp_path / "other")
    model = adapted()
    change(model)
    # loading finds first that the base is another one
    with pytest.raises(tt.TrimtabError, match="detach|another base|does not have"):
        VERBS[verb](model, tmp_path)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("change", CHANGES)
def test_detach_takes_off_what_is_left(change) -> None:
    model = adapted()
    kept = list(model.modules())
    change(model)
    tt.detach(model, "a")
    assert not any("trimtab" in name.split(".") for name, _ in model.named_modules())
    assert not any("trimtab" in name for each in kept for name, _ in each.named_modules())
    tt.attach(model, tt.LoRA(rank=1), targets="layers.0.attn.q_proj")


def test_the_first_step_of_training_notices() -> None:
    model = adapted()
    optimizer = torch.optim.SGD(tt.parameters(model), lr=0.1)
    model.layers[1].up_proj = nn.Linear(16, 32)
    model(IDS).square().sum().backward()
    with pytest.raises(tt.Unsupported, match=r"layers\.1\.up_proj, where it acts, is no longer"):
        optimizer.step()


def test_a_module_that_is_put_back_is_found() -> None:
    model = adapted()
    y, old = model(IDS), model.layers[1].up_proj
    replaced(model)
    with pytest.raises(tt.Unsupported, match="another Linear stands there"):
        tt.summary(model)
    model.layers[1].up_proj = old
    tt.summary(model)
    assert torch.equal(model(IDS), y)


def test_wrappers_are_no_change() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = adapted()
    y = model(IDS)
    model.layers[0] = checkpoint_wrapper(model.layers[0])
    model.layers[1].up_proj = torch.compile(model.layers[1].up_proj, backend="eager")
    tt.summary(model)
    torch.testing.assert_close(model(IDS), y)
    tt.summary(nn.DataParallel(model))
    tt.summary(copy.deepcopy(model))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("targets", ["embedding", "linear", "head"])
def test_a_model_cast_after_attaching_computes_in_its_dtype(dtype, targets) -> None:
    model = net()
    tt.attach(model, tt.LoRA(rank=2), targets=targets)
    shake(model)
    y = model(IDS)
    model.to(dtype)
    assert model(IDS).dtype == dtype
    torch.testing.assert_close(model(IDS).float(), y, atol=0.3 if dtype == torch.bfloat16 else 1e-5, rtol=0.1)
    before = model.state_dict()["layers.0.up_proj.weight"].clone()
    tt.merge(model, "default")
    tt.unmerge(model, "default")
    assert torch.equal(model.state_dict()["layers.0.up_proj.weight"], before)


def test_tied_again_after_attaching() -> None:
    model = net()
    tt.attach(model, tt.LoRA(rank=2), targets="head")
    shake(model)
    model.lm_head.weight = model.embed.weight
    tt.summary(model)
    with pytest.raises(tt.NotMergeable, match="tied"):
        tt.merge(model, "default")


# -- vocabularies that grow


def llama(*, tied: bool = False) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 12, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=tied, initializer_range=0.2)).eval()


TOKENS = torch.tensor([[1, 11, 4, 0]])
GROWS = {
    "LoRA": tt.LoRA(rank=2),
    "RsLoRA": tt.RsLoRA(rank=2),
    "Unfreeze": tt.Unfreeze(),
    "TokenRows": tt.TokenRows((1, 4)),
}


@pytest.mark.parametrize("where", ["embedding", "head", "embedding | head"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("method", GROWS)
def test_adapters_follow_a_grown_vocabulary(method, tied, where, tmp_path) -> None:
    """The old tokens' logits stay, the new rows are the base's, and everything works on."""
    model = llama(tied=tied)
    try:
        tt.attach(model, GROWS[method], targets=where)
    except tt.Unsupported:
        assert tied and method != "TokenRows"
        return  # a tie is one site
    shake(model)
    with torch.no_grad():
        y = model(input_ids=TOKENS).logits
    learning = tt.parameters(model)
    model.resize_token_embeddings(15, mean_resizing=False)
    assert [id(p) for p in tt.parameters(model)] == [id(p) for p in learning]
    new = model(input_ids=TOKENS).logits
    torch.testing.assert_close(new[..., :12], y, atol=1e-5, rtol=1e-5)
    with tt.disabled(model):
        base = model(input_ids=TOKENS).logits
    assert not torch.allclose(base[..., :12], y, atol=1e-3)
    ids = torch.tensor([[13, 2, 14]])
    model(input_ids=ids, labels=ids).loss.backward()
    torch.optim.SGD(tt.parameters(model), lr=0.1).step()
    want = model(input_ids=ids).logits
    tt.save(model, tmp_path / "a")
    again = llama(tied=tied)
    again.resize_token_embeddings(15, mean_resizing=False)
    again.load_state_dict({k: v for k, v in model.state_dict().items() if "trimtab" not in k})
    tt.load(again, tmp_path / "a")
    torch.testing.assert_close(again(input_ids=ids).logits, want, atol=1e-5, rtol=1e-5)
    if not (tied and method != "TokenRows"):
        tt.merge(model, "default")
        torch.testing.assert_close(model(input_ids=ids).logits, want, atol=1e-5, rtol=1e-5)


def test_what_cannot_grow_says_so() -> None:
    model = llama()
    tt.attach(model, tt.DoRA(rank=2), targets="embedding")
    shake(model)
    for verb in (lambda m: m.resize_token_embeddings(15), tt.summary, tt.summary):
        with pytest.raises(tt.Unsupported, match="model.embed_tokens grew from 12 to 15 rows after DoRA was attached"):
            verb(model)
    tt.detach(model, "default")
    assert model(input_ids=TOKENS).logits.shape[-1] == 15


@pytest.mark.parametrize("inner", [False, True], ids=["", "inner"])
def test_resizing_sees_the_base_and_is_followed_at_once(inner) -> None:
    """The next forward has the adapters on the grown tables, without a verb in between, and the base holds no update."""
    model = llama()
    tt.attach(model, tt.LoRA(rank=2), targets="embedding" if inner else "embedding | head | attn.q")
    shake(model)
    optimizer = torch.optim.SGD(tt.parameters(model), lr=0.1)
    with torch.no_grad():
        y = model(input_ids=TOKENS).logits
    (model.model if inner else model).resize_token_embeddings(15, mean_resizing=False)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=TOKENS).logits[..., :12], y, atol=1e-5, rtol=1e-5)
    assert torch.equal(model.state_dict()["model.embed_tokens.weight"][:12], llama().model.embed_tokens.weight)
    model(input_ids=TOKENS).logits.square().mean().backward()
    optimizer.step()
    tt.detach(model, "default")
    assert "resize_token_embeddings" not in model.__dict__ and "resize_token_embeddings" not in model.model.__dict__


def test_new_tokens_after_growing() -> None:
    model = llama(tied=True)
    tt.attach(model, tt.LoRA(rank=2), targets="attention")
    model.resize_token_embeddings(14)
    tt.attach(model, tt.TokenRows((12, 13)))
    ids = torch.tensor([[12, 2, 13]])
    model(input_ids=ids, labels=ids).loss.backward()
    torch.optim.SGD(tt.parameters(model), lr=0.1).step()
