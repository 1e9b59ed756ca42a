"""Instruction tuning under trimtab train and eval: it learns, resumes to the bit, scores what is written, refuses nonsense."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from interrupted import Interrupted, interrupted_in
from tiny_decoder import rows, settings
from tiny_text import write_jsonl
from trimtab.tasks import instruction_tuning
from trimtab.training import DataError, evaluate, train

LEARNS = {"epochs": 12, "learning_rate": 2e-2, "method": {"name": "LoRA", "rank": 8}}


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = (folder / "adapter").glob("*.safetensors")
    return load_file(file)


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder with a run that has learnt its rows, and its result."""
    folder = tmp_path_factory.mktemp("learnt")
    return folder, train(settings(folder, **LEARNS))


def test_a_run_learns_and_stores_its_predictions(learnt: tuple):
    folder, result = learnt
    scores = result.metrics["boolq"]
    assert scores["accuracy"] == scores["published"] == 1.0 and scores["unread"] == 0.0 and scores["constant"] == 0.5
    assert result.metrics["validation"]["token_accuracy"] == 1.0
    lines = [json.loads(line) for line in (folder / "run" / "predictions" / "boolq.jsonl").read_text().splitlines()]
    assert len(lines) == 12 and lines[0]["where"].endswith("test.jsonl, line 1") and all(line["right"] for line in lines)
    assert lines[1]["output"] == "the correct answer is true"
    # LoRA rank 8 on q, o (32x32), k, v (32x16), gate, up, down (32x64) of 2 layers
    assert result.trainable == 2 * 8 * (2 * 64 + 2 * 48 + 3 * 96)


def test_evaluate_in_a_fresh_model_gives_the_same(learnt: tuple, tmp_path: Path):
    folder, result = learnt
    found = evaluate(folder / "run")
    assert found.metrics == {f"boolq/{key}": value for key, value in result.metrics["boolq"].items()}
    assert found.rows == 12 and found.predictions[0]["set"] == "boolq"
    on = evaluate(folder / "run", on="validation").metrics
    assert on["loss"] == pytest.approx(result.metrics["validation"]["loss"], rel=1e-5)
    assert on["token_accuracy"] == 1.0 and "perplexity" in on
    file = write_jsonl(tmp_path / "boolq" / "test.jsonl", rows(6, seed=44))
    assert evaluate(folder / "run", on=str(file)).metrics["boolq/accuracy"] == 1.0
    assert evaluate(folder / "run", inputs=["is it an animal: cat?"]).predictions == [{"output": "the correct answer is true"}]
    with pytest.raises(DataError, match="no split or test set 'bool'; nearest: boolq"):
        evaluate(folder / "run", on="bool")


def test_the_command_line(learnt: tuple, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    from trimtab.cli import main

    folder, _ = learnt
    monkeypatch.chdir(folder)
    assert main(["eval", "run", "--predictions", "p.jsonl"]) == 0
    assert "100.0 +- 0.0" in capsys.readouterr().out
    assert len(Path("p.jsonl").read_text().splitlines()) == 12
    assert main(["eval", "run", "--text", "is it an animal: red?"]) == 0
    assert "the correct answer is false" in capsys.readouterr().out


def test_validation_loss_is_that_of_all_tokens_together(tmp_path: Path):
    results = [train(settings(tmp_path, epochs=1, output=str(tmp_path / f"run{n}"), eval_batch_size=n)) for n in (3, 64)]
    losses = [result.metrics["validation"]["loss"] for result in results]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_accumulation_equals_the_larger_batch(tmp_path: Path):
    # rows differ in the number of their answer's tokens, so a mean of batch means would not do
    entries = [{**entry, "output": entry["output"] + "." * (i % 5)} for i, entry in enumerate(rows(32, seed=0))]
    write_jsonl(tmp_path / "data" / "boolq" / "train.jsonl", entries)
    write_jsonl(tmp_path / "data" / "boolq" / "validation.jsonl", rows(4, seed=1))
    for name, batch, accumulation in (("large", 8, 1), ("small", 2, 4)):
        train(settings(tmp_path, output=str(tmp_path / name), batch_size=batch, accumulation=accumulation))
    large, small = adapter(tmp_path / "large"), adapter(tmp_path / "small")
    for key, value in large.items():
        torch.testing.assert_close(value, small[key], atol=1e-4, rtol=1e-3)


def test_packing_all_rows_is_the_whole_batch(tmp_path: Path):
    changes = {"batch_size": 64, "epochs": 3, "evaluation": {"new_tokens": 2}}
    plain = train(settings(tmp_path, output=str(tmp_path / "plain"), **changes))
    packed = train(settings(tmp_path, output=str(tmp_path / "packed"), packing=True, pack_length=128, **changes))
    assert plain.steps == packed.steps == 3
    one, other = adapter(tmp_path / "plain"), adapter(tmp_path / "packed")
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], atol=1e-4, rtol=1e-3)


def test_activations_computed_again_change_nothing(tmp_path: Path):
    for name in ("kept", "again"):
        changes = {"checkpointing": name == "again", "epochs": 1, "evaluation": {"new_tokens": 2}}
        train(settings(tmp_path, output=str(tmp_path / name), **changes))
    kept = adapter(tmp_path / "kept")
    assert all(torch.equal(value, kept[key]) for key, value in adapter(tmp_path / "again").items())


@pytest.mark.parametrize(("changes", "step"), [({}, 4), ({"packing": True, "batch_size": 3}, 1)], ids=["rows", "packs"])
def test_interrupted_and_resumed_to_the_same_bits(tmp_path: Path, changes: dict, step: int):
    config = settings(tmp_path, **changes, save_every=2, eval_every=3, method={"name": "LoRA", "rank": 2, "dropout": 0.2})
    expected = train({**config, "output": str(tmp_path / "whole")})
    with interrupted_in(step):
        train(config)
    again = train(config)
    whole = adapter(tmp_path / "whole")
    assert all(torch.equal(value, whole[key]) for key, value in adapter(tmp_path / "run").items())
    assert again.metrics == expected.metrics and again.curve == expected.curve


def test_interrupted_while_scoring_keeps_the_finished_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = settings(tmp_path, epochs=1, evaluation={"new_tokens": 12, "readers": {"second": "true/false"}})
    second = write_jsonl(tmp_path / "second.jsonl", rows(6, seed=8))
    config["data"] = {**config["data"], "test": str(second)}
    expected = train({**config, "output": str(tmp_path / "whole")})
    original, done = instruction_tuning._write, []

    def interrupted(config: Any, bundle: Any, found: list, *args: Any) -> list[str]:
        done.append(len(found))
        if len(done) == 2:
            raise Interrupted
        return original(config, bundle, found, *args)

    monkeypatch.setattr(instruction_tuning, "_write", interrupted)
    with pytest.raises(Interrupted):
        train(config)
    assert train(config).metrics == expected.metrics
    assert done == [12, 6, 6]


def test_options_take_the_likeliest_label(learnt: tuple, tmp_path: Path):
    run = shutil.copytree(learnt[0] / "run", tmp_path / "run")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("mode: generate", "mode: options"))
    assert evaluate(run).metrics["boolq/accuracy"] == 1.0


@pytest.mark.parametrize("changes", [
    {"template": {"style": "alpaca"}, "data.max_length": 128}, {"template": {"style": "chat"}}, {"train_on_prompt": True},
    {"base_dtype": "bf16", "precision": "bf16"}, {"method": "VeRA"}, {"label_smoothing": 0.1},
], ids=str)  # fmt: skip
def test_variants_train_and_evaluate(tmp_path: Path, changes: dict):
    config = settings(tmp_path, epochs=1, evaluation={"new_tokens": 2})
    train(config | {k: v for k, v in changes.items() if "." not in k}, overrides={k: v for k, v in changes.items() if "." in k})
    assert evaluate(tmp_path / "run").rows == 12


def refused(tmp_path: Path, error: type[Exception], message: str, **changes: Any) -> None:
    """Training must raise ``error`` with ``message`` and leave nothing behind."""
    config = settings(tmp_path)
    with pytest.raises(error, match=message):
        train(config, overrides=changes)
    assert not (tmp_path / "run").exists()


def test_experiments_without_sense_are_refused(tmp_path: Path):
    refused(tmp_path, DataError, "of 42 rows have a prompt of at least 3 tokens", **{"data.max_length": 3})
    refused(tmp_path, ValueError, "evaluation.readers names 'bolq', which is no test set; nearest: boolq",
            **{"evaluation.readers": {"bolq": "text"}})  # fmt: skip
    refused(tmp_path, ValueError, "line 1: the answer 'false' is no number", **{"evaluation.readers": {"boolq": "number"}})
    refused(tmp_path, ValueError, "options chooses among labels, and boolq is read as a text",
            **{"evaluation.mode": "options", "evaluation.readers": {"boolq": "text"}})  # fmt: skip
    refused(tmp_path, DataError, "has no column 'question'", **{"template.prompt": "{question}"})
    refused(tmp_path, DataError, "52 of 52 rows have no value in the column 'rationale'",
            **{"template.answer": "{rationale}"})  # fmt: skip
    refused(tmp_path, DataError, "no value in the column 'gold'", **{"data.answer": "gold"})
    refused(tmp_path, ValueError, "system belongs to the style chat, found the style plain", **{"template.system": "be kind"})
    refused(tmp_path, ValueError, "does not fit into packs of 8", packing=True, pack_length=8)
    refused(tmp_path, ValueError, "there is no key 'template.promt'; nearest: prompt", **{"template.promt": "x"})


def test_two_sets_under_one_name_are_refused(tmp_path: Path):
    other = write_jsonl(tmp_path / "other" / "boolq" / "test.jsonl", rows(4, seed=1))
    refused(tmp_path, DataError, "two test sets are named 'boolq'", **{"data.test": str(other)})


def test_rows_are_drawn_and_files_of_the_release_are_read(tmp_path: Path):
    from trimtab.tasks.instructions import sources
    from trimtab.tasks.instructions.templates import TemplateConfig

    entries = [{"instruction": f"say {i}", "input": "", "output": f"The answer is {i}.", "answer": f"{i}.0"} for i in range(40)]
    file = tmp_path / "math_10k.json"
    file.write_text(json.dumps(entries))
    test = tmp_path / "dataset" / "SVAMP" / "test.json"
    test.parent.mkdir(parents=True)
    test.write_text(json.dumps([{**entry, "output": ""} for entry in entries[:3]]))
    data = sources.InstructionData(train=str(file), test=[str(test)], limit=20, validation_fraction=0.25)
    found, again = (sources.load(data, TemplateConfig(), seed=3) for _ in range(2))
    assert (len(found.train), len(found.validation)) == (15, 5) and list(found.tests) == ["SVAMP"]
    assert [row.where for row in found.train] == [row.where for row in again.train]
    assert found.train[0].where.startswith(f"{file}, entry ")
    assert [row.where for row in sources.load(data, TemplateConfig(), seed=4).train] != [row.where for row in found.train]
    with pytest.raises(DataError, match="SVAMP has no training split"):
        sources.load(sources.InstructionData(source=str(test.parent)), TemplateConfig(), seed=0)
