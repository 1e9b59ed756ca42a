"""Templates, masks, batches: the answer alone is learnt, generation sees the same prompt, padding and packing change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab as tt
from tiny_decoder import rows, write_decoder
from trimtab.tasks.instructions import encoding, packing
from trimtab.tasks.instructions.templates import TemplateConfig, segments
from trimtab.training import ConfigError, DataError
from trimtab.training.data import Row


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_decoder(tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def row(**values: Any) -> Row:
    return Row({"instruction": "Add 1 and 2.", "input": "", "output": "The answer is 3.", **values}, "row 1")


def encoded(tokenizer: Any, count: int = 9, *, special: bool = True) -> list[dict[str, Any]]:
    template = TemplateConfig(style="plain", prompt="{instruction} ")
    entries = [Row(values, f"row {i}") for i, values in enumerate(rows(count, seed=1))]
    return encoding.encode_rows(entries, template, tokenizer, max_length=64, on_prompt=False, drop=False)[0]


def learnt(tokenizer: Any, example: dict[str, Any]) -> str:
    return tokenizer.decode([label for label in example["labels"] if label != encoding.IGNORE])


def test_alpaca_frame(tokenizer: Any):
    told = "Below is an instruction that describes a task"
    ends = "Write a response that appropriately completes the request."
    (prompt, _), (answer, learns) = segments(row(), TemplateConfig(), tokenizer)
    assert prompt == f"{told}. {ends}\n\n### Instruction:\nAdd 1 and 2.\n\n### Response:\n"
    assert (answer, learns) == ("The answer is 3.", True)
    ((with_input, _),) = segments(row(input="x"), TemplateConfig(), tokenizer, answer=False)
    assert with_input.startswith(f"{told}, paired with an input that provides further context. {ends}\n\n")
    assert with_input.endswith("### Instruction:\nAdd 1 and 2.\n\n### Input:\nx\n\n### Response:\n")


def test_legacy_whitespace_is_that_of_the_release(tokenizer: Any):
    config, gap = TemplateConfig(legacy_whitespace=True), " " * 16
    (training, _), _ = segments(row(), config, tokenizer)
    ((evaluation, _),) = segments(row(), config, tokenizer, answer=False)
    head, body = training.split("\n\n", 1)
    assert head.endswith("request.  ")
    assert body == f"{gap}### Instruction:\n{gap}Add 1 and 2.\n{gap}\n{gap}### Response:\n{gap}"
    head, body = evaluation.split("\n\n", 1)
    assert head.endswith("request. ") and not head.endswith("request.  ")
    assert body == f"{gap}### Instruction:\n{gap}Add 1 and 2.\n\n{gap}### Response:\n{gap}"


def test_the_answer_and_the_end_token_alone_are_learnt(tokenizer: Any):
    for config in (TemplateConfig(), TemplateConfig(style="plain", prompt="{instruction} "), TemplateConfig(style="chat")):
        ((example,), cut) = encoding.encode_rows([row()], config, tokenizer, max_length=200, on_prompt=False, drop=False)
        assert learnt(tokenizer, example) == "The answer is 3.</s>" and cut == 0
        prompt = encoding.encode_prompt(row(), config, tokenizer)
        assert example["input_ids"][: len(prompt)] == prompt
        assert set(example["labels"][: len(prompt)]) == {encoding.IGNORE}
        assert example["input_ids"].count(tokenizer.bos_token_id) == 1


def test_the_prompt_is_learnt_where_asked(tokenizer: Any):
    config = TemplateConfig(style="plain", prompt="{instruction} ")
    ((example,), _) = encoding.encode_rows([row()], config, tokenizer, max_length=200, on_prompt=True, drop=False)
    assert learnt(tokenizer, example) == "Add 1 and 2. The answer is 3.</s>"


def test_a_piece_across_the_border_does_not_change_the_prompt(tokenizer: Any):
    prompt, answer = "is it an ani", "mal"
    joined = tokenizer(prompt + answer)["input_ids"]
    alone = tokenizer(prompt)["input_ids"]
    assert joined[: len(alone)] != alone, "this test needs a piece that reaches across"
    example = encoding.encode([(prompt, False), (answer, True)], tokenizer, max_length=99, special=True)
    assert example["input_ids"][: len(alone)] == alone and learnt(tokenizer, example) == "mal</s>"


def test_all_turns_of_the_assistant_are_learnt(tokenizer: Any):
    turns = [("system", "be brief"), ("user", "a"), ("assistant", "one"), ("user", "b"), ("assistant", "two")]
    talk = Row({"messages": [{"role": role, "content": text} for role, text in turns]}, "row 1")
    config = TemplateConfig(style="chat", messages="messages")
    ((example,), _) = encoding.encode_rows([talk], config, tokenizer, max_length=99, on_prompt=False, drop=False)
    assert learnt(tokenizer, example) == "one</s>two</s>"
    shown = tokenizer.decode(encoding.encode_prompt(talk, config, tokenizer))
    assert shown.endswith("one</s><|user|>b<|assistant|>")
    with pytest.raises(DataError, match="row 2: the column 'messages' must be a list"):
        segments(Row({"messages": "hello"}, "row 2"), config, tokenizer)


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer: Any):
    import copy

    other = copy.deepcopy(tokenizer)
    other.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(DataError, match="rewrites earlier turns"):
        segments(row(), TemplateConfig(style="chat"), other)
    other.chat_template = None
    with pytest.raises(DataError, match="has no chat template"):
        segments(row(), TemplateConfig(style="chat"), other)


def test_rows_are_cut_on_the_right_without_an_end_token(tokenizer: Any):
    template = TemplateConfig(style="plain", prompt="{instruction} ")
    prompt = len(encoding.encode_prompt(row(), template, tokenizer))
    ((example,), cut) = encoding.encode_rows([row()], template, tokenizer, max_length=prompt + 2, on_prompt=False, drop=False)
    assert len(example["input_ids"]) == prompt + 2 and cut == 1
    assert tokenizer.eos_token_id not in example["input_ids"] and "The answer is 3.".startswith(learnt(tokenizer, example))
    short = {"max_length": prompt, "on_prompt": False}
    with pytest.raises(DataError, match=f"1 of 2 rows have a prompt of at least {prompt} tokens.*first: row 1"):
        encoding.encode_rows([row(), row(instruction="a")], template, tokenizer, drop=False, **short)
    kept, _ = encoding.encode_rows([row(), row(instruction="a")], template, tokenizer, drop=True, **short)
    assert len(kept) == 1
    with pytest.raises(DataError, match="all 1 rows are longer"):
        encoding.encode_rows([row()], template, tokenizer, drop=True, **short)


def test_loss_is_that_of_transformers_row_by_row(model: Any, tokenizer: Any):
    examples = encoded(tokenizer)
    batch = encoding.collator(tokenizer, model)(examples)
    labels = batch.pop("labels")
    assert batch["logits_to_keep"] < labels.shape[1]
    outputs = model(**batch)
    total, count = 0.0, 0
    for example in examples:
        ids, marks = torch.tensor([example["input_ids"]]), torch.tensor([example["labels"]])
        here = int((marks != encoding.IGNORE).sum())
        total += model(input_ids=ids, labels=marks).loss.item() * here
        count += here
    torch.testing.assert_close(encoding.causal_loss(outputs, labels), torch.tensor(total / count), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        encoding.causal_loss(outputs, labels, 7), torch.tensor(total / 7), atol=1e-4, rtol=1e-5
    )  # what the trainer counts over all batches of a step
    sums = encoding.row_sums(outputs, labels)
    assert sums[:, 1].tolist() == [sum(label != encoding.IGNORE for label in e["labels"]) for e in examples]
    assert float(sums[:, 0].sum()) == pytest.approx(total, rel=1e-5)
    full = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    guesses = full.logits[:, :-1].argmax(-1)
    hits = ((guesses == labels[:, 1:]) & (labels[:, 1:] != encoding.IGNORE)).sum(1)
    assert sums[:, 2].tolist() == hits.tolist()


def gradients(model: Any, tokenizer: Any, examples: list[dict[str, Any]]) -> tuple[float, list[torch.Tensor]]:
    batch = encoding.collator(tokenizer, model)(examples)
    labels = batch.pop("labels")
    loss = encoding.causal_loss(model(**batch), labels)
    parameters = list(tt.parameters(model))
    return loss.item(), list(torch.autograd.grad(loss, parameters))


@pytest.mark.parametrize(("name", "attention"), [
    ("LoRA", "sdpa"), ("LoRA", "eager"), ("SeriesAdapter", "sdpa"), ("ParallelAdapter", "sdpa"), ("PrefixTuning", "sdpa"),
    ("PromptTuning", "sdpa"),
])  # fmt: skip
def test_packed_rows_have_the_loss_and_the_gradients_of_separate_ones(model: Any, tokenizer: Any, name: str, attention: str):
    model.set_attn_implementation(attention)
    tt.attach(model, tt.get(name)(), rng=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    for parameter in tt.parameters(model):
        torch.nn.init.normal_(parameter, std=0.1)
    examples = encoded(tokenizer, 11)
    packs = packing.pack(examples, 70)
    assert len(packs) < len(examples) / 2
    loss, grads = gradients(model, tokenizer, examples)
    packed_loss, packed_grads = gradients(model, tokenizer, packs)
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    for one, other in zip(grads, packed_grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-3)


def test_packs_hold_every_example_once_and_are_full():
    draw = torch.Generator().manual_seed(0)
    sizes = torch.randint(3, 40, (200,), generator=draw).tolist()
    examples = [{"input_ids": [i] * size, "labels": [encoding.IGNORE] + [i] * (size - 1)} for i, size in enumerate(sizes)]
    packs = packing.pack(examples, 64)
    assert all(len(p["input_ids"]) == len(p["labels"]) == len(p["position_ids"]) <= 64 for p in packs)
    flat = [token for p in packs for token in p["input_ids"]]
    assert {i: flat.count(i) for i in range(200)} == dict(enumerate(sizes))
    assert len(packs) <= 1.05 * sum(sizes) / 64 + 1
    starts = [label for p in packs for label, at in zip(p["labels"], p["position_ids"], strict=True) if at == 0]
    assert set(starts) == {encoding.IGNORE}  # no part predicts its first token from the part before it
    with pytest.raises(ConfigError, match="does not fit into packs of 20"):
        packing.pack(examples, 20)


class Leaky(torch.nn.Module):
    """A 'decoder' that sums all tokens so far, whatever their positions say."""

    def __init__(self, takes_positions: bool):
        super().__init__()
        self.embedding = torch.nn.Embedding(500, 8)
        self.takes_positions = takes_positions

    def forward(self, input_ids: torch.Tensor, **inputs: torch.Tensor) -> Any:
        if "position_ids" in inputs and not self.takes_positions:
            raise TypeError("unexpected keyword argument 'position_ids'")
        from types import SimpleNamespace

        return SimpleNamespace(logits=self.embedding(input_ids).cumsum(1))


def test_models_that_mix_packed_examples_are_refused(model: Any, tokenizer: Any):
    examples = encoded(tokenizer)
    packing.check_apart(model, examples, encoding.collator(tokenizer, model))
    leaky, fixed = Leaky(True), Leaky(False)
    with pytest.raises(ConfigError, match="lets packed examples see each other"):
        packing.check_apart(leaky, examples, encoding.collator(tokenizer, leaky))
    with pytest.raises(ConfigError, match="takes position_ids, and Leaky does not"):
        packing.check_apart(fixed, examples, encoding.collator(tokenizer, fixed))
