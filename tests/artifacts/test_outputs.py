"""What the tools write: never over what they read, whole or not at all, and nothing left by those that were killed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from bases import make, save
from saved_adapters import adapter, net

import trimtab as tt
from cli.test_cli_artifacts import run
from killed import deaths
from trimtab.artifacts.sketch_plan import BaseSketch

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def inputs(tmp_path):
    """Two adapters, a base, a compressed adapter and a sketch, in a folder of their own."""
    for i, name in enumerate("ab"):
        adapter(tmp_path / name, tt.LoRA(rank=2), i, "attn.q", model=make("llama"))
    save(make("llama"), tmp_path / "base")
    tt.compress(tmp_path / "a", tmp_path / "a.tern")
    tt.compress(tmp_path / "a", tmp_path / "rel.tern", reference=tmp_path / "b")
    tt.compress_base(tmp_path / "base", tmp_path / "sketch", sketch=BaseSketch(bits=4))
    os.symlink(tmp_path / "a", tmp_path / "link")
    return tmp_path


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


OVER_INPUT = {
    "combine": lambda d: tt.combine([d / "a", d / "b"], d / "a"),
    "combine, second": lambda d: tt.combine([d / "a", d / "b"], d / "b", weights=[1, 1]),
    "combine, by a link": lambda d: tt.combine([d / "a", d / "b"], d / "link"),
    "combine, a link is read": lambda d: tt.combine([d / "link", d / "b"], d / "a"),
    "combine, by a detour": lambda d: tt.combine([d / "a", d / "b"], d / "b" / ".." / "a"),
    "combine, base": lambda d: tt.combine([d / "a", d / "b"], d / "base", base=d / "base"),
    "merge": lambda d: tt.merge_checkpoint(d / "a", d / "base", out=d / "a"),
    "merge, base": lambda d: tt.merge_checkpoint(d / "a", d / "base", out=d / "base"),
    "convert": lambda d: tt.convert(d / "a", d / "a"),
    "project": lambda d: tt.project(d / "a", d / "a", target=d / "base"),
    "project, target": lambda d: tt.project(d / "a", d / "base", target=d / "base"),
    "average": lambda d: tt.average([d / "a", d / "b"], d / "b", scheme="uniform"),
    "compress": lambda d: tt.compress(d / "a", d / "a"),
    "compress, reference": lambda d: tt.compress(d / "a", d / "b", reference=d / "b"),
    "expand": lambda d: tt.expand(d / "a.tern", d / "a.tern"),
    "expand, reference": lambda d: tt.expand(d / "rel.tern", d / "b", reference=d / "b"),
    "compress_base": lambda d: tt.compress_base(d / "base", d / "base"),
    "expand_base": lambda d: tt.expand_base(d / "sketch", d / "sketch"),
}  # fmt: skip


@pytest.mark.parametrize("case", OVER_INPUT)
def test_an_output_is_none_of_the_inputs(case, inputs) -> None:
    before = content(inputs)
    with pytest.raises(tt.Unsupported, match="is one of the inputs, and writing there would overwrite it"):
        OVER_INPUT[case](inputs)
    assert content(inputs) == before


def test_the_commands_refuse_too(inputs, capsys) -> None:
    before = content(inputs)
    assert "is one of the inputs" in run(
        capsys, "merge", inputs / "a", inputs / "b", "--base", inputs / "base", "--out", inputs / "base", code=2
    )
    both = inputs / "a", inputs / "b"
    for name in "ab":
        assert "exists already" in run(capsys, "merge", *both, "--out", inputs / name, code=2)
    file = inputs / "rows.jsonl"
    file.write_text('{"instruction": "x"}\n')
    assert "is one of the inputs" in run(
        capsys, "audit", "contamination", "--train", file, "--test", file, "--out", file, code=2
    )  # fmt: skip
    assert file.read_text() == '{"instruction": "x"}\n'
    file.unlink()
    assert content(inputs) == before


def test_a_path_for_a_list_is_a_list_of_one(inputs) -> None:
    tt.combine(str(inputs / "a"), inputs / "c")
    tt.combine(inputs / "a", inputs / "d")
    path = "model.layers.0.self_attn.q_proj"
    found = []
    for name in "acd":
        model = make("llama")
        tt.load(model, inputs / name)
        found.append(tt.effective_weight(model, path))
    torch.testing.assert_close(found[0], found[1])
    assert torch.equal(found[1], found[2])
    assert tt.search_weights(make("llama"), str(inputs / "a"), lambda m: 0.0, budget=2).weights == [0.0]


def test_an_adapter_saved_again_is_the_same_reference(inputs) -> None:
    """Of earlier saves the bytes may differ; the tensors count."""
    model = make("llama")
    tt.load(model, inputs / "b")
    again = tt.save(model, inputs / "b2")
    assert content(again).keys() == content(inputs / "b").keys()
    from safetensors.torch import load_file, save_file

    from trimtab.core.checkpoint import _hash, _seal

    manifest = json.loads((again / "manifest.json").read_text())
    tensors = load_file(again / manifest["file"])
    save_file(tensors, again / manifest["file"], metadata={"format": "pt", "more": "bytes"})
    manifest["sha256"] = _hash(again / manifest["file"])
    (again / "manifest.json").write_text(json.dumps(manifest | {"seal": _seal(manifest)}))
    tt.expand(inputs / "rel.tern", inputs / "wide", reference=again)
    with pytest.raises(tt.CheckpointMismatch, match="from another adapter"):
        tt.expand(inputs / "rel.tern", inputs / "wider", reference=inputs / "a")


# -- kills


WRITERS = {
    "merge": lambda d: tt.merge_checkpoint(d / "a", d / "base", out=d / "out"),
    "combine": lambda d: tt.combine([d / "a", d / "b"], d / "out"),
    "compress": lambda d: tt.compress(d / "a", d / "out"),
    "expand": lambda d: tt.expand(d / "a.tern", d / "out"),
    "compress_base": lambda d: tt.compress_base(d / "base", d / "out", sketch=BaseSketch(bits=4)),
    "expand_base": lambda d: tt.expand_base(d / "sketch", d / "out"),
}  # fmt: skip


@pytest.mark.parametrize("case", [c if c in ("compress", "expand") else pytest.param(c, marks=pytest.mark.slow) for c in WRITERS])
def test_a_tool_that_dies_anywhere_can_be_called_again_and_leaves_nothing_beside(case, inputs) -> None:
    before = sorted(os.listdir(inputs))
    WRITERS[case](inputs)
    wanted = tree(inputs / "out")
    remove(inputs / "out")
    for number in deaths(lambda: WRITERS[case](inputs)):
        if case in ("merge", "expand_base") and (inputs / "out").exists():  # it died after its last step
            with pytest.raises(tt.TrimtabError, match="exists already"):
                WRITERS[case](inputs)
        else:
            WRITERS[case](inputs)
        assert tree(inputs / "out") == wanted, number
        assert sorted(os.listdir(inputs)) == sorted([*before, "out"]), number
        remove(inputs / "out")
    assert number > 3


def tree(path: Path) -> dict[str, bytes]:
    return content(path) if path.is_dir() else {"": path.read_bytes()}


def remove(path: Path) -> None:
    import shutil

    shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize("case", ["merge", "compress", "compress_base"])
def test_a_place_that_cannot_be_written_is_a_sentence(case, inputs) -> None:
    (inputs / "out").write_text("mine")
    with pytest.raises(tt.TrimtabError, match="exists already|exists and is no sketch|cannot be written") as found:
        WRITERS[case](inputs) if case != "compress" else tt.compress(inputs / "a", inputs / "out" / "x.tern")
    assert "out" in str(found.value) and (inputs / "out").read_text() == "mine" and net() is not None
