"""Adapters merged into a base on disk: equal to the merge in memory, file by file, resumable, or refused as a whole."""

from __future__ import annotations

import json
import multiprocessing
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from bases import config_of, load, make, save
from safetensors import safe_open
from saved_adapters import adapter

import trimtab as tt
from trimtab.artifacts.folder_base import open_folder
from trimtab.core.account import LiveBytes

pytestmark = pytest.mark.filterwarnings("ignore")

CASES = {
    "LoRA": ("llama", tt.LoRA(rank=2), "linear"),
    "DoRA-bf16": ("llama", tt.DoRA(rank=2), "attn.q | mlp.down"),
    "OFT": ("bert", tt.OFT(block_size=4), "attention"),
    "SSF": ("bert", tt.SSF(), "attn.q | norm"),
    "norms": ("llama", tt.NormTuning(), None),
    "fused": ("gpt2", tt.LoRA(rank=2), "attn.q | attn.v | mlp.up"),
    "embedding": ("llama", tt.LoRA(rank=2), "embedding"),
    "experts": ("mixtral", tt.LoRA(rank=2), "mlp | attn.q"),
    "vision": ("vit", tt.LoHa(rank=2), "linear"),
    "head": ("vit", tt.Unfreeze(), "head"),
}  # fmt: skip


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as stream:
            found |= {key: stream.get_tensor(key) for key in stream.keys()}
    return found


@pytest.mark.parametrize("case", CASES)
def test_equal_to_the_merge_in_memory(case, tmp_path) -> None:
    name, method, targets = CASES[case]
    dtype = torch.bfloat16 if "bf16" in case else torch.float32
    base = save(make(name), tmp_path / "base", dtype=dtype)
    saved = adapter(tmp_path / "a", method, 1, targets, model=make(name).to(dtype))
    report = tt.merge_checkpoint(saved, base, out=tmp_path / "out")
    merged = load(tmp_path / "out", make(name))

    model = make(name).to(dtype)
    tt.load(model, saved)
    in_memory = tt.merge(model, "a", permanent=True)
    expected, found = model.state_dict(), merged.state_dict()
    assert set(found) == set(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert sorted(map(tuple, report.rows)) == sorted(map(tuple, in_memory.rows))
    changed = {key for key, value in make(name).to(dtype).state_dict().items() if not torch.equal(value, found[key])}
    assert 0 < len(changed) < len(expected)


def test_everything_else_stays_as_it_is(tmp_path) -> None:
    base = save(make("llama"), tmp_path / "base")
    saved = adapter(tmp_path / "a", tt.LoRA(rank=2), 1, "attn.q", model=make("llama"))
    tt.merge_checkpoint(saved, base, out=tmp_path / "out")
    names = {p.name for p in base.iterdir()} - {"README.md", "pytorch_model.bin"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == names | {"trimtab_merge.json"} and len(names) > 5
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (base / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    before, after = (json.loads((f / "model.safetensors.index.json").read_text()) for f in (base, tmp_path / "out"))
    assert before == after
    old, new = tensors(base), tensors(tmp_path / "out")
    assert {k for k in old if not torch.equal(old[k], new[k])} == {f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)}
    record = json.loads((tmp_path / "out" / "trimtab_merge.json").read_text())
    assert record["adapters"][0]["name"] == "a" and len(record["report"]) == 2


@pytest.mark.parametrize("rule", ["linear", "ties", "dare"])
def test_several_adapters_by_a_rule(rule, tmp_path) -> None:
    """The rule acts on the dense updates; the result is their sum with W, rounded once."""
    from trimtab.artifacts.combine import place_seed
    from trimtab.artifacts.rules import rule_entry

    base = save(make("llama"), tmp_path / "base")
    methods = (tt.LoRA(rank=2), tt.DoRA(rank=2))
    folders = [
        adapter(tmp_path / n, m, i, "attn.q", model=make("llama")) for i, (n, m) in enumerate(zip("ab", methods, strict=True))
    ]
    tt.merge_checkpoint(folders, base, out=tmp_path / "out", rule=rule, weights=[0.7, -0.4], seed=3)
    path, entry = "model.layers.1.self_attn.q_proj", rule_entry(rule)
    W = make("llama").get_submodule(path).weight.detach()
    updates = []
    for folder in folders:
        model = make("llama")
        tt.load(model, folder)
        updates.append(tt.effective_weight(model, path) - W)
    expected = W + entry(updates, [0.7, -0.4], entry.bind({}), seed=place_seed(3, path))
    torch.testing.assert_close(load(tmp_path / "out", make("llama")).get_submodule(path).weight.detach(), expected)


# -- ties and heads


@pytest.mark.parametrize("where", ["embedding", "head"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_ties_are_refused_or_cut(where, name, tmp_path) -> None:
    base = save(make(name, tied=True), tmp_path / "base")
    saved = adapter(tmp_path / "a", tt.LoRA(rank=2), 1, where, model=make(name, tied=True))
    with pytest.raises(tt.NotMergeable, match="is tied to"):
        tt.merge_checkpoint(saved, base, out=tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    tt.merge_checkpoint(saved, base, out=tmp_path / "out", untie=True)
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False
    merged = load(tmp_path / "out", make(name))
    model = make(name, tied=True)
    tt.load(model, saved)
    tt.merge(model, "a", permanent=True, untie=True)
    for end in (lambda m: m.get_input_embeddings(), lambda m: m.get_output_embeddings()):
        assert torch.equal(end(merged).weight, end(model).weight)
    assert not torch.equal(merged.get_input_embeddings().weight, merged.get_output_embeddings().weight)


def test_a_tie_that_nothing_touches_is_kept(tmp_path) -> None:
    base = save(make("llama", tied=True), tmp_path / "base")
    saved = adapter(tmp_path / "a", tt.LoRA(rank=2), 1, "attn.q", model=make("llama", tied=True))
    tt.merge_checkpoint(saved, base, out=tmp_path / "out")
    merged = load(tmp_path / "out", make("llama"))
    assert merged.lm_head.weight is merged.model.embed_tokens.weight and "lm_head.weight" not in tensors(tmp_path / "out")


def test_a_new_head_comes_along(tmp_path) -> None:
    """The checkpoint is an encoder; the adapter has a head of three labels, and the result is a classifier."""
    from transformers import BertForSequenceClassification

    base = save(make("bert"), tmp_path / "base")
    classifier = BertForSequenceClassification.from_pretrained(base, num_labels=3).eval()
    tt.attach(classifier, tt.LoRA(rank=2), targets="attn.q", name="a")
    saved = adapter(tmp_path / "a", tt.Unfreeze(), 1, "head", model=classifier)
    tt.merge_checkpoint(saved, base, out=tmp_path / "out")
    ids = torch.arange(6)[None]
    assert config_of(tmp_path / "out")["architectures"] == ["BertForSequenceClassification"]
    merged = load(tmp_path / "out", classifier)
    torch.testing.assert_close(merged(ids).logits, classifier(ids).logits)


def test_a_head_above_a_bare_encoder(tmp_path) -> None:
    """As ``trimtab train`` saves it: paths below the encoder's prefix, the classifier beside it."""
    from trimtab.tasks.text_classification import PooledClassifier

    base = save(make("bert"), tmp_path / "base")
    torch.manual_seed(0)
    model = PooledClassifier(make("bert"), 4, pooling="mean", dropout=0.0).eval()
    tt.attach(model, tt.LoRA(rank=2), targets="attn.q", name="a")
    saved = adapter(tmp_path / "a", tt.Unfreeze(), 1, ["classifier"], model=model)
    tt.merge_checkpoint(saved, base, out=tmp_path / "out")
    new = tensors(tmp_path / "out")
    assert torch.equal(new["classifier.weight"], tt.effective_weight(model, "classifier"))
    tt.merge(model, "a", permanent=True)
    from transformers import AutoModel

    merged = AutoModel.from_pretrained(tmp_path / "out").state_dict()
    expected = model.bert.state_dict()
    assert all(torch.equal(merged[key], expected[key]) for key in expected)


# -- quantised bases


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """A function kind -> folder of a quantised model, or a skip where the package does not run here."""
    import transformers as t

    dense = tmp_path_factory.mktemp("dense") / "m"
    config = t.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=40
    )  # fmt: skip
    torch.manual_seed(0)
    t.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(dense)

    def make_one(kind: str) -> Path:
        pytest.importorskip("torchao" if kind == "torchao" else "bitsandbytes")
        if kind == "torchao":
            from torchao.quantization import Int8WeightOnlyConfig

            how = t.TorchAoConfig(Int8WeightOnlyConfig())
        elif kind == "int8":
            how = t.BitsAndBytesConfig(load_in_8bit=True)
        else:
            how = t.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=kind == "nf4-double",
                bnb_4bit_compute_dtype=torch.bfloat16,
            )  # fmt: skip
        folder = dense.with_name(kind)
        model = t.AutoModelForCausalLM.from_pretrained(dense, quantization_config=how, device_map="cpu")
        model.save_pretrained(folder, max_shard_size="60KB")
        return folder

    return make_one


@pytest.mark.parametrize("kind", ["nf4", "nf4-double", "int8", "torchao"])
def test_a_quantised_base_is_merged_into_as_is_said(kind, quantised, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    base = quantised(kind)
    model = AutoModelForCausalLM.from_pretrained(base, device_map="cpu").eval()
    saved = adapter(tmp_path / "a", tt.LoRA(rank=2), 1, "attn.q | mlp.down", model=model)
    tt.detach(model, "a")
    with pytest.raises(tt.NotMergeable, match='say what it becomes: into="dequantised" or into="requantised"'):
        tt.merge_checkpoint(saved, base, out=tmp_path / "out")
    path, other = "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.v_proj"
    tt.load(model, saved)
    exact = tt.effective_weight(model, path).float()
    values = lambda m, p: tt.core.site.dense(m.get_submodule(p).weight, m.get_submodule(p)).detach()  # noqa: E731
    before = values(model, other)

    tt.merge_checkpoint(saved, base, out=tmp_path / "out", into="dequantised")
    assert "quantization_config" not in config_of(tmp_path / "out")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert dense.get_submodule(path).weight.dtype == torch.bfloat16
    torch.testing.assert_close(dense.get_submodule(path).weight.float(), exact, atol=1e-3, rtol=1e-2)
    assert torch.equal(dense.get_submodule(other).weight, before.to(torch.bfloat16))
    if kind == "int8":
        with pytest.raises(tt.NotMergeable, match='use into="dequantised"'):
            tt.merge_checkpoint(saved, base, out=tmp_path / "again", into="requantised")
        return
    report = tt.merge_checkpoint(saved, base, out=tmp_path / "again", into="requantised")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", device_map="cpu")
    assert type(again.get_submodule(path).weight) is type(model.get_submodule(path)._parameters["weight"])
    tt.merge(model, "a", into="requantised")
    mine, other_way = values(again, path).float(), values(model, path).float()
    # codes at a border may differ, since one way rounds to bf16 before it quantises; the loss is the same
    assert (mine - other_way).norm() < 0.04 * other_way.norm() and (mine - exact).norm() < 1.02 * (other_way - exact).norm()
    assert torch.equal(values(again, other), before)
    # the loss of quantising again is reported, and is the greater part of a small update
    row = next(row for row in report if row["path"] == path)
    error = (values(again, path).float() - exact).norm() / exact.norm()
    assert row["output error"] == pytest.approx(error.item(), rel=0.5)


# -- interruptions, memory, refusals


@tt.merge_rule("slow", url="a test")
def slow(updates, weights):
    """A sum that takes its time."""
    time.sleep(0.1)
    return sum(w * u for w, u in zip(weights, updates, strict=True))


def test_a_killed_merge_goes_on(tmp_path) -> None:
    base = save(make("llama"), tmp_path / "base", shard="15KB")
    saved = adapter(tmp_path / "a", tt.LoRA(rank=2), 1, "linear", model=make("llama"))
    stage = tmp_path / ".out.part"
    work = partial(tt.merge_checkpoint, saved, base, out=tmp_path / "out", rule="slow")
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    while not ((stage / "progress.json").exists() and len(list(stage.glob("model-*.safetensors"))) >= 2):
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    finished = json.loads((stage / "progress.json").read_text())["done"]
    times = {name: (stage / name).stat().st_mtime_ns for name in finished}
    assert finished and len(finished) < len(list(base.glob("model-*.safetensors"))) and not (tmp_path / "out").exists()
    work()
    assert not stage.exists()
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in finished} == times
    tt.merge_checkpoint(saved, base, out=tmp_path / "whole")
    for name in ("model.safetensors.index.json", *(p.name for p in base.glob("model-*.safetensors"))):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    reports = [json.loads((tmp_path / f / "trimtab_merge.json").read_text())["report"] for f in ("out", "whole")]
    assert reports[0] == reports[1]


def test_other_arguments_start_anew_and_two_processes_do_not_meet(tmp_path, monkeypatch) -> None:
    base = save(make("llama"), tmp_path / "base")
    saved = adapter(tmp_path / "a", tt.LoRA(rank=2), 1, "attn.q", model=make("llama"))
    from trimtab.artifacts import shards

    real, calls = shards.Staging.record, []

    def record(self, file, rows):
        real(self, file, rows)
        calls.append(file)
        if len(calls) == 1:
            with pytest.raises(tt.TrimtabError, match="another process .*is merging into"):
                tt.merge_checkpoint(saved, base, out=tmp_path / "out")
            raise KeyboardInterrupt

    monkeypatch.setattr(shards.Staging, "record", record)
    with pytest.raises(KeyboardInterrupt):
        tt.merge_checkpoint(saved, base, out=tmp_path / "out")
    assert (tmp_path / ".out.part").exists()
    count = len(list(base.glob("model-*.safetensors")))
    tt.merge_checkpoint(saved, base, out=tmp_path / "out", max_error=0.5)
    assert len(calls) == 1 + count and not (tmp_path / ".out.part").exists()


def test_memory_is_that_of_a_tensor(tmp_path) -> None:
    """Counted storages: far below the model, below the largest file."""
    import transformers as t

    torch.manual_seed(0)
    config = t.LlamaConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4, vocab_size=64)
    model = t.LlamaForCausalLM(config)
    save(model, tmp_path / "base", shard="1MB")
    saved = adapter(tmp_path / "a", tt.LoRA(rank=2), 1, "linear", model=model)
    small = sum(f.stat().st_size for f in saved.iterdir())
    with LiveBytes() as shapes:  # it counts the meta device too
        kept = open_folder(tmp_path / "base", ["LlamaForCausalLM"], [])
    with LiveBytes() as live:
        tt.merge_checkpoint(saved, tmp_path / "base", out=tmp_path / "out")
    files = [f.stat().st_size for f in (tmp_path / "base").glob("*.safetensors")]
    largest = 128 * 256 * 4
    assert kept is not None and shapes.level > sum(files) * 0.9
    assert live.peak - shapes.level < 6 * largest + 2 * small < 1.2 * max(files) < sum(files) / 3


def test_a_bound_on_the_error_is_kept_and_nothing_is_left(tmp_path) -> None:
    base = save(make("llama"), tmp_path / "base", dtype=torch.bfloat16)
    saved = adapter(tmp_path / "a", tt.LoRA(rank=2), 1, "attn.q", model=make("llama").bfloat16())
    report = tt.merge_checkpoint(saved, base, out=tmp_path / "ok")
    worst = max(report.column("output error"))
    assert 1e-4 < worst < 1e-2
    with pytest.raises(tt.NotMergeable, match="above max_error"):
        tt.merge_checkpoint(saved, base, out=tmp_path / "out", max_error=worst / 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "base", "ok"]


def test_damaged_bases_are_refused_by_name(tmp_path) -> None:
    saved = adapter(tmp_path / "a", tt.LoRA(rank=2), 1, "attn.q", model=make("llama"))
    base = save(make("llama"), tmp_path / "base")
    file = sorted(base.glob("model-*.safetensors"))[1]
    whole = file.read_bytes()

    def refused(match: str, error=tt.CheckpointMismatch) -> None:
        with pytest.raises(error, match=match):
            tt.merge_checkpoint(saved, base, out=tmp_path / "out")
        assert not (tmp_path / "out").exists() and not (tmp_path / ".out.part").exists()

    file.write_bytes(whole[:-10])
    refused(rf"{file.name} is truncated: .* the file ends at byte {len(whole) - 10:,}")
    file.unlink()
    refused(f"its index names {file.name}, which are not there")
    file.write_bytes(whole)
    index = base / "model.safetensors.index.json"
    text = index.read_text()
    index.write_text(text.replace(file.name, sorted(base.glob("model-*"))[0].name))
    refused("do not agree on")
    index.write_text("{")
    refused("index.json is damaged")
    index.unlink()
    refused("there is no model.safetensors and no model.safetensors.index.json")
    index.write_text(text)
    config = config_of(base)
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    refused("quantised by gptq", tt.Unsupported)
    (base / "config.json").unlink()
    refused("it has no config.json", Exception)


def test_what_does_not_fit_is_refused(tmp_path) -> None:
    base = save(make("llama"), tmp_path / "base")
    saved = adapter(tmp_path / "a", tt.LoRA(rank=2), 1, "attn.q", model=make("llama"))
    other = adapter(tmp_path / "b", tt.LoRA(rank=2), 1, "attn.q", model=make("llama", seed=7))
    with pytest.raises(tt.CheckpointMismatch, match="made for another base"):
        tt.merge_checkpoint(other, base, out=tmp_path / "out")
    with pytest.raises(tt.NotMergeable, match="into= must be one of"):
        tt.merge_checkpoint(saved, base, out=tmp_path / "out", into="bf16")
    (tmp_path / "out").mkdir()
    with pytest.raises(tt.NotMergeable, match="exists already"):
        tt.merge_checkpoint(saved, base, out=tmp_path / "out")
    gpt = adapter(tmp_path / "g", tt.LoRA(rank=2), 1, "mlp.up", model=make("gpt2"))
    with pytest.raises(tt.NoMatch, match=r"transformer\.h\.0"):
        tt.merge_checkpoint(gpt, base, out=tmp_path / "x")
    biases = adapter(tmp_path / "s", tt.SSF(), 1, "attn.q", model=make("llama"))
    with pytest.raises(tt.NotMergeable, match="has no bias in this architecture"):
        tt.merge_checkpoint(biases, base, out=tmp_path / "x")
