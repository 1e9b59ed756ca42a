"""Generation: greedy is the argmax, a cache and company in the batch change nothing, and stopping early changes no reading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab as tt
from tiny_decoder import rows, write_decoder
from trimtab.tasks.instructions import encoding, generation
from trimtab.tasks.instructions.readers import Reader


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A random decoder with a LoRA that moves it, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder: Path = write_decoder(tmp_path_factory.mktemp("decoder"))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tt.attach(model, tt.LoRA(rank=2), rng=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    for parameter in tt.parameters(model):
        torch.nn.init.normal_(parameter, std=0.2)
    model.generation_config.do_sample, model.generation_config.temperature = True, 2.0  # must not matter
    return model, AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def prompts(decoder: tuple) -> list[list[int]]:
    return [decoder[1](entry["instruction"])["input_ids"] for entry in rows(9, seed=3)]


def test_greedy_is_the_argmax_one_token_at_a_time(decoder: tuple, prompts: list):
    model, tokenizer = decoder
    texts = generation.generate(model, tokenizer, prompts, new_tokens=6, batch_size=4)
    for prompt, text in zip(prompts, texts, strict=True):
        ids = list(prompt)
        for _ in range(6):
            best = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            ids.append(best)
            if best == tokenizer.eos_token_id:
                break
        assert text == tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)


@pytest.mark.parametrize("beams", [1, 4])
def test_cache_and_batch_size_change_nothing(decoder: tuple, prompts: list, beams: int):
    model, tokenizer = decoder
    options = {"new_tokens": 8, "beams": beams}
    alone = generation.generate(model, tokenizer, prompts, batch_size=1, **options)
    assert len(set(alone)) > 1
    assert generation.generate(model, tokenizer, prompts, batch_size=8, **options) == alone
    assert generation.generate(model, tokenizer, prompts, batch_size=8, cache=False, **options) == alone


def test_a_text_stops_where_it_is_done(decoder: tuple, prompts: list):
    model, tokenizer = decoder
    whole = generation.generate(model, tokenizer, prompts, new_tokens=8, batch_size=4)
    word = whole[0][2:4]
    reader = Reader("label", (word,))
    calls: list[int] = []
    forward = model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return forward(*args, **kwargs)

    model.forward = counted
    try:
        generation.generate(model, tokenizer, prompts[:1], new_tokens=8, batch_size=1)
        until_the_end = len(calls)
        (text,) = generation.generate(model, tokenizer, prompts[:1], new_tokens=8, batch_size=1, done=reader.done)
    finally:
        del model.forward
    assert len(calls) - until_the_end < until_the_end
    assert whole[0].startswith(text) and reader.read(text, published=True) == reader.read(whole[0], published=True) == word


def test_the_assistants_end_stops_a_text(decoder: tuple):
    import copy

    tokenizer = copy.deepcopy(decoder[1])
    assert generation._ends(tokenizer) == [tokenizer.eos_token_id]
    tokenizer.chat_template = "{% for m in messages %}<|user|>{{ m['content'] }}<|system|>\n{% endfor %}"
    assert generation._ends(tokenizer) == [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|system|>")]


def test_best_option_is_the_likeliest_text(decoder: tuple, prompts: list):
    model, tokenizer = decoder
    options = [" true", " false", " it is an animal"]
    choices, expected = [], []
    for prompt in prompts:
        tails = [tokenizer(option, add_special_tokens=False)["input_ids"] for option in options]
        choices.append(
            [{"input_ids": prompt + tail, "labels": [encoding.IGNORE] * len(prompt) + tail} for tail in tails]
        )
        scores = []
        for tail in tails:
            logits = model(input_ids=torch.tensor([prompt + tail])).logits[0].log_softmax(-1)
            scores.append(sum(logits[len(prompt) + i - 1, token].item() for i, token in enumerate(tail)))
        expected.append(max(range(3), key=scores.__getitem__))
    assert generation.best_option(model, tokenizer, choices, batch_size=4) == expected
