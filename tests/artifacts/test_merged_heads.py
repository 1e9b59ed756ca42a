"""Heads in merges: what is written computes the same as the trained model, with its labels, or does not look as if it did."""

from __future__ import annotations

import json

import pytest
import torch
from bases import config_of, make, save
from saved_adapters import adapter, net, shake
from torch import nn

import trimtab as tt
from trimtab.tasks.text_classification import PooledClassifier

pytestmark = pytest.mark.filterwarnings("ignore")

IDS = torch.arange(12).reshape(2, 6) + 1
MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
LABELS = ["cold", "warm", "hot"]


def named(model: nn.Module, labels: list[str] = LABELS) -> nn.Module:
    """The model with labels in its config."""
    model.config.id2label = dict(enumerate(labels))
    model.config.label2id = {label: i for i, label in enumerate(labels)}
    return model


def pooled(pooling: str = "mean", seed: int = 0, labels: list[str] = LABELS) -> nn.Module:
    torch.manual_seed(seed)
    return named(PooledClassifier(make("bert"), len(labels), pooling=pooling, dropout=0.0).eval(), labels)


def trained(folder, model, *, seed: int = 1, head: str = "classifier"):
    tt.attach(model, tt.LoRA(rank=2), targets="attn.q", name=folder.name)
    return adapter(folder, tt.Unfreeze(), seed, [head], model=model)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_classifier_that_transformers_has_not_is_an_encoder_and_a_head_of_its_own(pooling, tmp_path) -> None:
    from transformers import AutoModel, AutoModelForSequenceClassification

    base = save(make("bert"), tmp_path / "base")
    model = pooled(pooling)
    saved = trained(tmp_path / "a", model)
    report = tt.merge_checkpoint(saved, base, out=tmp_path / "out")
    assert "no class of transformers is this PooledClassifier" in str(report) and "PooledClassifier.from_merged" in str(report)
    again = PooledClassifier.from_merged(tmp_path / "out")
    wanted = model(input_ids=IDS, attention_mask=MASK)["logits"]
    torch.testing.assert_close(again(input_ids=IDS, attention_mask=MASK)["logits"], wanted)
    assert again.config.id2label == dict(enumerate(LABELS)) and again.pooling == pooling
    with pytest.raises(tt.CheckpointMismatch, match=f"with pooling '{pooling}'"):
        PooledClassifier.from_merged(tmp_path / "out", pooling={"mean": "cls", "cls": "mean"}[pooling])
    # transformers finds an encoder there, whole, and no head that it could take for its own
    encoder, info = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and config_of(tmp_path / "out") == config_of(base)
    _, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}


def test_a_head_of_a_class_that_nobody_knows_says_so(tmp_path) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert, self.top = make("bert"), nn.Linear(32, 3)

    base = save(make("bert"), tmp_path / "base")
    saved = trained(tmp_path / "a", Own(), head="top")
    report = tt.merge_checkpoint(saved, base, out=tmp_path / "out")
    assert "no class of transformers is this Own (top.weight, top.bias beside a BertModel)" in str(report)
    with pytest.raises(tt.CheckpointMismatch, match="the head of a Own"):
        PooledClassifier.from_merged(tmp_path / "out")
    with pytest.raises(tt.CheckpointMismatch, match="it is no merged classifier"):
        PooledClassifier.from_merged(base)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_class_of_transformers_gets_its_labels_and_padding(name, tmp_path) -> None:
    import transformers as t

    cls = {"bert": t.BertForSequenceClassification, "llama": t.LlamaForSequenceClassification}[name]
    base = save(make(name), tmp_path / "base")
    model = named(cls.from_pretrained(base, num_labels=3).eval())
    model.config.pad_token_id = 3
    saved = trained(tmp_path / "a", model, head={"bert": "classifier", "llama": "score"}[name])
    report = tt.merge_checkpoint(saved, base, out=tmp_path / "out")
    assert not report.notes
    merged, info = t.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(merged) is cls and not info["missing_keys"]
    inputs = {"input_ids": IDS.masked_fill(MASK == 0, 3), "attention_mask": MASK}
    torch.testing.assert_close(merged.eval()(**inputs).logits, model(**inputs).logits)
    assert merged.config.id2label == dict(enumerate(LABELS)) and merged.config.label2id["hot"] == 2


def test_labels_live_through_every_tool(tmp_path) -> None:
    base = save(make("bert"), tmp_path / "base")
    a, b = (trained(tmp_path / n, pooled(), seed=i) for i, n in enumerate("ab"))
    tt.combine([a, b], tmp_path / "both", rule="ties", rank=2)
    tt.convert(tmp_path / "both", tmp_path / "low", rank=1)
    tt.compress(tmp_path / "low", tmp_path / "low.tern", density=0.5)
    tt.expand(tmp_path / "low.tern", tmp_path / "wide")
    tt.merge_checkpoint(tmp_path / "wide", base, out=tmp_path / "out")
    assert PooledClassifier.from_merged(tmp_path / "out").config.id2label[1] == "warm"


# -- several fresh heads


@pytest.mark.parametrize("rule", ["linear", "ties", "task_arithmetic"])
@pytest.mark.parametrize("heads", ["average", "first", "drop"])
@pytest.mark.parametrize("given", [False, True], ids=["no base", "base"])
def test_fresh_heads_merge_as_is_said(rule, heads, given, tmp_path) -> None:
    """Of any rule: the updates by the rule, the heads by themselves."""
    base = save(make("bert"), tmp_path / "base")
    models = [pooled(seed=i) for i in range(2)]
    a, b = (trained(tmp_path / n, model, seed=i) for i, (n, model) in enumerate(zip("ab", models, strict=True)))
    mine, other = (tt.effective_weight(m, "classifier").detach() for m in models)
    weights = [0.6, 0.2]
    wanted = {"average": 0.75 * mine + 0.25 * other, "first": mine}.get(heads)
    report = tt.combine(
        [a, b], tmp_path / "m", rule=rule, rank=4, weights=weights, heads=heads, base=base if given else None
    )  # fmt: skip
    assert sum("classifier" in note for note in report.notes) == 2
    model = pooled(seed=5)
    tt.load(model, tmp_path / "m")
    if heads == "drop":
        assert "classifier.weight" not in report.column("path") and "model" not in manifest(tmp_path / "m")
    else:
        torch.testing.assert_close(tt.effective_weight(model, "classifier"), wanted)
    tt.merge_checkpoint([a, b], base, out=tmp_path / "out", rule=rule, weights=weights, heads=heads)
    if heads == "drop":
        assert not (tmp_path / "out" / "trimtab_head.json").exists()
    else:
        torch.testing.assert_close(PooledClassifier.from_merged(tmp_path / "out").classifier.weight, wanted)


def manifest(folder) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def test_heads_without_an_average_say_what_else_there_is(tmp_path) -> None:
    a = trained(tmp_path / "a", pooled())
    b = trained(tmp_path / "b", pooled(labels=["no", "yes"]))
    c = trained(tmp_path / "c", pooled(labels=["hot", "warm", "cold"]))
    base = save(make("bert"), tmp_path / "base")
    for other, weights, match in (
        (b, None, "for different labels"),
        (c, None, "for different labels .*hot, warm, cold"),
        (c, [1.0, -0.5], "for different labels"),
    ):
        with pytest.raises(tt.TrimtabError, match=match + '.*heads="first" .*heads="drop"'):
            tt.combine([a, other], tmp_path / "m", weights=weights)
        with pytest.raises(tt.TrimtabError, match=match):
            tt.merge_checkpoint([a, other], base, out=tmp_path / "o", weights=weights)
    d = trained(tmp_path / "d", pooled())
    with pytest.raises(tt.NotMergeable, match=r"of the weights \[1.0, -0.5\] there is no average.*heads="):
        tt.combine([a, d], tmp_path / "m", weights=[1.0, -0.5])
    with pytest.raises(tt.Unsupported, match="heads must be one of average, first, drop"):
        tt.combine([a, d], tmp_path / "m", heads="mean")
    assert not (tmp_path / "m").exists() and not (tmp_path / "o").exists()
    with pytest.raises(tt.NotMergeable, match=r"for different labels .*\(3, 32\) and \(2, 32\); tt.combine them first"):
        tt.merge_checkpoint([a, b], base, out=tmp_path / "o", heads="first")
    tt.combine([a, b], tmp_path / "m", heads="first")
    assert manifest(tmp_path / "m")["model"]["labels"] == LABELS
    with pytest.raises(tt.NotMergeable, match="nothing is left to store"):
        model = net()
        tt.combine([adapter(tmp_path / "h", tt.Unfreeze(), 1, "head", model=model)], tmp_path / "n", heads="drop")


def test_a_projection_keeps_or_drops_the_head(tmp_path) -> None:
    a, model = tmp_path / "a", pooled()
    trained(a, model)
    other = PooledClassifier(make("bert", seed=3), 3, pooling="mean", dropout=0.0)
    report = tt.project(a, tmp_path / "p", target=other)
    assert "kept as it is" in str(report)
    tt.load(other, tmp_path / "p")
    assert torch.equal(tt.effective_weight(other, "classifier"), tt.effective_weight(model, "classifier"))
    report = tt.project(a, tmp_path / "q", target=save(make("bert", seed=3), tmp_path / "base"), heads="drop")
    assert report.column("path") == [f"bert.encoder.layer.{i}.attention.self.query" for i in (0, 1)]
    small = PooledClassifier(make("bert", seed=3), 2, pooling="mean", dropout=0.0)
    with pytest.raises(tt.ShapeMismatch, match=r"the target's is \(2, 32\); heads=\"drop\""):
        tt.project(a, tmp_path / "r", target=small)
    tt.attach(model, tt.NormTuning(), name="n")
    shake(model, 1)
    tt.save(model, tmp_path / "n", name="n")
    with pytest.raises(tt.Unsupported, match="only a head is kept"):
        tt.project(tmp_path / "n", tmp_path / "s", target=other, source=model)


@pytest.mark.parametrize("old", [False, True], ids=["now", "a manifest from before storages were noted"])
def test_a_saved_classifier_loads_onto_the_base_with_another_random_head(old, tmp_path) -> None:
    from trimtab.core.adapter_folder import seal_of

    model = pooled(seed=0)
    wanted_of = trained(tmp_path / "a", model)
    entry = manifest(wanted_of)
    assert not any("classifier" in key for key in entry["base"]["samples"])
    if old:
        entry["base"].pop("storage")
        weight = pooled(seed=0).classifier.weight.detach().reshape(-1)[:: 3 * 32 // 32][:32]
        entry["base"]["samples"]["classifier.weight"] = [round(v, 8) for v in weight.tolist()]
        (wanted_of / "manifest.json").write_text(json.dumps(entry | {"seal": seal_of(entry)}))
    fresh = pooled(seed=9)
    tt.load(fresh, wanted_of)
    torch.testing.assert_close(
        fresh(input_ids=IDS, attention_mask=MASK)["logits"], model(input_ids=IDS, attention_mask=MASK)["logits"]
    )
    torch.manual_seed(0)
    other = named(PooledClassifier(make("bert", seed=4), 3, pooling="mean", dropout=0.0).eval())
    with pytest.raises(tt.CheckpointMismatch, match="made for another base"):
        tt.load(other, wanted_of)
