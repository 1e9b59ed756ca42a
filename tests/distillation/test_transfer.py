"""A whole transfer between two tiny decoders of other sizes and tokenizers; the generator is a canned server."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import trimtab as tt
from tiny_decoder import ANIMALS, COLOURS, settings, write_decoder
from tiny_text import write_jsonl
from trimtab.core.errors import Busy, Unsupported
from trimtab.core.files import locked
from trimtab.distillation import pipeline
from trimtab.distillation.side import Side
from trimtab.training.errors import ConfigError, RunError

ANSWERS = ["yes", "no"]  # with blanks before them, both would begin with the small tokenizers' blank
SEEDS = ["is it an animal: old cat?", "is it an animal: red?", "is it an animal: new small blue?"]


class Server(BaseHTTPRequestHandler):
    """Answers completions with items 4 to 10; half of them are off the task."""

    asked: list[dict] = []
    fail_after: int | None = None

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Server.asked.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
        if Server.fail_after is not None and len(Server.asked) > Server.fail_after:
            self.send_error(503, "gone")
            return
        draw = random.Random(body["seed"])
        texts = []
        for _ in range(body["n"]):
            items = []
            for number in range(4, 11):
                word = draw.choice(ANIMALS + COLOURS)
                more = " ".join(draw.sample(["small", "old", "new", "wet", "dry", "big"], draw.randint(0, 3)))
                real = " ".join(f"is it an animal: {more} {word}?".split())
                items.append(f" {real if number % 2 else f'buy {more} {word} now {draw.randint(0, 99)}'}\n{number + 1}.")
            texts.append({"text": "".join(items).removesuffix("11.") + "\n"})
        payload = json.dumps({"choices": texts}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *args: object) -> None:
        """Quiet."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    httpd = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}/v1"
    httpd.shutdown()


@pytest.fixture(autouse=True)
def fresh_server() -> None:
    Server.asked, Server.fail_after = [], None


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A source with a trained adapter, a wider target with another vocabulary, real inputs."""
    folder = tmp_path_factory.mktemp("transfer")
    tt.train(settings(folder, epochs=6))
    write_decoder(folder / "target", width=48, layers=1, vocabulary=330)
    inputs = sorted({f"is it an animal: {a} {b}?".replace("  ", " ") for a in ("", "small", "old new") for b in ANIMALS + COLOURS})
    write_jsonl(folder / "real.jsonl", [{"text": text} for text in inputs])
    return folder


def config(base: Path, output: Path, server: str, **changes) -> dict:
    how = {"epochs": 8, "learning_rate": 1e-2, "batch_size": 8, "threads": 1}
    quick = {"method": {"name": "LoRA", "rank": 8}, "targets": "linear", **how}
    return {
        "task": "animal_question",
        "template": "{input} ",
        "source": {"model": str(base / "model"), "adapter": str(base / "run" / "adapter")},
        "target": str(base / "target"),
        "seeds": SEEDS,
        "count": 40,
        "discriminator": {"data": str(base / "real.jsonl"), "answers": ANSWERS, "train": quick},
        "generator": {"endpoint": server, "calls": 2},
        "answer_tokens": 12,
        "overlap": 1.0,
        "train": quick | {"epochs": 20},
        "output": str(output),
        **changes,
    }


def right(model, tokenizer, adapter: str | None) -> float:
    """Share of all plain questions whose answer ends in the right label."""
    side = Side(model, tokenizer)
    words = [(word, "true") for word in ANIMALS] + [(word, "false") for word in COLOURS]
    answers = side.answers([f"is it an animal: {word}? " for word, _ in words], tokens=12, adapter=adapter)
    return sum(answer.endswith(label) for answer, (_, label) in zip(answers, words, strict=True)) / len(words)


def loaded(folder: Path, adapter: Path | None = None):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    if adapter is not None:
        tt.load(model, adapter, name="a")
    return model, tokenizer


def test_the_task_arrives_and_the_source_stays(base: Path, tmp_path: Path, server: str) -> None:
    adapter = (base / "run" / "adapter" / "manifest.json").read_bytes()
    result = tt.transfer(config(base, tmp_path / "t", server))
    teacher = right(*loaded(base / "model", base / "run" / "adapter"), "a")
    assert teacher >= 0.75 and right(*loaded(base / "target"), None) <= 0.25
    assert right(*loaded(base / "target", Path(result.adapter)), "a") >= teacher - 0.13
    assert result.made == 40 and result.auc > 0.9 and 0.3 < result.acceptance < 0.8
    assert (base / "run" / "adapter" / "manifest.json").read_bytes() == adapter
    rows = [json.loads(line) for line in (tmp_path / "t" / "synthetic.jsonl").read_text().splitlines()]
    assert len(rows) == 40 and not {row["input"] for row in rows} & set(SEEDS)
    share = sum(row["input"].startswith("is it an animal") for row in rows) / 40
    assert share > 0.9, "the filter let off-task inputs through"
    assert not list((tmp_path / "t").glob("discriminator-*.jsonl")), "real inputs were kept"
    assert Server.asked[0]["path"] == "/v1/completions" and Server.asked[0]["prompt"].endswith("4.")
    calls = len(Server.asked)
    assert tt.transfer(config(base, tmp_path / "t", server)) == result and len(Server.asked) == calls
    with pytest.raises(RunError, match="count = 40 there, 41 now"):
        tt.transfer(config(base, tmp_path / "t", server, count=41))
    # the discriminator serves a later transfer; without one, what is off the task comes through
    later = {"adapter": str(tmp_path / "t" / "discriminator" / "adapter"), "answers": ANSWERS}
    again = tt.transfer(config(base, tmp_path / "later", server, discriminator=later, count=8))
    assert again.auc is None and again.made == 8
    with pytest.warns(UserWarning, match="no filter"):
        bare = tt.transfer(config(base, tmp_path / "bare", server, discriminator=None, count=40))
    rows = [json.loads(line) for line in (tmp_path / "bare" / "synthetic.jsonl").read_text().splitlines()]
    assert bare.acceptance >= 0.8 and sum(row["input"].startswith("buy") for row in rows) > 8


def test_goes_on_where_it_was_cut(base: Path, tmp_path: Path, server: str, monkeypatch) -> None:
    whole = tt.transfer(config(base, tmp_path / "whole", server, count=24))
    asked, Server.asked = [call["seed"] for call in Server.asked], []
    Server.fail_after = 2
    with pytest.raises(RunError, match="refused with status 503"):
        tt.transfer(config(base, tmp_path / "cut", server, count=24))
    Server.fail_after = None

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "CHUNK", 10)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        true = Side.answers
        patched.setattr(Side, "answers", lambda self, p, **k: true(self, p, **k) if len(p) == 10 else killed())
        tt.transfer(config(base, tmp_path / "cut", server, count=24))
    assert len((tmp_path / "cut" / "synthetic.jsonl").read_text().splitlines()) == 20
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(pipeline._Stages, "_train", killed)
        tt.transfer(config(base, tmp_path / "cut", server, count=24))
    result = tt.transfer(config(base, tmp_path / "cut", server, count=24))
    assert [call["seed"] for call in Server.asked if call["seed"] not in asked] == []
    assert (tmp_path / "cut" / "candidates.jsonl").read_bytes() == (tmp_path / "whole" / "candidates.jsonl").read_bytes()
    assert result.auc == whole.auc and result.acceptance == whole.acceptance
    mine, theirs = (loaded(base / "target", Path(r.adapter))[0].state_dict() for r in (result, whole))
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


def test_margins_are_differences_of_logits(base: Path) -> None:
    model, tokenizer = loaded(base / "model")
    side = Side(model, tokenizer, batch_size=2)
    prompts = ["is it?", "a much longer question, is it?", "one"]
    found = side.margins(prompts, ("yes", "no"))
    yes, no = side.answer_tokens(prompts[0], ("yes", "no"))
    for prompt, margin in zip(prompts, found, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        z = model(input_ids=ids).logits[0, -1]
        assert margin == pytest.approx(float(z[yes] - z[no]), abs=1e-5)
        assert float(torch.log_softmax(z, -1)[yes] - torch.log_softmax(z, -1)[no]) == pytest.approx(margin, abs=1e-5)
    with pytest.raises(Unsupported, match="begin with one token"):
        side.answer_tokens("is it?", ("yes", "yes!"))


def test_sampling_depends_on_the_seed_alone(base: Path) -> None:
    side = Side(*loaded(base / "model"))
    state = torch.get_rng_state()
    first = side.continuations("1. cat\n2.", count=3, tokens=6, seed=5)
    torch.rand(7)
    assert side.continuations("1. cat\n2.", count=3, tokens=6, seed=5) == first
    assert side.continuations("1. cat\n2.", count=3, tokens=6, seed=6) != first and len(set(first)) > 1
    torch.set_rng_state(state)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seeds": []}, "seeds"),
        ({"count": 0}, "count"),
        ({"template": "no field"}, "template"),
        ({"discriminator": {}}, "either `adapter`"),
        ({"sauce": 1}, "source"),
        ({"seeds": [str(i) for i in range(10)]}, "raise wanted"),
    ],
)
def test_bad_configurations_are_sentences_and_write_nothing(base: Path, tmp_path: Path, changes: dict, said: str) -> None:
    with pytest.raises((ConfigError, Unsupported), match=said):
        tt.transfer(config(base, tmp_path / "t", "http://127.0.0.1:9", **changes))
    assert not (tmp_path / "t").exists()


def test_an_endpoint_that_is_not_there(base: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be reached"):
        tt.transfer(config(base, tmp_path / "t", "http://127.0.0.1:9/v1"))


def test_a_second_transfer_into_one_output_is_refused(base: Path, tmp_path: Path) -> None:
    with locked(tmp_path / "t", "transfers into"), pytest.raises(Busy, match="another process .* transfers into .*/t"):
        tt.transfer(config(base, tmp_path / "t", "http://127.0.0.1:9/v1"))
    assert not list(tmp_path.iterdir())
