"""Configurations: overrides, shorthands, and problems as sentences."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from trimtab.training.config import load_config, parse_override, to_yaml
from trimtab.training.errors import ConfigError

BASE = {"data": "wordnet-supersense"}


def test_defaults_and_shorthands():
    config = load_config(BASE | {"method": "LoRA"})
    assert config.data.source == "wordnet-supersense"
    assert config.method == {"name": "LoRA"}
    assert config.task == "text-classification"


def test_config_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        load_config(BASE).epochs = 7


def test_resolved_yaml_reads_back_the_same(tmp_path: Path):
    config = load_config(BASE, overrides=["method.rank=4", "learning_rate=3e-4", "layers=[0, 1]"])
    (tmp_path / "resolved.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "resolved.yaml") == config
    assert config.learning_rate == 3e-4 and config.layers == [0, 1] and config.method["rank"] == 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [("epochs=3", ("epochs", 3)), ("a.b=[1, 2]", ("a.b", [1, 2])), ("x=null", ("x", None)), ("x=a=b", ("x", "a=b"))],
)
def test_override_values_are_yaml(text: str, expected: tuple):
    assert parse_override(text) == expected


def test_override_reaches_into_a_shorthand():
    config = load_config(BASE | {"method": "LoRA"}, overrides=["method.rank=2", "data.max_length=16"])
    assert config.method == {"name": "LoRA", "rank": 2}
    assert (config.data.source, config.data.max_length) == ("wordnet-supersense", 16)


def test_override_of_a_method_replaces_it_whole():
    assert load_config(BASE | {"method": {"name": "LoRA", "rank": 3}}, overrides=["method=LoRA"]).method == {"name": "LoRA"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rat": 1}, "no key 'learning_rat'; nearest: learning_rate"),
        ({"data": {"source": "x", "txt": "a"}}, "no key 'data.txt'; nearest: text"),
        ({"epochs": 0}, "epochs: input should be greater than 0; found 0"),
        ({"schedule": "liner"}, "schedule: .*'linear', 'cosine' or 'constant'; found 'liner'"),
        ({"method": {"name": "LORA"}}, "no method named 'LORA'; nearest: LoRA"),
        ({"method": {"name": "LoRA", "rnk": 8}}, "LoRA has no hyperparameter 'rnk'; nearest: rank"),
        ({"method": {"name": "LoRA", "rank": 0}}, "rank must be an integer of at least 1"),
        ({"method": {"rank": 8}}, "a method needs its name"),
        ({"data": {}}, "give `source`"),
    ],
)
def test_problems_are_sentences(change: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        load_config(BASE | change)


def test_all_problems_are_told_at_once():
    with pytest.raises(ConfigError, match="epochs.*batch_sizes"):
        load_config(BASE | {"epochs": -1, "batch_sizes": 3})


def test_missing_data_key():
    with pytest.raises(ConfigError, match="the key 'data' is missing"):
        load_config({})


@pytest.mark.parametrize(("content", "message"), [("a: [", "is no YAML"), ("- 1", "must hold `key: value` lines")])
def test_bad_files(tmp_path: Path, content: str, message: str):
    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "c.yaml")


def test_no_such_file(tmp_path: Path):
    with pytest.raises(ConfigError, match="there is no configuration file"):
        load_config(tmp_path / "none.yaml")


def test_override_without_equals():
    with pytest.raises(ConfigError, match="written key=value"):
        load_config(BASE, overrides=["epochs"])


def test_unknown_task_names_the_nearest():
    with pytest.raises(LookupError, match="nearest: text-classification"):
        load_config(BASE | {"task": "text-clasification"})


def test_the_example_is_what_the_demo_runs():
    from trimtab.demo import CONFIG

    example = Path(__file__).resolve().parents[2] / "examples" / "supersense.yaml"
    assert yaml.safe_load(example.read_text()) == CONFIG
