"""Sketching with calibration data, against a plain loop over the whole model; resumed, refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sketch_models import BATCHES, bert, gpt2, llama, sketched, t5, weight_files
from test_compress_base import Interrupted, interrupt
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

import trimtab as tt
from trimtab.artifacts.texts import text_batches
from trimtab.core.errors import Unsupported
from trimtab.kernels.sweep import Hessian, codebook, curvature, sweep
from trimtab.training.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer tokens of calibration data")

LLAMA = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"], ["mlp.gate_proj", "mlp.up_proj"],
         ["mlp.down_proj"]]  # fmt: skip
BERT = [["attention.self.query", "attention.self.key", "attention.self.value"], ["attention.output.dense"], ["intermediate.dense"],
        ["output.dense"]]  # fmt: skip
GPT2 = [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]]


def mixtral(folder: Path) -> Path:
    config = MixtralConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                           num_key_value_heads=1, num_local_experts=2)  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(folder)
    return folder


def reference(source: Path, sketch: tt.BaseSketch, sets: list[list[str]], blocks: str, batches: list) -> dict[str, torch.Tensor]:
    """Dense weights by name: the whole model in memory, one set of layers after the other, moments by hooks on full runs."""
    model = tt.load_base(source).eval()
    with torch.no_grad():  # what is kept is stored in 16 bits
        for p in model.parameters():
            if p.dim() > 1 and not any(p is m.weight for b in range(2) for m in _layers(model, blocks.format(b), sum(sets, []))):
                p.copy_(p.half())
    import hashlib

    found = {}
    for block in range(2):
        for names in sets:
            layers = _layers(model, blocks.format(block), names)
            conv1d = not isinstance(layers[0], nn.Linear)
            moments = Hessian(layers[0].weight.shape[0 if conv1d else 1])
            hook = layers[0].register_forward_pre_hook(lambda m, args, moments=moments: moments.add(args[0]))
            with torch.no_grad():
                for batch in batches:
                    model(**batch)
            hook.remove()
            second = curvature(moments.value, damping=sketch.damping)
            for name, layer in zip(names, layers, strict=True):
                key = f"{blocks.format(block)}.{name}.weight"
                W = (layer.weight.t() if conv1d else layer.weight).detach()
                seed = hashlib.sha256(f"{sketch.seed}:{key}".encode()).digest()
                rng = torch.Generator().manual_seed(int.from_bytes(seed[:7], "big"))
                weights = second.importance(sketch.power)
                table = codebook(W, sketch.bits, sketch.groups, weights=weights, restarts=sketch.restarts, rng=rng).half().float()
                new = table.gather(-1, sweep(W, table, second).long()).flatten(1)
                found[key] = new.t() if conv1d else new
                with torch.no_grad():
                    layer.weight.copy_(found[key])
    return found


def _layers(model: nn.Module, block: str, names: list[str]) -> list[nn.Module]:
    return [model.get_submodule(f"{block}.{name}") for name in names]


@pytest.mark.parametrize(
    ("make", "sets", "blocks"),
    [
        (llama, LLAMA, "model.layers.{}"), (bert, BERT, "encoder.layer.{}"), (gpt2, GPT2, "transformer.h.{}"),
        (mixtral, LLAMA[:2], "model.layers.{}"),
    ],
)  # fmt: skip
def test_block_by_block_is_what_a_loop_over_the_whole_model_gives(tmp_path, make, sets, blocks):
    """Layers in the order of the block, inputs from compressed layers, q, k and v on one set of moments."""
    source, sketch = make(tmp_path / "a"), tt.BaseSketch(bits=2, groups=2, restarts=2)
    want = reference(source, sketch, sets, blocks, BATCHES)
    table = tt.compress_base(source, tmp_path / "s", sketch=sketch, calibration=BATCHES, shard_bytes=20_000)
    found = sketched(tmp_path / "s")
    assert found.keys() == want.keys()
    for key, W in found.items():  # moments from a block alone differ in the last bit at most
        different = (W.dequantize().float() - want[key]).abs() > 1e-6
        assert different.float().mean() < 0.02, key
    assert {row["tokens"] for row in table} == {72} and all(0 < row["output error %"] for row in table)


def test_data_pays(tmp_path):
    """The logits' error with data is below the one without, measured on the data."""
    source = llama(tmp_path / "a")
    batches = [{"input_ids": torch.randint(64, (16, 24), generator=torch.Generator().manual_seed(5))}]
    gaps = []
    dense = tt.load_base(source).eval()
    for name, data in (("with", batches), ("without", None)):
        tt.compress_base(source, tmp_path / name, sketch=tt.BaseSketch(bits=2), calibration=data)
        model = tt.load_base(tmp_path / name).eval()
        with torch.no_grad():
            gaps.append((model(**batches[0]).logits - dense(**batches[0]).logits).norm().item())
    assert gaps[0] < gaps[1]


@pytest.mark.parametrize("make", [llama, t5])
def test_an_interrupted_run_goes_on(tmp_path, monkeypatch, make):
    """Blocks that are there are run through as they are stored; the rest comes out to the bit."""
    source, settings = make(tmp_path / "a"), {"shard_bytes": 8000, "sketch": tt.BaseSketch(restarts=1, bits=2)}
    settings["calibration"] = [{**batch, "decoder_input_ids": batch["input_ids"]} for batch in BATCHES] if make is t5 else BATCHES
    tt.compress_base(source, tmp_path / "whole", **settings)
    count = len(weight_files(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        interrupt(patch, count - 1)
        with pytest.raises(Interrupted):
            tt.compress_base(source, tmp_path / "s", **settings)
    made = interrupt(monkeypatch, 99)
    tt.compress_base(source, tmp_path / "s", **settings)
    assert len(made) == 1 and weight_files(tmp_path / "s") == weight_files(tmp_path / "whole")
    with pytest.raises(Unsupported, match="calibration = "):
        tt.compress_base(source, tmp_path / "s", **{**settings, "calibration": settings["calibration"][:1]})


def test_models_without_blocks(tmp_path):
    """One walk over the whole model, in one shard."""
    source = llama(tmp_path / "a", layers=1)
    table = tt.compress_base(source, tmp_path / "s", calibration=BATCHES, shard_bytes=100, targets="lm_head | mlp.down")
    assert {row["tensor"]: row["tokens"] for row in table} == {"lm_head.weight": 0, "model.layers.0.mlp.down_proj.weight": 72}


def test_a_checkpoint_that_is_converted_on_loading(tmp_path):
    """Expert banks have no tensor of their own, and stay dense."""
    source = mixtral(tmp_path / "a")
    tt.compress_base(source, tmp_path / "s", sketch=tt.BaseSketch(restarts=1), calibration=BATCHES[:1])
    assert {key.split(".")[-2] for key in sketched(tmp_path / "s")} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    model, plain = tt.load_base(tmp_path / "s").eval(), tt.load_base(tt.expand_base(tmp_path / "s", tmp_path / "d")).eval()
    torch.testing.assert_close(model(**BATCHES[0]).logits, plain(**BATCHES[0]).logits, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_that_lacks_a_tensor(tmp_path):
    """Without data it is sketched as it is; with data, the model cannot run."""
    source = llama(tmp_path / "a")
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.input_layernorm.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    tt.compress_base(source, tmp_path / "s", sketch=tt.BaseSketch(restarts=1, bits=1))
    with pytest.raises(Unsupported, match=r"no tensor for model.layers.1.input_layernorm.weight.*without calibration data"):
        tt.compress_base(source, tmp_path / "t", sketch=tt.BaseSketch(restarts=1, bits=1), calibration=BATCHES[:1])


def test_a_block_that_does_not_take_its_predecessors_output(tmp_path, monkeypatch):
    from transformers.models.llama import modeling_llama

    original = modeling_llama.LlamaDecoderLayer.forward
    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "forward", lambda self, x, **more: original(self, x, **more))
    source = llama(tmp_path / "a")
    tt.compress_base(source, tmp_path / "s", calibration=BATCHES[:1], sketch=tt.BaseSketch(restarts=1, bits=1))
    call = nn.Module.__call__
    layer = modeling_llama.LlamaDecoderLayer
    monkeypatch.setattr(layer, "__call__", lambda self, x, **more: call(self, x * 2, **more))
    with pytest.raises(Unsupported, match="layers.1 does not take the output of the block before it"):
        tt.compress_base(source, tmp_path / "t", calibration=BATCHES[:1], sketch=tt.BaseSketch(restarts=1, bits=1))


def test_thin_data_is_named(tmp_path):
    with pytest.warns(UserWarning, match=r"14 of 14 layers saw fewer tokens .* than they have inputs, such as .* with 24"):
        tt.compress_base(llama(tmp_path / "a"), tmp_path / "s", calibration=BATCHES[:1], sketch=tt.BaseSketch(restarts=1, bits=1))


def test_texts(tmp_path):
    """Drawn by the seed, cut, without padding, texts of one length together."""
    from tiny_text import write_jsonl, write_model

    model = write_model(tmp_path / "m")
    rows = [{"text": " ".join(["cat"] * (1 + i % 3))} for i in range(12)]
    file = write_jsonl(tmp_path / "t.jsonl", rows)
    batches = text_batches(model, str(file), samples=10, length=4, seed=1)
    assert [tuple(batch["input_ids"].shape[1:]) for batch in batches] == [(3,), (4,)]  # with [CLS] and [SEP]
    assert sum(len(batch["input_ids"]) for batch in batches) == 10
    again = text_batches(model, str(file), samples=10, length=4, seed=1)
    assert json.dumps([b["input_ids"].tolist() for b in again]) == json.dumps([b["input_ids"].tolist() for b in batches])
    with pytest.raises(DataError, match="no column 'txt'"):
        text_batches(model, str(file), column="txt")
    with pytest.raises(Unsupported, match="at least one text"):
        text_batches(model, str(file), samples=0)
