"""A task head that no adapter trains is said at attach; ``head=`` lets it learn beside the adapter."""

from __future__ import annotations

import warnings

import pytest
import torch

import trimtab as tt

transformers = pytest.importorskip("transformers")

SMALL = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 30,
    "max_position_embeddings": 16, "num_labels": 3, "pad_token_id": 0,
}  # fmt: skip
IDS = torch.randint(1, 30, (4, 6), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**SMALL)).save_pretrained(tmp_path)
    return tmp_path


def load(folder, kind="SequenceClassification"):
    torch.manual_seed(1)
    return getattr(transformers, f"BertFor{kind}").from_pretrained(folder, num_labels=3)


def told(model, **more) -> tuple[list[str], list[str]]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        table = tt.attach(model, tt.LoRA(rank=2), **more)
    return [str(w.message) for w in found], table.notes


@pytest.mark.parametrize("kind", ["SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice"])
def test_a_fresh_head_that_would_stay_random_is_told(folder, kind) -> None:
    (warning,), (note,) = told(load(folder, kind))
    assert warning == note and "head=True" in note
    assert "is fresh (no checkpoint filled it), and is neither trained nor saved" in note


def test_a_head_of_its_checkpoint_is_no_alarm(folder, tmp_path) -> None:
    load(folder).save_pretrained(tmp_path / "tuned")
    warned, (note,) = told(load(tmp_path / "tuned"))
    assert not warned and "the head classifier stays as its checkpoint has it" in note


def test_a_model_from_its_config_is_told_too() -> None:
    (warning,), _ = told(transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL)))
    assert "the head classifier stays as it is: it is neither trained nor saved" in warning


@pytest.mark.parametrize("more", [{"head": False}, {"trainable": False}, {"targets": "linear | head"}, {"head": True}])
def test_nothing_is_said_where_it_is_decided(folder, more) -> None:
    assert told(load(folder), **more) == ([], [])


def test_nothing_is_said_of_a_head_that_learns_already(folder) -> None:
    model = load(folder)
    tt.attach(model, tt.Unfreeze(), name="task")
    assert told(model, name="task") == ([], [])


@pytest.mark.parametrize("head", [True, "classifier", ["classifier"]])
def test_the_head_learns_beside_the_adapter_and_is_saved_with_it(folder, tmp_path, head) -> None:
    model = load(folder)
    before = model.classifier.weight.detach().clone()
    table = tt.attach(model, tt.LoRA(rank=2), head=head, exclude="pooler")
    assert {"classifier", "classifier.bias"} <= set(table.column("path"))
    optimizer = torch.optim.SGD(tt.parameters(model), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(IDS, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        optimizer.step()
    tt.save(model, tmp_path / "a")
    assert torch.equal(model.classifier._parameters["weight"], before)  # the base's own is never written
    assert not torch.equal(tt.effective_weight(model, "classifier"), before)
    from safetensors import safe_open

    (file,) = (tmp_path / "a").glob("*.safetensors")
    with safe_open(file, "pt") as stored:
        assert "classifier.weight.value" in stored.keys()


def test_a_language_model_has_no_task_head() -> None:
    config = transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=30, num_key_value_heads=2
    )
    assert told(transformers.LlamaForCausalLM(config)) == ([], [])
    with pytest.raises(tt.NoMatch, match="no head of this LlamaForCausalLM is known; name it"):
        tt.attach(transformers.LlamaForCausalLM(config), tt.LoRA(rank=2), head=True)


def test_a_fresh_output_embedding_is_told(tmp_path) -> None:
    config = transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=30, num_key_value_heads=2
    )
    transformers.LlamaModel(config).save_pretrained(tmp_path)
    (warning,), _ = told(transformers.LlamaForCausalLM.from_pretrained(tmp_path))
    assert "the head lm_head is fresh" in warning
