"""Readers of answers: the published rules as they are, their known failures, and the corrected rules beside them."""

from __future__ import annotations

import math

import pytest

from trimtab.tasks.instructions.readers import reader_for
from trimtab.tasks.instructions.scores import score, scores_table, standard_error
from trimtab.training import ConfigError


def both(name: str, text: str) -> tuple:
    """What the published and the corrected reader of a set find."""
    reader = reader_for(name)
    return reader.read(text, published=True), reader.read(text)


@pytest.mark.parametrize(
    ("text", "published", "corrected"),
    [
        ("so 1,234.5 in total, -3", -3.0, -3.0),
        ("", math.inf, math.inf),
        ("The answer is 1,234.", 1234.0, 1234.0),
        ("She sold 3,4 and 5", 5.0, 5.0),
        ("that leaves 10-5", -5.0, 5.0),
        ("The answer is 15 (out of 20).", 20.0, 15.0),
        ("The answer is 49 - 34 = 15 customers. He has 2 tables.", 2.0, 15.0),
        ("The answer is 576.0", 576.0, 576.0),
        ("#### 12", 12.0, 12.0),
        ("\\boxed{7} of 9", 9.0, 7.0),
        ("The answer is −4", 4.0, -4.0),
        ("The answer is 3/4", 4.0, 0.75),
        ("The answer is 12%.", 12.0, 12.0),
        ("The answer is unknown, 8 maybe", 8.0, 8.0),
        ("no digits here", math.inf, math.inf),
    ],
)
def test_numbers(text: str, published: float, corrected: float):
    assert both("gsm8k", text) == (published, corrected)


@pytest.mark.parametrize(
    ("text", "published", "corrected"),
    [
        ("A train covers 9 miles.The answer is (D).", "A", "D"),
        ("Rationale: By Bayes the answer is (A)", "B", "A"),
        ("Each option fails but C", "E", "C"),
        ("A cat sat down. The answer is B", "A", "B"),
        ("the answer is A", "A", "A"),
        ("nothing", "", ""),
    ],
)
def test_letters(text: str, published: str, corrected: str):
    assert both("AQuA", text) == (published, corrected)


@pytest.mark.parametrize(
    ("name", "text", "published", "corrected"),
    [
        ("boolq", "the correct answer is true", "true", "true"),
        ("boolq", "True", "", "true"),
        ("boolq", "it is false that this is true, the correct answer is true", "false", "true"),
        ("boolq", "true or false", "true", ""),
        ("boolq", "untrue", "true", ""),
        ("social_i_qa", "answer12", "answer1", ""),
        ("piqa", "not solution1, so the answer is solution2", "solution1", "solution2"),
        ("winogrande", "Option2", "", "option2"),
        ("hellaswag", "the correct answer is ending4", "ending4", "ending4"),
    ],
)
def test_labels(name: str, text: str, published: str, corrected: str):
    assert both(name, text) == (published, corrected)


def test_what_is_right():
    number = reader_for("SVAMP")
    assert number.right(8.0005, number.answer("8.0", "row")) and not number.right(8.01, 8.0)
    assert not number.right(math.inf, 8.0)
    assert reader_for("own", "text").answer(" The  Cat ", "row") == reader_for("own", "text").read("the cat")
    assert reader_for("own", "yes/no").read("No.") == "no"


def test_answers_that_do_not_parse_and_unknown_sets_are_refused():
    with pytest.raises(ConfigError, match="x.json, entry 3: the answer 'seven' is no number"):
        reader_for("gsm8k").answer("seven", "x.json, entry 3")
    with pytest.raises(ConfigError, match="the answer 'yes' is none of true, false"):
        reader_for("boolq").answer("yes", "row 1")
    with pytest.raises(ConfigError, match="'boolqq' are read is not known; nearest: boolq.*readers.boolqq"):
        reader_for("boolqq")
    with pytest.raises(ConfigError, match="a reader is number, letter, text"):
        reader_for("boolq", "numbers")


def test_generation_may_stop_at_the_first_label_and_never_inside_mathematics():
    assert reader_for("piqa").done("the correct answer is solution1") and not reader_for("piqa").done("the correct")
    assert not reader_for("gsm8k").done("The answer is 4")


def test_scores_on_a_case_by_hand():
    reader = reader_for("boolq")
    texts = ["the correct answer is true", "True", "false or true", "false"]
    metrics, entries = score(reader, texts, ["true", "true", "true", "true"])
    assert metrics["accuracy"] == 0.5 and metrics["published"] == 0.25 and metrics["unread"] == 0.25
    assert metrics["accuracy_se"] == pytest.approx(0.25) == standard_error(0.5, 4)
    assert metrics["constant"] == 1.0 and metrics["rows"] == 4
    assert entries[2]["read"] is None and entries[2]["published_read"] == "false" and not entries[2]["right"]
    table = scores_table({"a": metrics, "b": {**metrics, "accuracy": 0.7, "accuracy_se": 0.0}})
    assert table.records()[-1]["accuracy %"] == "60.0 +- 12.5"
