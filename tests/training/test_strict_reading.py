"""What is written twice, differs in looks alone, or is no text: refused, or merged with a line that says so."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from tiny_text import rows, settings, write_jsonl
from trimtab.training import ConfigError, DataError, load_config, train
from trimtab.training.config import to_yaml
from trimtab.training.data import Row, load_rows
from trimtab.training.labels import check_known, label_names, label_of
from trimtab.training.strict import assignments, dump_yaml, parse_json, parse_yaml

COLUMNS = ["text", "label"]
BOM = "\ufeff"


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return path


# -- twice


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,label,label\nx,y,z\n", "a.csv, line 1: the column 'label' is there 2 times"),
        ("a.csv", "text,label, label\nx,y,z\n", "the column 'label' is there 2 times"),
        ("a.csv", "text,label,more,more\nx,y,1,2\n", "the column 'more' is there 2 times"),
        ("a.jsonl", '{"text": "x", "label": "y"}\n{"label": "y", "label": "z"}\n', "line 2 has the key 'label' twice, 'y' and 'z'"),
        ("a.jsonl", '{"text": "x", "label": "y", "more": {"b": 1, "b": 1}}\n', "line 1 has the key 'b' twice"),
        ("a.json", '[{"text": "x", "text": "y", "label": "z"}]', "a.json has the key 'text' twice, 'x' and 'y'"),
    ],
)  # fmt: skip
def test_a_column_or_key_that_is_there_twice_is_refused(tmp_path: Path, name: str, content: str, message: str):
    with pytest.raises(DataError, match=message):
        load_rows(write(tmp_path / name, content), COLUMNS)


def test_a_parquet_column_that_is_there_twice_is_refused(tmp_path: Path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table([pyarrow.array(["x"]), pyarrow.array(["y"]), pyarrow.array(["z"])], names=["text", "label", "label"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="a.parquet: the column 'label' is there 2 times"):
        load_rows(tmp_path / "a.parquet", COLUMNS)


def test_columns_without_a_name_are_left_alone(tmp_path: Path):
    file = write(tmp_path / "a.csv", ",text,label,\n0,x,y,\n1,z,y,\n")  # as pandas writes its index
    assert [row.values for row in load_rows(file, COLUMNS)] == [{"text": "x", "label": "y"}, {"text": "z", "label": "y"}]


@pytest.mark.parametrize("text", ["a: 1\nb: 2\na: 3\n", "x:\n  a: 1\n  b: 2\n  a: 1\n", "x: {a: 1, a: 3}\n", "- {a: 1, 'a': 2}\n"])
def test_a_yaml_that_repeats_a_key_is_refused(text: str):
    with pytest.raises(ConfigError, match="the key 'a' is there twice, in lines"):
        parse_yaml(text, "c.yaml")


def test_a_configuration_that_repeats_a_key_is_refused(tmp_path: Path):
    file = write(tmp_path / "c.yaml", "data: wordnet-supersense\nmethod:\n  name: LoRA\n  rank: 4\n  rank: 64\n")
    with pytest.raises(ConfigError, match="c.yaml is no YAML .*'rank' is there twice, in lines 4 and 5"):
        load_config(file)
    merged = write(tmp_path / "m.yaml", "base: &b {name: LoRA, rank: 4}\nmethod:\n  <<: *b\n  rank: 64\n")
    assert parse_yaml(merged.read_text(), "m")["method"] == {"name": "LoRA", "rank": 64}  # a merge key is meant to be overridden


def test_a_setting_that_is_given_twice_is_refused():
    with pytest.raises(ConfigError, match="epochs is given twice, as 3 and 5"):
        load_config({"data": "wordnet-supersense"}, overrides=["epochs=3", "epochs=5"])
    with pytest.raises(ConfigError, match="written key=value, as in rank=16; found 'rank'"):
        assignments(["rank"], "rank=16")


@pytest.mark.parametrize("order", [["method=LoRA", "method.rank=8"], ["method.rank=8", "method=LoRA"]])
def test_a_section_does_not_undo_what_reaches_into_it(order: list[str]):
    assert load_config({"data": "wordnet-supersense"}, overrides=order).method == {"name": "LoRA", "rank": 8}


# -- no value, no text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x", "label": NaN}\n', r"line 1 has no value in the column 'label' \(found nan\)"),
        ("a.jsonl", '{"text": "  ", "label": "y"}\n', r"line 1 has no value in the column 'text' \(found '  '\)"),
        ("a.csv", 'text,label\n" ",y\n', "line 2 has no value in the column 'text'"),
        ("a.jsonl", '{"text": "\\ud83d", "label": "y"}\n', "line 1 holds half a character"),
        ("a.jsonl", '{"text": [{"content": "\\udc00"}], "label": "y"}\n', "line 1 holds half a character"),
        ("a.jsonl", '{"text": ' + "9" * 5000 + ', "label": "y"}\n', "line 1 is no JSON that can be read"),
        ("a.jsonl", '{"text": ' + "[" * 100_000 + "\n", "line 1 is nested too deeply"),
        ("a.json", "[" * 100_000, "a.json is nested too deeply"),
    ],
)
def test_a_value_that_is_none_or_no_text_is_told_with_its_line(tmp_path: Path, name: str, content: str, message: str):
    with pytest.raises(DataError, match=message):
        load_rows(write(tmp_path / name, content), COLUMNS)


def test_a_parquet_nan_is_no_value(tmp_path: Path):
    import pandas

    pandas.DataFrame({"text": ["x", "y"], "label": [1.0, float("nan")]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="row 2 has no value in the column 'label'"):
        load_rows(tmp_path / "a.parquet", COLUMNS)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path, name: str):
    content = {"a.jsonl": '{"text": "x", "label": "y"}\n', "a.json": '[{"text": "x", "label": "y"}]', "a.csv": "text,label\nx,y\n"}
    assert [row.values for row in load_rows(write(tmp_path / name, BOM + content[name]), COLUMNS)] == [{"text": "x", "label": "y"}]


def test_a_configuration_may_have_a_byte_order_mark(tmp_path: Path):
    assert load_config(write(tmp_path / "c.yaml", BOM + "data: wordnet-supersense\n")).data.source == "wordnet-supersense"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("a: &x {b: *x}\n", "found unconstructable recursive node"),
        ("a: 2024-13-45\n", "holds a value that cannot be read"),
        ("a: " + "9" * 5000 + "\n", "holds a value that cannot be read"),
        ('adapter: "\\ud800"\n', "holds half a character"),
        ("a: \x00\n", "no YAML"),
    ],
)
def test_a_yaml_that_cannot_be_read_is_told(tmp_path: Path, content: str, message: str):
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path / "c.yaml", content))


def test_yaml_reads_numbers_as_people_write_them_and_what_it_writes():
    assert parse_yaml("[1e-3, 1E5, -2e-4, 1.5e3, '1e-3', 1e3foo]", "x") == [1e-3, 1e5, -2e-4, 1500.0, "1e-3", "1e3foo"]
    values = {"a": "1e-3", "b": 1e-3, "c": "yes", "d": None, "e": 1e300, "f": "é"}
    assert parse_yaml(dump_yaml(values), "x") == values
    config = load_config({"data": "wordnet-supersense", "adapter": "1e5", "learning_rate": 1e-5})
    assert load_config(parse_yaml(to_yaml(config), "x")) == config and config.adapter == "1e5"


def test_json_without_fault_reads_as_ever():
    assert parse_json('{"a": [1, {"b": null}], "c": "\\ud83d\\ude00"}', "x") == json.loads('{"a": [1, {"b": null}], "c": "😀"}')


# -- labels


def labelled(*labels: Any) -> list[Row]:
    return [Row({"text": f"t{i}", "label": label}, f"line {i}") for i, label in enumerate(labels, 1)]


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        (("cat", " cat", "dog"), ["cat", "dog"], r"the label 'cat' is written in 2 ways, .*'cat' \(line 1\); ' cat' \(line 2\)"),
        (("very  good", "very good", "bad"), ["bad", "very good"], "'very good' is written in 2 ways"),
        (("caf\u00e9", "cafe\u0301", "bar"), ["bar", "caf\u00e9"], "is written in 2 ways"),
        ((1, 1.0, 0), ["0", "1"], r"the label '1' is written in 2 ways, .*1 \(line 1\); 1.0 \(line 2\)"),
        ((1, "1", 0), ["0", "1"], "the label '1' is written in 2 ways"),
        ((True, "True", False), ["False", "True"], "the label 'True' is written in 2 ways"),
        (("Cat", "cat"), ["Cat", "cat"], r"case of letters alone are different classes: 'Cat' \(line 1\); 'cat' \(line 2\)"),
    ],
)
def test_labels_that_are_one_are_merged_with_a_line_that_says_so(labels: tuple, names: list[str], message: str):
    with pytest.warns(UserWarning, match=message):
        assert label_names(labelled(*labels), "label") == names


@pytest.mark.parametrize(
    ("labels", "names"),
    [(("b", "a", "b"), ["a", "b"]), ((0, 1, 2), ["0", "1", "2"]), ((0.5, 1.5), ["0.5", "1.5"]), ((True, False), ["False", "True"]),
     (("1.0", "2.0"), ["1.0", "2.0"])],
)  # fmt: skip
def test_plain_labels_are_taken_as_they_are(labels: tuple, names: list[str]):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert label_names(labelled(*labels), "label") == names


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ((True, 1, 0), r"labels 'True' \(line 1\) and .* may be one class or two; write truth values alike"),
        ((True, False, "1"), "may be one class or two; write truth values alike"),
        (("1", "1.0", "2"), r"the labels '1' \(line 1\) and '1.0' \(line 2\) are the same number"),
        (("01", "1"), "are the same number"),
        (("a", "NaN"), "line 2: the label 'NaN' is how missing values are written"),
        (("a", ["b"]), r"line 2: a label is a text, a number, or true or false; found \['b'\]"),
    ],
)
def test_labels_that_may_be_one_or_two_are_refused(labels: tuple, message: str):
    with pytest.raises(DataError, match=message):
        label_names(labelled(*labels), "label")


def test_other_splits_are_read_in_the_same_way():
    check_known(labelled(" cat", 1.0, 1), ["1", "cat"], "test", "label")
    with pytest.raises(DataError, match=r"line 2 \(test\): the label 'ct' is not in the training data; nearest: cat"):
        check_known(labelled("cat", "ct"), ["cat", "dog"], "test", "label")
    # of a run from before, whose labels are written as str writes them
    check_known(labelled(1.0, 0.0, " cat "), ["0.0", "1.0", " cat "], "test", "label")
    assert label_of(labelled(1.0)[0], "label", ["1.0"]) == "1.0"


def test_a_run_merges_labels_and_tells(tmp_path: Path):
    config = settings(tmp_path, epochs=1)
    spaced = [{**row, "label": row["label"] + " " * (i % 2)} for i, row in enumerate(rows(42, seed=0))]
    write_jsonl(tmp_path / "data" / "train.jsonl", spaced)
    with pytest.warns(UserWarning, match="the label 'animal' is written in 2 ways"):
        result = train(config)
    assert result.trainable == 2 * (4 * 4 * (32 + 32) + 2 * 4 * (32 + 64)) + 3 * 32 + 3  # a head of three classes


def test_test_rows_that_are_training_rows_are_told(tmp_path: Path):
    config = settings(tmp_path, epochs=1)
    write_jsonl(tmp_path / "data" / "train.jsonl", [{"text": f"red cat {i}", "label": "ab"[i % 2]} for i in range(8)])
    write_jsonl(tmp_path / "data" / "validation.jsonl", [{"text": "dog", "label": "a"}, {"text": "fish", "label": "b"}])
    write_jsonl(tmp_path / "data" / "test.jsonl", [{"text": "tree", "label": "a"}, {"text": "red cat 3 ", "label": "b"}])
    with pytest.warns(UserWarning, match="1 of 2 test rows are, word for word, among the training rows .*test.jsonl, line 2"):
        train(config)
