"""MLX-LM's folders, built by hand, against updates computed by their formulas."""

from __future__ import annotations

import json

import pytest
import torch
from bases import make
from safetensors.torch import save_file
from torch import Tensor

import trimtab as tt

G = torch.Generator().manual_seed(0)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=G) * 0.3


PATHS = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.k_proj", "lm_head")


def folder(tmp_path, tensors: dict[str, Tensor], kind: str = "lora", **parameters):
    path = tmp_path / "adapters"
    path.mkdir(exist_ok=True)
    config = {"fine_tune_type": kind, "num_layers": 16, "lora_parameters": {"rank": 2, "dropout": 0.0, "scale": 20.0} | parameters}
    (path / "adapter_config.json").write_text(json.dumps(config))
    save_file({k: v.contiguous() for k, v in tensors.items()}, path / "adapters.safetensors")
    return path


def factors(model, paths=PATHS, rank: int = 2) -> dict[str, tuple[Tensor, Tensor]]:
    shapes = {p: model.get_submodule(p).weight.shape for p in paths}
    return {p: (draw(fan_in, rank), draw(rank, out)) for p, (out, fan_in) in shapes.items()}


@pytest.mark.parametrize("through", ["load", "convert"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_mlx(kind, through, tmp_path) -> None:
    base, stored, expected = make("llama"), {}, {}
    for path, (a, b) in factors(base).items():
        stored |= {f"{path}.lora_a": a, f"{path}.lora_b": b}
        V = base.get_submodule(path).weight.detach() + 20.0 * (a @ b).t()
        expected[path] = V
        if kind == "dora":
            stored[f"{path}.m"] = m = draw(len(V)).abs() + 0.5
            expected[path] = m[:, None] * V / V.norm(dim=1, keepdim=True)
    source = folder(tmp_path, stored, kind)
    if through == "convert":
        tt.convert(source, tmp_path / "own", base=make("llama"))
        source = tmp_path / "own"
    model = make("llama")
    assert tt.load(model, source) == "adapters"
    for path, W in expected.items():
        torch.testing.assert_close(tt.effective_weight(model, path), W, atol=1e-4, rtol=1e-4)


def test_an_embedding(tmp_path) -> None:
    a, b = draw(40, 2), draw(2, 32)
    model = make("llama")
    tt.load(model, folder(tmp_path, {"model.embed_tokens.lora_a": a, "model.embed_tokens.lora_b": b}, scale=1.5))
    ids = torch.arange(8)
    torch.testing.assert_close(model.model.embed_tokens(ids), make("llama").model.embed_tokens(ids) + 1.5 * (a @ b)[:8])


def test_a_scale_that_depends_on_the_release_is_asked_for(tmp_path) -> None:
    (path, (a, b)), *_ = factors(make("llama")).items()
    stored = {f"{path}.lora_a": a, f"{path}.lora_b": b}
    W = make("llama").get_submodule(path).weight.detach()
    source = folder(tmp_path, stored, alpha=16.0, scale=10.0)
    with pytest.raises(tt.CheckpointMismatch, match=r"cannot be known; say the product: scale=\.\.\. \(--scale\)"):
        tt.load(make("llama"), source)
    model = make("llama")
    tt.load(model, source, scale=80.0)
    torch.testing.assert_close(tt.effective_weight(model, path), W + 80.0 * (a @ b).t(), atol=1e-4, rtol=1e-4)
    model = make("llama")
    tt.load(model, folder(tmp_path, stored, alpha=2, scale=10.0))
    torch.testing.assert_close(tt.effective_weight(model, path), W + 10.0 * (a @ b).t(), atol=1e-4, rtol=1e-4)


def test_folders_that_do_not_fit(tmp_path) -> None:
    (path, (a, b)), *_ = factors(make("llama")).items()
    good = {f"{path}.lora_a": a, f"{path}.lora_b": b}
    for source, error, match in (
        (lambda: folder(tmp_path, good, "full"), tt.Unsupported, "of the kind 'full'"),
        (lambda: folder(tmp_path, good, scale=None), tt.CheckpointMismatch, "does not say lora_parameters.scale"),
        (lambda: folder(tmp_path, good, scale="20"), tt.CheckpointMismatch, "scale='20', where a number is needed"),
        (lambda: folder(tmp_path, {f"{path}.lora_a": a}), tt.CheckpointMismatch, r"missing \(1\)"),
        (lambda: folder(tmp_path, good | {"x": draw(1)}), tt.CheckpointMismatch, r"unused \(1\)"),
        (lambda: folder(tmp_path, good, "dora"), tt.CheckpointMismatch, r"missing \(1\)"),
        (lambda: folder(tmp_path, good | {f"{path}.m": draw(32)}), tt.CheckpointMismatch, r"unused \(3\)"),
        (lambda: folder(tmp_path, {k: v.t() for k, v in good.items()}), tt.ShapeMismatch, "needs a of"),
        (lambda: folder(tmp_path, {k.replace("q_proj", "z_proj"): v for k, v in good.items()}), tt.NoMatch, "nearest"),
        (lambda: folder(tmp_path, {k: draw(3, 2, 2) for k in good}), tt.Unsupported, "a bank of experts"),
    ):
        with pytest.raises(error, match=match):
            tt.load(make("llama"), source())
    source = folder(tmp_path, good)
    (source / "adapters.safetensors").unlink()
    with pytest.raises(tt.CheckpointMismatch, match="it lacks adapters.safetensors"):
        tt.load(make("llama"), source)
