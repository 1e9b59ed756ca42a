"""Prompts, rejection sampling and measures of a transfer, with stub generators and filters."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from trimtab.core.errors import Unsupported
from trimtab.distillation.measures import area_under_curve, squared_mmd
from trimtab.distillation.prompts import Prompts
from trimtab.distillation.synthesis import TooFewAccepted, draw

SEEDS = ["a red fox", "the old bridge", "two grey cats", "some warm bread", "a long winter"]
PROMPTS = Prompts(name="noun_category", template="Definition: {input}\nCategory:")


def test_generator_prompt_is_an_open_list() -> None:
    assert PROMPTS.generator(SEEDS[:2]) == (
        "Here are 10 examples of noun category:\n\n1. a red fox\n2. the old bridge\n3."
    )
    assert PROMPTS.generator(["two\nlines  here"]).endswith("1. two lines here\n2.")


def test_question_and_task_texts() -> None:
    assert PROMPTS.question("a red\nfox") == "a red fox\nIs the above question from noun category dataset?"
    assert PROMPTS.task("a red fox") == "Definition: a red fox\nCategory:"


@pytest.mark.parametrize(
    ("continuation", "items"),
    [
        (" six\n7. seven\n8. eight\n9. nine\n10. ten\n\nmore text", ["six", "seven", "eight", "nine", "ten"]),
        (" six\n7. seven\n8. ei", ["six", "seven"]),  # the last one is cut off
        (" six\n7. seven\n", ["six", "seven"]),
        (" six\n7. seven\n11. eleven\n", ["six", "seven"]),  # lost count
        (" six\n7.\n8. eight\n", ["six", "eight"]),  # an empty item is none
        (" six\n7. a\n8. b\n9. c\n10. d\n11. e\n", ["six", "a", "b", "c", "d"]),  # more than was asked for
        ("", []),
        (" six", []),
    ],
)
def test_parser(continuation: str, items: list[str]) -> None:
    assert PROMPTS.parse(continuation, seeds=5) == items


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Prompts(name="  "), "empty"),
        (lambda: Prompts(name="x", template="no field"), "{input}"),
        (lambda: Prompts(name="x", answers=(" yes", " yes")), "both"),
        (lambda: PROMPTS.generator([]), "at least one seed"),
        (lambda: PROMPTS.generator(["fine", 3]), "non-empty text"),
        (lambda: PROMPTS.generator([str(i) for i in range(10)]), "raise wanted"),
    ],
)
def test_prompts_refuse(make, said: str) -> None:
    with pytest.raises(Unsupported, match=said.replace("{", "\\{")):
        make()


class Stub:
    """Writes ``per_call`` different texts a call, in an order that depends on the call alone."""

    def __init__(self, per_call: int = 1):
        self.per_call, self.calls, self.orders = per_call, 0, []

    def __call__(self, seeds, call: int) -> list[str]:
        self.calls += 1
        self.orders.append(tuple(seeds))
        return [f"w{call} x{call} y{call} z{call} item{i} of{i} mine{i}{call}" for i in range(self.per_call)]


def test_draws_exactly_what_is_needed(tmp_path) -> None:
    every = Stub()
    draws = draw(every, lambda texts: [1.0] * len(texts), SEEDS, target=8, file=tmp_path / "a.jsonl")
    assert (draws.drawn, draws.acceptance, every.calls) == (8, 1.0, 8)
    assert len(set(draws.accepted)) == 8 and not set(draws.accepted) & set(SEEDS)
    assert len(set(every.orders)) > 1, "the seeds stand in another order in every call"
    other = Stub()
    draws = draw(other, lambda texts: [1.0 if int(t[1 : t.index(" ")]) % 2 else -1.0 for t in texts], SEEDS, target=8,
                 file=tmp_path / "b.jsonl")  # fmt: skip
    assert (draws.drawn, draws.acceptance, other.calls) == (16, 0.5, 16)


def test_nothing_accepted_is_an_error_with_the_share(tmp_path) -> None:
    with pytest.raises(TooFewAccepted, match=r"0 of 3 were accepted \(0.0 %"):
        draw(Stub(), lambda texts: [-1.0] * len(texts), SEEDS, target=3, file=tmp_path / "a.jsonl", cap=10)
    with pytest.raises(TooFewAccepted, match="repetitions"):
        draw(lambda seeds, call: [SEEDS[0]], None, SEEDS, target=3, file=tmp_path / "b.jsonl", cap=5)
    with pytest.raises(TooFewAccepted, match="after 15 calls, 0 different"):
        draw(lambda seeds, call: [], None, SEEDS, target=3, file=tmp_path / "c.jsonl", cap=5)
    with pytest.raises(Unsupported, match="target=0"):
        draw(Stub(), None, SEEDS, target=0, file=tmp_path / "d.jsonl")


def test_repetitions_are_dropped_before_they_are_judged(tmp_path) -> None:
    texts = iter([["A red  fox", "one two three four", "one two three four"], ["one two three five", "quite another thing"]])
    judged: list[str] = []

    def score(fresh):
        judged.extend(fresh)
        return [1.0] * len(fresh)

    draws = draw(lambda seeds, call: next(texts), score, SEEDS, target=2, file=tmp_path / "a.jsonl")
    assert judged == ["one two three four", "quite another thing"]  # three of four words in order are more than 0.7
    assert draws.repeated == 3


def test_goes_on_after_a_kill(tmp_path) -> None:
    file, whole = tmp_path / "cut.jsonl", tmp_path / "whole.jsonl"
    score = lambda texts: [float(len(t) % 3) - 0.5 for t in texts]  # noqa: E731
    expected = draw(Stub(3), score, SEEDS, target=9, file=whole)
    lines = whole.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:6]) + lines[6][:9])  # the second call is cut off in the middle of a row
    again = Stub(3)
    got = draw(again, score, SEEDS, target=9, file=file)
    assert got.accepted == expected.accepted and file.read_bytes() == whole.read_bytes()
    finished = Stub(3)
    assert draw(finished, score, SEEDS, target=9, file=file).accepted == expected.accepted and finished.calls == 0
    assert all(json.loads(line) for line in file.read_text().splitlines())


def test_area_under_curve_counts_pairs() -> None:
    rng = torch.Generator().manual_seed(0)
    p, n = torch.randint(0, 6, (9,), generator=rng).float(), torch.randint(0, 5, (7,), generator=rng).float()
    pairs = (p[:, None] > n).double() + 0.5 * (p[:, None] == n).double()
    assert area_under_curve(p, n) == pytest.approx(float(pairs.mean()), abs=1e-12)
    assert area_under_curve(torch.ones(3), torch.zeros(2)) == 1.0


def test_squared_mmd_is_that_of_the_definition() -> None:
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(200, 8, generator=rng), torch.randn(200, 8, generator=rng)
    assert squared_mmd(x, x) == pytest.approx(0, abs=1e-12)
    same, shifted = squared_mmd(x, y), squared_mmd(x, y + 1)
    assert same == pytest.approx(0.010, abs=0.004) and shifted == pytest.approx(0.237, abs=0.03)
    k = lambda a, b: torch.exp(-(a - b).square().sum() / (2 * 1.7**2)).item()  # noqa: E731
    a, b = x[:4].double(), y[:3].double()
    mean = lambda u, v: sum(k(p, q) for p in u for q in v) / (len(u) * len(v))  # noqa: E731
    assert squared_mmd(a, b, bandwidth=1.7) == pytest.approx(mean(a, a) + mean(b, b) - 2 * mean(a, b), abs=1e-12)


@pytest.mark.parametrize("overlap", [0.5, 0.7, 1.0])
def test_repetitions_are_those_of_a_plain_search(overlap: float, tmp_path: Path) -> None:
    """Every pair by its longest common subsequence, from the table of all prefixes."""
    words = [f"w{i}" for i in range(12)]
    dice = random.Random(3)
    texts = [" ".join(dice.choices(words, k=dice.randint(1, 9))) for _ in range(400)]
    kept: list[list[str]] = [["w0", "w1", "w2"]]
    for text in texts:
        new = text.split()
        if all(longest(new, old) < overlap * max(len(new), len(old)) for old in kept):
            kept.append(new)
    found = draw(
        lambda seeds, call: texts if call == 0 else [f"other{call}"], None, ["w0 w1 w2"], target=len(kept) - 1,
        file=tmp_path / "f.jsonl", seed=0, overlap=overlap,
    )  # fmt: skip
    assert found.accepted == [" ".join(each) for each in kept[1:]]
    assert 20 < len(kept) < len(texts)


def longest(a: list[str], b: list[str]) -> int:
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]
