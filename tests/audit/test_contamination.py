"""Contamination: planted copies are found at their strength, nothing else is, and the harness says so beside the accuracy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tiny_decoder import settings
from tiny_text import write_jsonl
from trimtab.audit.contamination import contamination, contamination_of_run
from trimtab.cli import main
from trimtab.training import DataError, train
from trimtab.training.overlap import exact_key, masked_key, overlaps

LONG = "a waiter had 22 customers in his section if 14 of them left and the rest had 4 people at each table how many tables"


def kinds(train: list[str], tests: list[str], **options) -> list[str | None]:
    pairs = [[(f"{name} {i}", text) for i, text in enumerate(texts)] for name, texts in (("train", train), ("test", tests))]
    return [match.kind for match in overlaps(*pairs, **options)]


def test_keys():
    assert exact_key("The 2 dogs' (big) Tails!") == exact_key("the 2 dogs big tails") != exact_key("the 3 dogs big tails")
    assert masked_key("He has twenty-five dogs, 1,250.5 cats") == masked_key("he has 3 dogs 4 cats.") == "hehas0dogs0cats"


def test_planted_copies_are_found_at_their_strength():
    planted = [
        LONG.upper().replace("section", "section .") + " ?",  # case, punctuation and blanks
        LONG.replace("22", "thirty-one").replace("4", "nine"),  # other numbers
        "once more: " + LONG.replace("waiter", "cook"),  # most of its sequences of words
        "a waiter and 4 people at each table",  # a few words
        "something else altogether",
    ]
    assert kinds(["unrelated text", LONG, "more of it"], planted) == ["exact", "masked", "pieces", None, None]
    assert kinds([LONG], planted, n=None) == ["exact", "masked", None, None, None]
    assert kinds([LONG], planted[2:3], share=1.0) == [None]


def test_the_closest_training_text_is_named():
    (match,) = overlaps([("a", LONG + " x"), ("b", LONG), ("c", LONG[:60])], [("t", LONG)])
    assert (match.kind, match.share, match.found, match.where) == ("exact", 1.0, "b", "t")
    (part,) = overlaps([("c", LONG[:60]), ("d", LONG[:90])], [("t", LONG)], share=1.0)
    assert part.kind is None and part.found == "d"
    words = masked_words = len(LONG.split())
    held = len(LONG[:90].rsplit(" ", 1)[0].split())  # the last word of the cut is not whole
    assert part.share == pytest.approx((held - 7) / (masked_words - 7)) and words > 20


def test_pieces_of_many_training_texts_do_not_add_up():
    halves = [LONG[: len(LONG) // 2], LONG[len(LONG) // 2 :]]
    assert kinds(halves, [LONG], share=0.6) == [None]


def test_files_and_the_command(tmp_path: Path, capsys: pytest.CaptureFixture):
    train_file = tmp_path / "mawps.json"
    train_file.write_text(json.dumps([{"original_text": f"{LONG} {i}"} for i in range(3)]))
    clean = write_jsonl(tmp_path / "clean" / "test.jsonl", [{"instruction": "nothing in common with it"}])
    dirty = write_jsonl(tmp_path / "AddSub" / "test.jsonl", [{"instruction": f"{LONG}, 1?"}, {"instruction": f"{LONG} 7?"}])
    found = contamination([train_file], [clean, dirty], columns=["instruction", "original_text"])
    assert found.contaminated() == {"clean": 0, "AddSub": 1}
    assert found.contaminated(at_least="masked")["AddSub"] == 2
    with pytest.raises(DataError, match="entry 1 has no text in the columns instruction"):
        contamination([train_file], [clean])
    files = ["--train", str(train_file), "--test", str(dirty), "--column", "instruction", "--column", "original_text"]
    assert main(["audit", "contamination", *files, "--out", str(tmp_path / "found.json")]) == 0
    shown = capsys.readouterr().out
    assert "AddSub" in shown and "100.0" in shown
    stored = json.loads((tmp_path / "found.json").read_text())
    assert [match["kind"] for match in stored["matches"]["AddSub"]] == ["exact", "masked"]
    assert main(["audit", "contamination", *files, "--strict"]) == 1
    assert main(["audit", "contamination"]) == 2
    assert "give a run or a configuration" in capsys.readouterr().err


def test_a_run_tells_what_it_has_seen(tmp_path: Path):
    config = settings(tmp_path, epochs=1, evaluation={"new_tokens": 2})
    data = tmp_path / "data" / "boolq"
    entries = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    fresh = [{**entry, "instruction": f"unheard of {i}: {entry['instruction']}"} for i, entry in enumerate(entries[:6])]
    write_jsonl(data / "test.jsonl", [*entries[:2], *fresh])
    result = train(config)
    assert result.metrics["boolq"]["seen"] == 0.25 and "clean" in result.metrics["boolq"]
    found = contamination_of_run(tmp_path / "run")
    assert found.contaminated() == {"boolq": 2}
    write_jsonl(data / "test.jsonl", fresh)
    clean = train({**config, "output": str(tmp_path / "clean")}).metrics["boolq"]
    assert clean["seen"] == 0.0 and "clean" not in clean
