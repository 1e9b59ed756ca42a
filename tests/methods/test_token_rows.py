"""TokenRows: the rows of some tokens learn, tied or not; all else stays to the bit; equal to peft's trainable tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import trimtab as tt

IDS = torch.tensor([[3, 7, 1, 9, 7], [2, 9, 9, 4, 0]])
TOKENS = (9, 3)


def llama(*, tied: bool = False, scaled: bool = False) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    name = "Gemma3Text" if scaled else "Llama"
    sizes = {"vocab_size": 12, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"head_dim": 8} if scaled else {}
    config = getattr(transformers, f"{name}Config")(
        **sizes, **more, num_key_value_heads=2, tie_word_embeddings=tied, initializer_range=0.2
    )
    cls = transformers.Gemma3ForCausalLM if scaled else transformers.LlamaForCausalLM
    return cls(config).eval()


def shake(model: nn.Module, name: str | None = None, seed: int = 5) -> None:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in tt.parameters(model, name):
            p.add_(0.3 * torch.randn(p.shape, generator=g))


def by_hand(model: nn.Module, values: torch.Tensor, tokens=TOKENS) -> torch.Tensor:
    """The logits of a model whose rows were written; a tied head follows by itself."""
    with torch.no_grad():
        model.get_input_embeddings().weight[list(tokens)] = values
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_only_these_rows_change_and_both_ends_of_a_tie(tied, scaled) -> None:
    model = llama(tied=tied, scaled=scaled)
    table = tt.attach(model, tt.TokenRows(list(TOKENS)))
    assert len(table) == 1 + tied and sum(p.numel() for p in tt.parameters(model)) == 2 * 16
    base = llama(tied=tied, scaled=scaled)
    torch.testing.assert_close(model(input_ids=IDS).logits, base(input_ids=IDS).logits, atol=1e-6, rtol=1e-6)
    shake(model)
    (value,) = tt.parameters(model)
    want = by_hand(llama(tied=tied, scaled=scaled), value.detach())
    assert (want - base(input_ids=IDS).logits).abs().max() > 0.01
    torch.testing.assert_close(model(input_ids=IDS).logits, want, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(v, base.state_dict()[k]) for k, v in model.state_dict().items() if "trimtab" not in k)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_gradients_are_those_of_the_whole_table_at_these_rows(tied) -> None:
    model, whole = llama(tied=tied), llama(tied=tied)
    tt.attach(model, tt.TokenRows(TOKENS))
    for each in (model, whole):
        each(input_ids=IDS, labels=IDS).loss.backward()
    (value,) = tt.parameters(model)
    torch.testing.assert_close(value.grad, whole.get_input_embeddings().weight.grad[list(TOKENS)], atol=1e-6, rtol=1e-5)
    torch.optim.SGD(tt.parameters(model), lr=0.1).step()


def test_an_untied_head_has_values_of_its_own() -> None:
    model = llama()
    assert len(tt.attach(model, tt.TokenRows(TOKENS), targets="embedding | head")) == 2
    assert len(tt.parameters(model)) == 2


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_merge_unmerge_save_and_load(tied, tmp_path) -> None:
    model = llama(tied=tied)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tt.attach(model, tt.TokenRows(TOKENS))
    shake(model)
    want = model(input_ids=IDS).logits
    tt.save(model, tmp_path / "a")
    stored = load_file(next(Path(tmp_path / "a").glob("*.safetensors")))
    assert [tuple(v.shape) for v in stored.values()] == [(2, 16)]
    tt.merge(model, "default")
    torch.testing.assert_close(model(input_ids=IDS).logits, want, atol=1e-5, rtol=1e-5)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    tt.unmerge(model, "default")
    assert torch.equal(model(input_ids=IDS).logits, want)
    tt.detach(model, "default")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    again = llama(tied=tied)
    tt.load(again, tmp_path / "a", trainable=True)
    assert len(tt.parameters(again)) == 1
    torch.testing.assert_close(again(input_ids=IDS).logits, want)


def test_rows_grown_in_another_process_are_no_other_base(tmp_path) -> None:
    def grown(seed: int) -> nn.Module:
        model = llama(tied=True)
        torch.manual_seed(seed)
        model.resize_token_embeddings(15, mean_resizing=False)
        return model

    model = grown(1)
    tt.attach(model, tt.TokenRows(range(12, 15)))
    tt.attach(model, tt.LoRA(rank=2), targets="attention")
    shake(model)
    tt.save(model, tmp_path / "a")
    assert None in json.loads((tmp_path / "a" / "manifest.json").read_text())["base"]["samples"]["model.embed_tokens.weight"]
    other = grown(2)
    assert not torch.equal(other.lm_head.weight, model.lm_head.weight)
    tt.load(other, tmp_path / "a")
    ids = torch.tensor([[1, 14, 13, 12]])
    torch.testing.assert_close(other(input_ids=ids).logits, model(input_ids=ids).logits)
    with pytest.raises(tt.ShapeMismatch, match="15"):
        tt.load(llama(tied=True), tmp_path / "a")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_routed_beside_another_adapter(tied) -> None:
    model = llama(tied=tied)
    tt.attach(model, tt.TokenRows((9,)), name="a")
    tt.attach(model, tt.TokenRows((2, 4)), name="b")
    shake(model)
    want = []
    for name, row in (("a", 0), ("b", 1)):
        tt.activate(model, name)
        want.append(model(input_ids=IDS[row : row + 1]).logits)
    with tt.routed(model, ["a", "b"]):
        torch.testing.assert_close(model(input_ids=IDS).logits, torch.cat(want), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("indices", "match"),
    [((3, 3), "twice: 3"), ((-1,), "at least 0"), ((1.0,), "indices must be"), ("9", "indices must be"), (9, "indices must be")],
)
def test_indices_that_cannot_be_are_refused(indices, match) -> None:
    with pytest.raises(tt.TrimtabError, match=match):
        tt.TokenRows(indices)


def test_any_kind_of_list_will_do_and_none_is_refused() -> None:
    for given in ([4, 2], range(4, 1, -2), torch.tensor([4, 2])):
        assert tt.TokenRows(given) == tt.TokenRows((4, 2))
    with pytest.raises(tt.Unsupported, match="names no tokens"):
        tt.attach(llama(), tt.TokenRows())


def test_rows_outside_of_the_table_are_refused() -> None:
    with pytest.raises(tt.ShapeMismatch, match=r"12 rows, and TokenRows names 12, 40.*resize_token_embeddings"):
        tt.attach(llama(), tt.TokenRows([1, 12, 40]))


def test_beside_lora_on_the_same_table() -> None:
    """In the order of attaching: the rows replace what LoRA made of them."""
    model = llama()
    tt.attach(model, tt.LoRA(rank=2), targets="embedding")
    tt.attach(model, tt.TokenRows(TOKENS))
    shake(model)
    adapted = tt.effective_weight(model, "model.embed_tokens", "default")
    value = next(p for p in tt.parameters(model) if p.shape == (2, 16))
    torch.testing.assert_close(adapted[:, list(TOKENS)], value.detach().t())
    twin = llama()
    with torch.no_grad():
        twin.model.embed_tokens.weight.copy_(adapted.t())
    torch.testing.assert_close(model(input_ids=IDS).logits, twin(input_ids=IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lora", [False, True], ids=["alone", "with LoRA"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_equal_to_peft_in_training(tied, lora) -> None:
    """Three steps of SGD give the same logits."""
    peft = pytest.importorskip("peft")
    ours, theirs = llama(tied=tied), llama(tied=tied)
    if lora:
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], trainable_token_indices=list(TOKENS))
    else:
        config = peft.TrainableTokensConfig(token_indices=list(TOKENS), target_modules=["embed_tokens"])
    theirs = peft.get_peft_model(theirs, config).eval()
    tt.attach(ours, tt.TokenRows(TOKENS))
    if lora:
        tt.attach(ours, tt.LoRA(rank=2, alpha=4), targets="attn.q")
        for path in dict(ours.named_modules()):
            if path.endswith("q_proj"):
                with torch.no_grad():
                    q = theirs.get_submodule(f"base_model.model.{path}")
                    a, b = (p for n, p in tt.named_parameters(ours) if n.startswith(f"{path}."))
                    a.copy_(q.lora_A["default"].weight)
                    b.copy_(q.lora_B["default"].weight)
    mine = torch.optim.SGD(tt.parameters(ours), lr=0.5)
    other = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        for model, optimizer in ((ours, mine), (theirs, other)):
            optimizer.zero_grad()
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
    torch.testing.assert_close(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits, atol=1e-5, rtol=1e-5)
    assert (ours(input_ids=IDS).logits - llama(tied=tied)(input_ids=IDS).logits).abs().max() > 1e-2
