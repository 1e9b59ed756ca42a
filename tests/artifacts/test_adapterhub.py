"""adapter-hub's folders, built by hand: LoRA, gains and bottlenecks, against updates computed by their formulas."""

from __future__ import annotations

import json

import pytest
import torch
from bases import make
from torch import Tensor, nn

import trimtab as tt

G = torch.Generator().manual_seed(0)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=G) * 0.3


def update(model: nn.Module, path: str) -> Tensor:
    """``W' - W`` as a matrix (out, in) of the loaded adapter."""
    with tt.disabled(model):  # outside of it, the module's weight is the adapted one
        W = model.get_submodule(path).weight.detach()
    return tt.effective_weight(model, path) - (W.t() if hasattr(model.get_submodule(path), "nf") else W)


def hub(tmp_path, tensors: dict[str, Tensor], version: str = "adapters.1.2.0", **config):
    folder = tmp_path / "hub"
    folder.mkdir(exist_ok=True)
    method = {
        "architecture": "lora",
        "r": 2,
        "alpha": 6,
        "composition_mode": "add",
        "attn_matrices": ["q", "v"],
        "use_gating": False,
    }
    about = {"config": method | config, "name": "sst", "model_class": "BertAdapterModel", "version": version, "hidden_size": 32}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    torch.save(tensors, folder / "pytorch_adapter.bin")
    return folder


@pytest.mark.parametrize(("version", "scale"), [("adapters.1.2.0", 3.0), ("adapters.1.0.1", 1.0), ("3.2.1", 3.0)])
def test_adapter_hub_lora(version, scale, tmp_path) -> None:
    paths = [f"encoder.layer.{i}.attention.self.{n}" for i in (0, 1) for n in ("query", "value")]
    factors = {p: (draw(2, 32), draw(32, 2)) for p in paths}
    stored = {f"bert.{p}.loras.sst.lora_{x}": v for p, pair in factors.items() for x, v in zip("AB", pair, strict=True)}
    model = make("bert")
    assert tt.load(model, hub(tmp_path, stored, version)) == "sst"
    for path, (a, b) in factors.items():
        torch.testing.assert_close(update(model, path), scale * b @ a)


def test_adapter_hub_on_a_fused_layer(tmp_path) -> None:
    """GPT-2: a pair of factors for each of q and v, one below the other; k stays."""
    a, b = draw(4, 32), draw(64, 2)
    stored = {"transformer.h.1.attn.c_attn.loras.sst.lora_A": a, "transformer.h.1.attn.c_attn.loras.sst.lora_B": b}
    model = make("gpt2")
    tt.load(model, hub(tmp_path, stored))
    expected = 3.0 * torch.cat([b[:32] @ a[:2], torch.zeros(32, 32), b[32:] @ a[2:]])
    torch.testing.assert_close(update(model, "transformer.h.1.attn.c_attn"), expected)


def test_adapter_hub_gains(tmp_path) -> None:
    gains = {"encoder.layer.0.attention.self.key": draw(32), "encoder.layer.1.intermediate.dense": draw(64)}
    stored = {f"bert.{p}.loras.sst.lora_B": g[:, None] for p, g in gains.items()}
    model = make("bert")
    tt.load(model, hub(tmp_path, stored, composition_mode="scale", r=1, alpha=1))
    for path, gain in gains.items():
        module = make("bert").get_submodule(path)
        torch.testing.assert_close(tt.effective_weight(model, path), gain[:, None] * module.weight)
        torch.testing.assert_close(tt.effective_weight(model, path, tensor="bias"), gain * module.bias)


HOUSE = {"architecture": None, "r": None, "alpha": None, "original_ln_before": False, "residual_before_ln": True}


@pytest.mark.parametrize(
    ("act", "function"), [("swish", torch.nn.functional.silu), ("gelu", torch.nn.functional.gelu), ("relu", torch.relu)]
)
@pytest.mark.parametrize(
    ("name", "theirs", "module"),
    [
        ("bert", "bert.encoder.layer.0.attention.output", "encoder.layer.0.attention.output.dense"),
        ("bert", "bert.encoder.layer.1.output", "encoder.layer.1.output.dense"),
        ("gpt2", "transformer.h.1.attention_adapters", "transformer.h.1.attn.c_proj"),
        ("gpt2", "transformer.h.0.output_adapters", "transformer.h.0.mlp.c_proj"),
        ("llama", "model.layers.1.output_adapters", "model.layers.1.mlp.down_proj"),
    ],
)  # fmt: skip
def test_adapter_hub_bottlenecks(act, function, name, theirs, module, tmp_path) -> None:
    """y + s Up f(Down y) at the sublayer's own output."""
    parts = [draw(4, 32), draw(4), draw(32, 4), draw(32)]
    names = ("adapter_down.0.weight", "adapter_down.0.bias", "adapter_up.weight", "adapter_up.bias")
    stored = {f"{theirs}.adapters.sst.{n}": v for n, v in zip(names, parts, strict=True)}
    model = make(name)
    x = torch.randn(2, 3, model.get_submodule(module).weight.shape[0 if name == "gpt2" else 1], generator=G)
    y = model.get_submodule(module)(x)
    tt.load(model, hub(tmp_path, stored, **HOUSE, non_linearity=act, scaling=1.5))
    down, down_bias, up, up_bias = parts
    expected = y + 1.5 * (function(y @ down.t() + down_bias) @ up.t() + up_bias)
    torch.testing.assert_close(model.get_submodule(module)(x), expected, atol=1e-5, rtol=1e-4)
    tt.convert(tmp_path / "hub", tmp_path / "out", base=make(name))
    again = make(name)
    assert tt.load(again, tmp_path / "out") == "sst"
    torch.testing.assert_close(again.get_submodule(module)(x), expected, atol=1e-5, rtol=1e-4)


def test_other_bottlenecks_of_adapter_hub_are_refused(tmp_path) -> None:
    key = "bert.encoder.layer.0.output.adapters.sst.adapter_down.0.weight"
    for change, match in (
        ({"original_ln_before": True}, "original_ln_before=True"),
        ({"is_parallel": True}, "is_parallel=True"),
        ({"scaling": "learned"}, "scaling='learned'"),
        ({"non_linearity": "leakyrelu"}, "non_linearity='leakyrelu'"),
        ({"architecture": "prefix_tuning"}, "architecture prefix_tuning"),
    ):
        settings = {**HOUSE, "non_linearity": "relu", **change}
        with pytest.raises(tt.Unsupported, match=match):
            tt.load(make("bert"), hub(tmp_path, {key: draw(4, 32)}, **settings))
    with pytest.raises(tt.CheckpointMismatch, match=r"missing \(3\)"):
        tt.load(make("bert"), hub(tmp_path, {key: draw(4, 32)}, **HOUSE, non_linearity="relu"))


def test_adapter_hub_folders_that_do_not_fit(tmp_path) -> None:
    path = "bert.encoder.layer.0.attention.self.query.loras.sst.lora_"
    good = {f"{path}A": draw(2, 32), f"{path}B": draw(32, 2)}
    for folder, error, match in (
        (lambda: hub(tmp_path, good, use_gating=True), tt.Unsupported, "use_gating"),
        (lambda: hub(tmp_path, good, alpha=None), tt.CheckpointMismatch, "does not say alpha"),
        (lambda: hub(tmp_path, {f"{path}A": good[f"{path}A"]}), tt.CheckpointMismatch, r"missing \(1\)"),
        (lambda: hub(tmp_path, good | {"bert.heads.x": draw(2)}), tt.CheckpointMismatch, r"unused \(1\)"),
        (lambda: hub(tmp_path, {k.replace("query", "quarry"): v for k, v in good.items()}), tt.NoMatch, "nearest: encoder.layer"),
    ):
        with pytest.raises(error, match=match):
            tt.load(make("bert"), folder())
    (tmp_path / "hub" / "pytorch_adapter.bin").unlink()
    with pytest.raises(tt.CheckpointMismatch, match="lacks adapter.safetensors and pytorch_adapter.bin"):
        tt.load(make("bert"), tmp_path / "hub")


# -- a prediction head beside the adapter


def classifier(labels: int = 3) -> nn.Module:
    import transformers as t

    torch.manual_seed(0)
    config = t.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=40, intermediate_size=64, max_position_embeddings=16,
        num_labels=labels,
    )  # fmt: skip
    return t.BertForSequenceClassification(config).eval()


def with_head(folder, tensors: dict[str, Tensor], config=None, model_class="BertForSequenceClassification", safe=True, about=True):
    from safetensors.torch import save_file

    if about:
        text = {"config": config, "name": "sst", "model_class": model_class, "num_labels": 3, "version": "adapters.1.2.0"}
        (folder / "head_config.json").write_text(json.dumps(text))
    if safe:
        save_file(tensors, folder / "model_head.safetensors")
    else:
        torch.save(tensors, folder / "pytorch_model_head.bin")
    return folder


@pytest.mark.parametrize("through", ["load", "convert"])
@pytest.mark.parametrize(("safe", "about"), [(True, True), (False, True), (False, False)])
def test_a_trained_head_beside_the_adapter_is_loaded_too(safe, about, through, tmp_path) -> None:
    a, b, path = draw(2, 32), draw(32, 2), "bert.encoder.layer.0.attention.self.query"
    head = {"classifier.weight": draw(3, 32), "classifier.bias": draw(3)}
    folder = with_head(hub(tmp_path, {f"{path}.loras.sst.lora_A": a, f"{path}.loras.sst.lora_B": b}), head, safe=safe, about=about)
    expected, ids = classifier(), torch.arange(6)[None]
    with torch.no_grad():
        expected.get_submodule(path).weight.add_(3.0 * b @ a)
        expected.classifier.weight.copy_(head["classifier.weight"])
        expected.classifier.bias.copy_(head["classifier.bias"])
    model = classifier()
    if through == "convert":
        tt.convert(folder, tmp_path / "own", base=classifier())
        folder = tmp_path / "own"
    tt.load(model, folder)
    torch.testing.assert_close(model(ids).logits, expected(ids).logits, atol=1e-5, rtol=1e-4)


def test_a_head_that_does_not_fit_is_refused_and_can_be_left_out(tmp_path) -> None:
    a, b, path = draw(2, 32), draw(32, 2), "bert.encoder.layer.0.attention.self.query"
    folder = hub(tmp_path, {f"{path}.loras.sst.lora_A": a, f"{path}.loras.sst.lora_B": b})
    flex = {"heads.sst.1.weight": draw(32, 32), "heads.sst.1.bias": draw(32), "heads.sst.4.weight": draw(3, 32)}
    good = {"classifier.weight": draw(3, 32), "classifier.bias": draw(3)}
    for model, head, config, error, match in (
        (classifier, flex, {"head_type": "classification"}, tt.Unsupported, r"classification, of Bert.*head=False \(--no-head\)"),
        (classifier, flex, None, tt.Unsupported, "head=False"),
        (lambda: classifier(5), good, None, tt.ShapeMismatch, "with as many labels .3."),
        (lambda: make("bert"), good, None, tt.Unsupported, "which a BertModel does not.*head=False"),
    ):
        with_head(folder, head, config)
        with pytest.raises(error, match=match):
            tt.load(model(), folder)
        plain = model()
        tt.load(plain, folder, head=False)
        where = path if hasattr(plain, "bert") else path.removeprefix("bert.")
        torch.testing.assert_close(update(plain, where), 3.0 * b @ a)
    (folder / "model_head.safetensors").unlink()
    with pytest.raises(tt.CheckpointMismatch, match="a prediction head without its tensors"):
        tt.load(classifier(), folder)
    (folder / "head_config.json").unlink()
    (folder / "embedding.pt").write_bytes(b"x")
    with pytest.raises(tt.Unsupported, match="holds embeddings beside the adapter"):
        tt.load(classifier(), folder)
