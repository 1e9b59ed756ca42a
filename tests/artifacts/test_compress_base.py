"""compress_base: what becomes of every tensor, shards, resuming, memory, what is refused."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from sketch_models import BATCHES, IDS, bert, dense_of, gpt2, llama, sketch_of, sketched, weight_files
from transformers import AutoModel, AutoModelForSequenceClassification, GPT2LMHeadModel, LlamaForCausalLM

import trimtab as tt
from trimtab.artifacts import compress_base
from trimtab.artifacts.sketch_writer import SketchWriter
from trimtab.artifacts.source import empty_model
from trimtab.compat.sketched import SketchedWeight
from trimtab.core.account import LiveBytes
from trimtab.core.errors import CheckpointMismatch, NoMatch, ShapeMismatch, Unsupported
from trimtab.kernels.kmeans import kmeans
from trimtab.training.errors import ConfigError


def test_every_tensor(tmp_path):
    """The 7 matrices of each block by k-means and nearest entries; other matrices in 16 bits, vectors as they were."""
    source, out = llama(tmp_path / "a"), tmp_path / "s"
    table = tt.compress_base(source, out, sketch=tt.BaseSketch(bits=3, groups=2, restarts=8))
    dense, found = dense_of(source), sketch_of(out)
    assert dense.keys() == found.keys() and len(table) == len(sketched(out)) == 2 * 7
    for key, W in dense.items():
        if "_proj" not in key:
            kept = W.half() if W.dim() > 1 else W
            assert found[key].dtype == kept.dtype and torch.equal(found[key], kept), key
            continue
        sketch = found[key]
        assert sketch.sketch_table.dtype == torch.float16 and (sketch.bits, sketch.sketch_table.shape[1]) == (3, 2)
        assert sketch.sketch_codes.nbytes == W.numel() * 3 / 8
        values, entries = W.view(-1, W.shape[1] // 2), sketch.sketch_table.float().view(-1, 8)
        nearest = (values[:, :, None] - entries[:, None]).abs().amin(-1)
        torch.testing.assert_close((sketch.dequantize().float() - W).abs().view_as(values), nearest)
        best = kmeans(values, 8, restarts=32, rng=torch.Generator().manual_seed(0))
        least = (values[:, :, None] - best[:, None]).abs().amin(-1).square().sum()
        assert nearest.square().sum() < 1.1 * least


def test_report(tmp_path):
    """Errors are those of the weights; bits a weight are codes and table."""
    source, out = llama(tmp_path / "a", layers=1), tmp_path / "s"
    rows = {row["tensor"]: row for row in tt.compress_base(source, out)}
    for key, W in sketched(out).items():
        dense = dense_of(source)[key]
        error = (W.dequantize().float() - dense).square().sum() / dense.square().sum()
        assert rows[key]["error %"] == pytest.approx(100 * error.item(), rel=1e-4)
        bits = 8 * (W.sketch_codes.nbytes + W.sketch_table.nbytes) / W.numel()
        assert rows[key]["bits a weight"] == pytest.approx(bits)


def test_shards_do_not_matter(tmp_path):
    """Neither those of the source nor ours: a tensor's k-means starts from its own numbers."""
    tt.compress_base(llama(tmp_path / "a"), tmp_path / "s")
    many = llama(tmp_path / "b", max_shard_size="10KB")
    assert len(list(many.glob("*.safetensors"))) > 5
    tt.compress_base(many, tmp_path / "t", shard_bytes=8000)
    assert len(list((tmp_path / "t").glob("*.safetensors"))) >= 4
    one, two = sketch_of(tmp_path / "s"), sketch_of(tmp_path / "t")
    assert one.keys() == two.keys() and all(torch.equal(one[key] + 0, two[key] + 0) for key in one)


class Interrupted(Exception):
    pass


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int) -> list[str]:
    """Let the writer fail after ``after`` shards; the list gets the shards that were made."""
    made: list[str] = []
    original = SketchWriter.add

    def add(self, shard, tensors, facts):
        if len(made) == after:
            (self.folder / f".{shard.file}.part").write_bytes(b"half")
            raise Interrupted
        made.append(shard.file)
        original(self, shard, tensors, facts)

    monkeypatch.setattr(SketchWriter, "add", add)
    return made


@pytest.mark.parametrize("after", [0, 2])
def test_an_interrupted_run_goes_on(tmp_path, monkeypatch, after):
    """Byte for byte what an uninterrupted one gives; finished shards are not made again; until then the folder is refused."""
    source, settings = llama(tmp_path / "a"), {"shard_bytes": 8000}
    tt.compress_base(source, tmp_path / "whole", **settings)
    with monkeypatch.context() as patch:
        interrupt(patch, after)
        with pytest.raises(Interrupted):
            tt.compress_base(source, tmp_path / "s", **settings)
    with pytest.raises(CheckpointMismatch, match="not finished: .* shards are missing.* goes on where it was interrupted"):
        tt.load_base(tmp_path / "s")
    made = interrupt(monkeypatch, 99)
    tt.compress_base(source, tmp_path / "s", **settings)
    assert len(made) == len(weight_files(tmp_path / "whole")) - after
    assert weight_files(tmp_path / "s") == weight_files(tmp_path / "whole")
    assert (tmp_path / "s" / "sketch.json").read_bytes() == (tmp_path / "whole" / "sketch.json").read_bytes()
    assert not list((tmp_path / "s").glob(".*"))


def test_a_finished_sketch_is_left_alone(tmp_path, monkeypatch):
    source = llama(tmp_path / "a", layers=1)
    first = tt.compress_base(source, tmp_path / "s")
    made = interrupt(monkeypatch, 99)
    assert str(tt.compress_base(source, tmp_path / "s")) == str(first) and not made


def test_peak_memory_is_about_a_shard(tmp_path, monkeypatch):
    """Not the model: four blocks take as much as one, with data as without."""
    for batches in (None, BATCHES[:1]):
        peaks = []
        for layers in (1, 4):
            source = tmp_path / f"a{layers}"
            known = empty_model(source if source.exists() else llama(source, layers=layers))
            monkeypatch.setattr(compress_base, "empty_model", lambda folder, known=known: known)  # counted as if it had values
            with LiveBytes() as live, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tt.compress_base(
                    source, tmp_path / f"s{layers}{batches is None}", sketch=tt.BaseSketch(bits=1, restarts=1),
                    shard_bytes=30_000, calibration=batches, targets="mlp.down",
                )  # fmt: skip
            peaks.append(live.peak)
        assert peaks[1] < 1.05 * peaks[0]


def test_progress_is_shown(tmp_path):
    console = Console(record=True, width=120, file=open(tmp_path / "log", "w"))
    tt.compress_base(llama(tmp_path / "a"), tmp_path / "s", shard_bytes=8000, console=console)
    lines = console.export_text().splitlines()
    shares = [int(line.split(": ")[1].split()[0]) for line in lines]
    assert len(lines) == len(weight_files(tmp_path / "s")) and shares == sorted(shares) and shares[-1] == 100


# -- loading


@pytest.mark.parametrize("make", [llama, bert, gpt2])
def test_loaded_model_computes_what_the_expanded_one_does(tmp_path, make):
    """The dense checkpoint is read by transformers alone; the sketch by load_base, its layers still sketched."""
    source = make(tmp_path / "a")
    tt.compress_base(source, tmp_path / "s")
    model = tt.load_base(tmp_path / "s").eval()
    assert sum(isinstance(p, SketchedWeight) for p in model.parameters()) == len(sketched(tmp_path / "s"))
    assert not any(p.requires_grad for p in model.parameters() if isinstance(p, SketchedWeight))
    plain = type(model).from_pretrained(tt.expand_base(tmp_path / "s", tmp_path / "d")).eval()
    assert {p.dtype for p in plain.parameters()} == {torch.float32}
    torch.testing.assert_close(model(IDS)[0], plain(IDS)[0], rtol=1e-5, atol=1e-5)
    with pytest.raises(OSError, match="model.safetensors"):  # who knows nothing of sketches fails
        type(model).from_pretrained(tmp_path / "s")


def test_expanded_shards_and_dtypes(tmp_path):
    source = llama(tmp_path / "a", dtype=torch.bfloat16)
    tt.compress_base(source, tmp_path / "s", shard_bytes=8000)
    assert {v.sketch_table.dtype for v in sketched(tmp_path / "s").values()} == {torch.bfloat16}
    out = tt.expand_base(tmp_path / "s", tmp_path / "d")
    assert (out / "model.safetensors.index.json").is_file()
    dense = dense_of(out)
    assert dense.keys() == dense_of(source).keys() and {v.dtype for v in dense.values()} == {torch.bfloat16}
    model = LlamaForCausalLM.from_pretrained(out)
    assert all(torch.equal(model.state_dict()[key], value + 0) for key, value in sketch_of(tmp_path / "s").items())


def test_other_classes_and_options(tmp_path):
    """Under another prefix, with a fresh head, in another dtype, with configuration keys."""
    tt.compress_base(bert(tmp_path / "a"), tmp_path / "s")
    plain = tt.load_base(tmp_path / "s", AutoModel)
    model = tt.load_base(tmp_path / "s", AutoModelForSequenceClassification, num_labels=5, hidden_dropout_prob=0.0).eval()
    assert model.config.num_labels == 5 and model.config.hidden_dropout_prob == 0.0 and model.classifier.weight.shape == (5, 32)
    key = "encoder.layer.1.output.dense.weight"
    assert torch.equal(model.get_parameter(f"bert.{key}") + 0, plain.get_parameter(key) + 0)
    half = tt.load_base(tmp_path / "s", dtype=torch.bfloat16)
    assert half.get_parameter(key).sketch_table.dtype == half.embeddings.word_embeddings.weight.dtype == torch.bfloat16
    with pytest.raises(CheckpointMismatch, match="BertModel; LlamaForCausalLM has none"):
        tt.load_base(tmp_path / "s", LlamaForCausalLM, config=LlamaForCausalLM.config_class(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8))  # fmt: skip


def test_embeddings_and_a_head_tied_to_them(tmp_path):
    """Looked up by row; one tensor still."""
    source = gpt2(tmp_path / "a")
    tt.compress_base(source, tmp_path / "s", sketch=tt.BaseSketch(embeddings=True))
    assert "transformer.wte.weight" in sketched(tmp_path / "s") and "transformer.wpe.weight" not in sketched(tmp_path / "s")
    model = tt.load_base(tmp_path / "s").eval()
    assert isinstance(model.lm_head.weight, SketchedWeight) and model.lm_head.weight is model.transformer.wte.weight
    plain = GPT2LMHeadModel.from_pretrained(tt.expand_base(tmp_path / "s", tmp_path / "d")).eval()
    torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=1e-5, atol=1e-5)


def test_conv1d_is_sketched_by_outputs(tmp_path):
    tt.compress_base(gpt2(tmp_path / "a"), tmp_path / "s")
    weight = sketched(tmp_path / "s")["transformer.h.0.mlp.c_fc.weight"]
    assert weight.shape == (32, 128) and weight.sketch_table.shape == (128, 1, 16) and weight.transposed


def test_targets(tmp_path):
    tt.compress_base(llama(tmp_path / "a"), tmp_path / "s", targets="mlp.down | lm_head")
    assert {key.split(".")[-2] for key in sketched(tmp_path / "s")} == {"down_proj", "lm_head"}


# -- refused before anything is written


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"sketch": tt.BaseSketch(groups=3)}, ShapeMismatch, r"12 problems:(.|\n)*q_proj.* has 32 inputs, which 3 groups do not"),
        ({"sketch": tt.BaseSketch(bits=3, groups=3)}, ShapeMismatch, "3 groups do not divide"),
        ({"targets": "mlp.donw"}, NoMatch, "nearest: mlp.down"),
        ({"targets": "embedding"}, Unsupported, "Linear layers are sketched"),
        ({"shard_bytes": 0}, ShapeMismatch, "at least one byte"),
        ({"calibration": []}, Unsupported, "the calibration data is empty"),
    ],
)
def test_bad_requests(tmp_path, settings, error, message):
    source = llama(tmp_path / "a")
    with pytest.raises(error, match=message):
        tt.compress_base(source, tmp_path / "s", **settings)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 9}, "1 to 8 bits"), ({"bits": 0}, "bits must be"), ({"groups": 1.5}, "groups must be"),
        ({"power": -1.0}, "not negative"), ({"dtype": "int8"}, "auto, float32"), ({"restarts": 0, "groups": 0}, "2 problems"),
    ],
)  # fmt: skip
def test_bad_sketch(settings, message):
    with pytest.raises(ShapeMismatch, match=message):
        tt.BaseSketch(**settings)


def test_bad_sources(tmp_path):
    source = llama(tmp_path / "a")
    with pytest.raises(ConfigError, match="no model folder"):
        tt.compress_base(tmp_path / "nowhere", tmp_path / "s")
    tt.compress_base(source, tmp_path / "s")
    with pytest.raises(Unsupported, match="is a sketch already"):
        tt.compress_base(tmp_path / "s", tmp_path / "t")
    bare = shutil.copytree(source, tmp_path / "bare")
    (bare / "model.safetensors").rename(bare / "pytorch_model.bin")
    with pytest.raises(CheckpointMismatch, match="holds no safetensors checkpoint.*save it again, which writes safetensors"):
        tt.compress_base(bare, tmp_path / "t")
    (bare / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointMismatch, match="model.safetensors is no safetensors file"):
        tt.compress_base(bare, tmp_path / "t")
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": {"quant_method": "bitsandbytes"}}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(Unsupported, match="quantised already"):
        tt.compress_base(source, tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_values_that_cannot_be_stored(tmp_path):
    source = llama(tmp_path / "a")
    tensors = load_file(source / "model.safetensors")
    key = "model.layers.1.mlp.up_proj.weight"
    for value, out, error, message in (
        (torch.nan, "s", CheckpointMismatch, f"{key} in .* holds NaN"),
        (1e6, "t", Unsupported, f"{key} has values beyond the range of torch.float16"),
    ):
        tensors[key][3, 4] = value
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(error, match=message):
            tt.compress_base(source, tmp_path / out)
    tt.compress_base(source, tmp_path / "u", sketch=tt.BaseSketch(dtype="bfloat16"))
    assert sketched(tmp_path / "u")[key].dequantize()[3, 4] == torch.tensor(1e6).bfloat16()


def test_other_folders(tmp_path):
    source = llama(tmp_path / "a")
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "notes.txt").write_text("mine")
    with pytest.raises(Unsupported, match="exists and is no sketch"):
        tt.compress_base(source, tmp_path / "s")
    tt.compress_base(source, tmp_path / "t")
    with pytest.raises(Unsupported, match="bits = 4 there, 2 now, seed = 0 there, 1 now"):
        tt.compress_base(source, tmp_path / "t", sketch=tt.BaseSketch(bits=2, seed=1))
    with pytest.raises(Unsupported, match="cut into other shards"):
        tt.compress_base(source, tmp_path / "t", shard_bytes=8000)
    with pytest.raises(Unsupported, match=r"fingerprint = .* there"):
        tt.compress_base(llama(tmp_path / "b", rms_norm_eps=1e-3, dtype=torch.float16), tmp_path / "t")
    with pytest.raises(Unsupported, match="exists already"):
        tt.expand_base(tmp_path / "t", tmp_path / "a")
