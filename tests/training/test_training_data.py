"""Rows from files, the packaged set, and bad input told with its line."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tiny_text import rows, write_jsonl
from trimtab.training.config import DataConfig
from trimtab.training.data import load_rows, load_splits
from trimtab.training.errors import DataError
from trimtab.training.sampler import EpochSampler

COLUMNS = ["text", "label"]


def test_packaged_data_has_the_counts_its_readme_states():
    splits = load_splits(DataConfig(source="wordnet-supersense"), COLUMNS)
    assert {name: len(found) for name, found in splits.items()} == {"train": 8000, "validation": 1600, "test": 2400}
    counts = Counter(row.values["label"] for row in splits["train"])
    assert len(counts) == 20 and set(counts.values()) == {400}


def test_csv_and_parquet_read_the_same_as_jsonl(tmp_path: Path):
    import pandas

    entries = rows(9, seed=0)
    expected = [row.values for row in load_rows(write_jsonl(tmp_path / "a.jsonl", entries), COLUMNS)]
    pandas.DataFrame(entries).to_csv(tmp_path / "a.csv", index=False)
    pandas.DataFrame(entries).to_parquet(tmp_path / "a.parquet")
    assert [row.values for row in load_rows(tmp_path / "a.csv", COLUMNS)] == expected == entries
    assert [row.values for row in load_rows(tmp_path / "a.parquet", COLUMNS)] == expected


def test_held_out_rows_are_disjoint_and_repeatable(tmp_path: Path):
    write_jsonl(tmp_path / "all.jsonl", [{"text": f"t{i}", "label": "a"} for i in range(40)])
    config = DataConfig(source=str(tmp_path / "all.jsonl"), validation_fraction=0.25)
    first, again, other = (load_splits(config, COLUMNS, seed=seed) for seed in (3, 3, 4))
    texts = {split: [row.values["text"] for row in found] for split, found in first.items()}
    assert len(texts["validation"]) == 10 and sorted(texts["train"] + texts["validation"]) == sorted(f"t{i}" for i in range(40))
    assert first == again and first != other


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "is empty"),
        ("a.jsonl", '{"text": "x", "label": "y"}\n{"text": \n', "a.jsonl, line 2 is no JSON"),
        ("a.jsonl", "[1]\n", "line 1 must be a JSON object; found list"),
        ("a.jsonl", '{"txt": "x", "label": "y"}\n', "line 1 has no column 'text'; found .*; nearest: txt"),
        ("a.jsonl", '{"text": null, "label": "y"}\n', "line 1 has no value in the column 'text'"),
        ("a.csv", "text,label\nx,y,z\n", "line 2 has not the 2 fields"),
        ("a.csv", 'text,label\n"x,y\n', "a.csv, line .* is no CSV"),
        ("a.csv", "text,label\n", "is empty"),
        ("a.parquet", "none of it", "is no Parquet file"),
        ("a.tsv", "x", "has the suffix '.tsv'"),
    ],
)
def test_bad_files_are_told_with_their_line(tmp_path: Path, name: str, content: str, message: str):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        load_rows(tmp_path / name, COLUMNS)


def test_text_that_is_not_utf8(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xff", "label": "a"}\n')
    with pytest.raises(DataError, match="not UTF-8"):
        load_rows(tmp_path / "a.jsonl", COLUMNS)


@pytest.mark.parametrize(
    ("source", "message"),
    [("missing.jsonl", "there is no data file or folder"), ("./nowhere", "there is no data file or folder")],
)
def test_missing_sources(source: str, message: str):
    with pytest.raises(DataError, match=message):
        load_splits(DataConfig(source=source), COLUMNS)


def test_unknown_hub_id_names_the_packaged_sets(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match=r"no packaged set \(wordnet-supersense\)"):
        load_splits(DataConfig(source="nobody/nothing-here"), COLUMNS)


def test_folder_without_a_training_file(tmp_path: Path):
    write_jsonl(tmp_path / "test.jsonl", rows(3, seed=0))
    with pytest.raises(DataError, match="has no training split; found test"):
        load_splits(DataConfig(source=str(tmp_path)), COLUMNS)


@pytest.mark.parametrize("bucket", [True, False])
def test_sampler_gives_every_row_once_and_another_order_each_epoch(bucket: bool):
    lengths = [(7 * i) % 23 for i in range(101)]
    sampler = EpochSampler(lengths, batch_size=8, seed=5, bucket=bucket)
    first = list(sampler)
    assert sorted(first) == list(range(101)) and list(sampler) == first
    sampler.set_epoch(1)
    assert sorted(sampler) == list(range(101)) and list(sampler) != first


def test_buckets_pad_less():
    lengths = [(7 * i) % 23 for i in range(400)]

    def padding(bucket: bool) -> int:
        order = list(EpochSampler(lengths, batch_size=8, seed=0, bucket=bucket))
        batches = [[lengths[i] for i in order[k : k + 8]] for k in range(0, 400, 8)]
        return sum(max(batch) * len(batch) - sum(batch) for batch in batches)

    assert padding(True) < padding(False) / 5
