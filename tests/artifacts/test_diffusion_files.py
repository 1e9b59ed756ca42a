"""Files for diffusion models beyond kohya's LoRA: LyCORIS' other kinds, names of diffusers, ComfyUI and Flux."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from test_foreign_files import CONV, Q, Unet, draw, flat, kohya, low, update
from torch import Tensor, nn

import trimtab as tt


def product(factors: dict[str, Tensor], scale: float = 1.0) -> Tensor:
    return scale * factors["lora_up.weight"].flatten(1) @ factors["lora_down.weight"].flatten(1)


# -- LyCORIS' LoKr, whose sizes the file says


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.conv = nn.Linear(48, 64), nn.Conv2d(48, 64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def pieces(o1: int, i1: int, o2: int, i2: int, rank: int | None, *, both: bool = False) -> tuple[dict[str, Tensor], Tensor]:
    """LyCORIS' factors with an alpha of 3, and their product."""
    parts, full = {"alpha": torch.tensor(3.0)}, []
    for name, o, i, thin in (("w1", o1, i1, both), ("w2", o2, i2, rank is not None)):
        if thin:
            parts |= {f"lokr_{name}_a": draw(o, rank), f"lokr_{name}_b": draw(rank, i)}
            full.append(parts[f"lokr_{name}_a"] @ parts[f"lokr_{name}_b"])
        else:
            parts[f"lokr_{name}"] = draw(o, i)
            full.append(parts[f"lokr_{name}"])
    scale = 1.0 if rank is None and not both else 3.0 / rank
    return parts, scale * torch.kron(*full)


@pytest.mark.parametrize(
    ("o1", "i1", "rank", "both"),
    [
        (4, 3, 2, False),  # factor 16 on 64 x 48: 16 is above the root of 64 and of 48, and the smaller part stands first
        (4, 3, None, False),
        (2, 4, 1, True),
        (16, 3, 1, True),  # unbalanced_factorization
        (32, 6, 2, False),
        (1, 48, 1, False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["fc", "conv"])
def test_lokr_of_any_split(name, o1, i1, rank, both, tmp_path) -> None:
    kernel = 9 if name == "conv" else 1
    parts, expected = pieces(o1, i1, 64 // o1, 48 // i1 * kernel, rank, both=both)
    if name == "conv" and rank is None:
        parts["lokr_w2"] = parts["lokr_w2"].reshape(64 // o1, 48 // i1, 3, 3)
    model = Wide()
    tt.load(model, kohya(tmp_path, {f"lycoris_{name}": parts}))
    torch.testing.assert_close(update(model, name), expected, atol=1e-5, rtol=1e-4)
    tt.save(model, tmp_path / "own")
    again = Wide()
    tt.load(again, tmp_path / "own")
    torch.testing.assert_close(update(again, name), expected, atol=1e-5, rtol=1e-4)
    if name == "fc":
        x = draw(2, 48)
        torch.testing.assert_close(again(x), Wide()(x) + x @ expected.t(), atol=1e-5, rtol=1e-4)


def test_an_odd_split_is_never_written_as_another_one_for_peft(tmp_path) -> None:
    """peft makes the sizes again from one factor, and 2 x 4 is none of its splits."""
    parts, expected = pieces(2, 4, 32, 12, None)
    file = kohya(tmp_path, {"lycoris_fc": parts})
    with pytest.raises(tt.Unsupported, match="cannot be written for peft"):
        tt.convert(file, tmp_path / "p", to="peft", base=Wide())
    tt.convert(file, tmp_path / "p", to="peft", base=Wide(), max_error=1e-5)
    model = Wide()
    tt.load(model, tmp_path / "p")
    torch.testing.assert_close(update(model, "fc"), expected, atol=1e-4, rtol=1e-3)


def test_lokr_factors_of_another_size_are_refused(tmp_path) -> None:
    parts, _ = pieces(4, 3, 8, 16, 2)
    with pytest.raises(tt.ShapeMismatch, match="fc"):
        tt.load(Wide(), kohya(tmp_path, {"lycoris_fc": parts}))


# -- what is added to weights and biases, and numbers in front


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.group, self.fc = nn.Conv2d(3, 8, 3), nn.LayerNorm(8), nn.GroupNorm(2, 8), nn.Linear(8, 8)
        self.bare = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.group(self.conv(x)).mean((2, 3))
        return self.bare(self.fc(self.norm(h)))


@pytest.mark.parametrize("through", ["load", "convert"])
def test_differences_are_added_to_weights_and_biases(through, tmp_path) -> None:
    files = {
        "lycoris_norm": {"w_norm": draw(8), "b_norm": draw(8)}, "lycoris_group": {"w_norm": draw(8), "b_norm": draw(8)},
        "lycoris_conv": {"diff": draw(8, 3, 3, 3), "diff_b": draw(8)}, "lycoris_fc": low(8, 8, 2, 1.0) | {"diff_b": draw(8)},
        "lycoris_bare": {"diff": draw(8, 8)},
    }  # fmt: skip
    source = kohya(tmp_path, files)
    if through == "convert":
        tt.convert(source, tmp_path / "own", base=Normed())
        source = tmp_path / "own"
    expected, x = Normed(), draw(2, 3, 6, 6)
    with torch.no_grad():
        for name in ("norm", "group"):
            getattr(expected, name).weight.add_(files[f"lycoris_{name}"]["w_norm"])
            getattr(expected, name).bias.add_(files[f"lycoris_{name}"]["b_norm"])
        expected.conv.weight.add_(files["lycoris_conv"]["diff"])
        expected.conv.bias.add_(files["lycoris_conv"]["diff_b"])
        expected.fc.weight.add_(product(files["lycoris_fc"], 0.5))
        expected.fc.bias.add_(files["lycoris_fc"]["diff_b"])
        expected.bare.weight.add_(files["lycoris_bare"]["diff"])
    model = Normed()
    tt.load(model, source)
    torch.testing.assert_close(model(x), expected(x), atol=1e-5, rtol=1e-4)
    tt.merge(model, "style", permanent=True)
    torch.testing.assert_close(model(x), expected(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("files", "error", "match"),
    [
        ({"lycoris_bare": {"diff_b": draw(8)}}, tt.Unsupported, "which has none in this model"),
        ({"lycoris_fc": {"diff": draw(8, 4)}}, tt.ShapeMismatch, r"diff is \(8, 4\)"),
        ({"lycoris_norm": {"w_norm": draw(4)}}, tt.ShapeMismatch, r"w_norm is \(4,\)"),
        ({"lycoris_fc": low(8, 8, 2, 1.0) | {"diff": draw(8, 8)}}, tt.Unsupported, "change one weight together"),
        ({"lycoris_fc": {"lora_down.weight": draw(2, 8), "lora_up.weight": draw(8, 3)}}, tt.ShapeMismatch, "their ranks differ"),
        ({"lycoris_fc": low(8, 8, 2, 1.0) | {"alpha": draw(2)}}, tt.ShapeMismatch, "one number is needed"),
    ],
)
def test_differences_that_do_not_fit_are_refused(files, error, match, tmp_path) -> None:
    with pytest.raises(error, match=match):
        tt.load(Normed(), kohya(tmp_path, files))


def test_scalars_multiply_the_update(tmp_path) -> None:
    lokr, expected = pieces(3, 4, 4, 3, 1)
    hada = {f"hada_w{i}_{x}": draw(*s) for i in "12" for x, s in (("a", (12, 2)), ("b", (2, 12)))} | {"alpha": torch.tensor(1.0)}
    lora, other = low(12, 12, 2, 4.0), "down_blocks.2.attentions.1.transformer_blocks.0.attn1.to_k"
    third = "down_blocks.0.attentions.1.proj_in"
    scalars = [torch.tensor(v) for v in (0.25, -1.5, 3.0)]
    files = {flat(Q): lora, flat(other): hada, flat(third): lokr}
    model = Unet()
    tt.load(model, kohya(tmp_path, {k: v | {"scalar": s} for (k, v), s in zip(files.items(), scalars, strict=True)}))
    torch.testing.assert_close(update(model, Q), 0.25 * product(lora, 2.0))
    whole = 0.5 * (hada["hada_w1_a"] @ hada["hada_w1_b"]) * (hada["hada_w2_a"] @ hada["hada_w2_b"])
    torch.testing.assert_close(update(model, other), -1.5 * whole, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(update(model, third), 3.0 * expected, atol=1e-5, rtol=1e-4)


# -- names

OUT = "down_blocks.2.attentions.1.transformer_blocks.0.attn1.to_out.0"
NAMES = {
    "diffusers": ("unet.{}.lora_A.weight", "unet.{}.lora_B.weight", "{}"),
    "diffusers, one model": ("{}.lora_A.weight", "{}.lora_B.weight", "{}"),
    "diffusers, named": ("{}.lora_A.default_0.weight", "{}.lora_B.default_0.weight", "{}"),
    "layers": ("unet.{}.lora.down.weight", "unet.{}.lora.up.weight", "{}"),
    "processors": ("{}_lora.down.weight", "{}_lora.up.weight", "processor"),
    "ComfyUI": ("diffusion_model.{}.lora_down.weight", "diffusion_model.{}.lora_up.weight", "{}"),
    "ComfyUI, peft": ("diffusion_model.{}.lora_A.weight", "diffusion_model.{}.lora_B.weight", "{}"),
    "flat": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight", "flat"),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", "folder"])
@pytest.mark.parametrize("kind", NAMES)
def test_names_of_every_writer_are_found(kind, suffix, tmp_path) -> None:
    """Without an alpha the scale is 1."""
    down, up, form = NAMES[kind]
    stored, factors = {}, {}
    for path in (Q, OUT):
        name = path.replace(".", "_") if form == "flat" else path
        if form == "processor":
            name = path.replace(".to_", ".processor.to_").removesuffix(".0")
        factors[path] = low(12, 12, 3, None)
        stored |= {down.format(name): factors[path]["lora_down.weight"], up.format(name): factors[path]["lora_up.weight"]}
    if suffix == "folder":
        (tmp_path / "x").mkdir()
        save_file(stored, tmp_path / "x" / "pytorch_lora_weights.safetensors")
        source = tmp_path / "x"
    else:
        source = tmp_path / f"x{suffix}"
        (save_file if suffix == ".safetensors" else torch.save)(stored, source)
    model = Unet()
    tt.load(model, source)
    for path in (Q, OUT):
        torch.testing.assert_close(update(model, path), product(factors[path]))


def test_names_of_the_original_unet_in_comfyui(tmp_path) -> None:
    factors = low(12, 12, 2, 4.0)
    name = "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q"
    model = Unet()
    tt.load(model, kohya(tmp_path, {name: factors}))
    torch.testing.assert_close(update(model, Q), product(factors, 2.0))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("prefix", ["unet.", ""])
def test_the_notes_of_diffusers_say_the_scale(prefix, rslora, tmp_path) -> None:
    notes = {"r": 4, "lora_alpha": 6, "use_rslora": rslora, "rank_pattern": {}, "alpha_pattern": {OUT: 2, "proj_in": 1.0}}
    notes = {f"{prefix}{key}": value for key, value in notes.items()} | {"text_encoder.r": 8}
    third = "down_blocks.0.attentions.1.proj_in"
    factors = {path: low(12, 12, 4, None) for path in (Q, OUT, third)}
    stored = {
        f"{prefix}{path}.lora_{x}.weight": v[f"lora_{n}.weight"].clone()
        for path, v in factors.items() for x, n in (("A", "down"), ("B", "up"))
    }  # fmt: skip
    file = tmp_path / "x.safetensors"
    save_file(stored, file, metadata={"format": "pt", "lora_adapter_metadata": json.dumps(notes)})
    model = Unet()
    tt.load(model, file)
    for path, alpha in ((Q, 6), (OUT, 2), (third, 1)):
        torch.testing.assert_close(update(model, path), product(factors[path], alpha / (math.sqrt(4) if rslora else 4)))
    save_file(stored, file, metadata={"lora_adapter_metadata": json.dumps({f"{prefix}r": "four"})})
    with pytest.raises(tt.CheckpointMismatch, match="r='four', where an integer"):
        tt.load(Unet(), file)


def test_doras_of_diffusers(tmp_path) -> None:
    factors, m = low(12, 12, 2, None), draw(12).abs() + 1
    stored = {
        f"unet.{Q}.lora_A.weight": factors["lora_down.weight"], f"unet.{Q}.lora_B.weight": factors["lora_up.weight"],
        f"unet.{Q}.lora_magnitude_vector": m,
    }  # fmt: skip
    save_file(stored, tmp_path / "x.safetensors")
    model = Unet()
    tt.load(model, tmp_path / "x.safetensors")
    V = Unet().get_submodule(Q).weight + product(factors)
    torch.testing.assert_close(tt.effective_weight(model, Q), (m[:, None] * V / V.norm(dim=1, keepdim=True)).detach())


class Flux(nn.Module):
    """Names as diffusers' Flux has them."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        linear = lambda out, fan_in=width: nn.Linear(fan_in, out)  # noqa: E731
        self.x_embedder = linear(width)
        double, single = nn.Module(), nn.Module()
        double.attn = nn.Module()
        for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
            setattr(double.attn, name, linear(width))
        double.attn.to_out = nn.ModuleList([linear(width)])
        double.norm1 = nn.Module()
        double.norm1.linear = linear(6 * width)
        single.attn, single.norm = nn.Module(), nn.Module()
        single.attn.to_q, single.attn.to_k, single.attn.to_v = linear(width), linear(width), linear(width)
        single.proj_mlp, single.proj_out, single.norm.linear = linear(4 * width), linear(width, 5 * width), linear(3 * width)
        self.transformer_blocks, self.single_transformer_blocks = nn.ModuleList([double]), nn.ModuleList([single])


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("style", ["lora_unet_{}", "diffusion_model.{}"])
def test_fused_projections_of_flux_are_several_modules_of_diffusers(style, dora, tmp_path) -> None:
    fused = {
        "double_blocks.0.img_attn.qkv": [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"],
        "double_blocks.0.txt_attn.qkv": [f"transformer_blocks.0.attn.add_{x}_proj" for x in "qkv"],
        "single_blocks.0.linear1": [
            *(f"single_transformer_blocks.0.attn.to_{x}" for x in "qkv"), "single_transformer_blocks.0.proj_mlp",
        ],
        "single_blocks.0.linear2": ["single_transformer_blocks.0.proj_out"],
        "double_blocks.0.img_mod.lin": ["transformer_blocks.0.norm1.linear"],
        "double_blocks.0.img_attn.proj": ["transformer_blocks.0.attn.to_out.0"],
        "img_in": ["x_embedder"],
    }  # fmt: skip
    base, files = Flux(), {}
    for name, paths in fused.items():
        rows = sum(base.get_submodule(p).out_features for p in paths)
        key = style.format(name.replace(".", "_") if style.startswith("lora_") else name)
        files[name] = (key, low(rows, base.get_submodule(paths[0]).in_features, 2, 3.0))
        if dora:
            files[name][1]["dora_scale"] = draw(rows, 1).abs() + 0.5
    model = Flux()
    tt.load(model, kohya(tmp_path, dict(files.values())))
    for name, paths in fused.items():
        whole, at = product(files[name][1], 1.5), 0
        for path in paths:
            W = base.get_submodule(path).weight.detach()
            V = W + whole[at : at + len(W)]
            if dora:
                V = files[name][1]["dora_scale"][at : at + len(W)] * V / V.norm(dim=1, keepdim=True)
            torch.testing.assert_close(tt.effective_weight(model, path), V, atol=1e-5, rtol=1e-4)
            at += len(W)


def test_processors_of_xlabs(tmp_path) -> None:
    keys = {
        "double_blocks.0.processor.qkv_lora1": [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"],
        "double_blocks.0.processor.proj_lora2": ["transformer_blocks.0.attn.to_add_out"],
        "single_blocks.0.processor.qkv_lora": [f"single_transformer_blocks.0.attn.to_{x}" for x in "qkv"],
    }
    files = {key: low(8 * len(paths), 8, 2, None) for key, paths in keys.items()}
    stored = {f"{k}.{x}.weight": v[f"lora_{x}.weight"] for k, v in files.items() for x in ("down", "up")}
    save_file(stored, tmp_path / "x.safetensors")
    model = Flux()
    tt.load(model, tmp_path / "x.safetensors")
    for key, paths in keys.items():
        for path, rows in zip(paths, product(files[key]).split(8), strict=True):
            torch.testing.assert_close(update(model, path), rows)


def test_a_fused_projection_of_another_width_is_refused(tmp_path) -> None:
    with pytest.raises(tt.ShapeMismatch, match="share its rows have 24"):
        tt.load(Flux(), kohya(tmp_path, {"lora_unet_double_blocks_0_img_attn_qkv": low(16, 8, 2, 1.0)}))
    parts, _ = pieces(4, 2, 6, 4, None)
    with pytest.raises(tt.Unsupported, match="cannot be cut into their rows"):
        tt.load(Flux(), kohya(tmp_path, {"lora_unet_double_blocks_0_img_attn_qkv": parts}))


@pytest.mark.parametrize("style", ["kohya", "lora_linear_layer", "peft", "old"])
def test_text_encoders(style, tmp_path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    def make() -> nn.Module:
        torch.manual_seed(0)
        sizes = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 20}
        return CLIPTextModel(CLIPTextConfig(**sizes))

    layer = "text_model.encoder.layers.1.self_attn"
    module, down, up = {
        "kohya": ("lora_te1_{f}_q_proj", "lora_down", "lora_up"),
        "lora_linear_layer": ("text_encoder.{p}.q_proj", "lora_linear_layer.down", "lora_linear_layer.up"),
        "peft": ("text_encoder.{p}.q_proj", "lora_A", "lora_B"),
        "old": ("text_encoder.{p}.to_q_lora", "down", "up"),
    }[style]
    factors = low(12, 12, 2, None)
    module = module.format(p=layer, f=layer.replace(".", "_"))
    stored = {f"{module}.{down}.weight": factors["lora_down.weight"], f"{module}.{up}.weight": factors["lora_up.weight"]}
    save_file(stored, tmp_path / "x.safetensors")
    model = make()
    tt.load(model, tmp_path / "x.safetensors")
    path = next(p for p, _ in make().named_modules() if p.endswith("encoder.layers.1.self_attn.q_proj"))
    torch.testing.assert_close(update(model, path), product(factors))


def test_files_for_several_models_and_tensors_of_peft(tmp_path) -> None:
    factors = low(12, 12, 2, None)
    pair = {"lora_A.weight": factors["lora_down.weight"], "lora_B.weight": factors["lora_up.weight"]}
    stored = {f"{part}.{name}.{k}": v.clone() for part, name in (("unet", Q), ("text_encoder", "x")) for k, v in pair.items()}
    save_file(stored, tmp_path / "x.safetensors")
    with pytest.raises(tt.Unsupported, match="for 2 models: text_encoder, unet; choose one"):
        tt.load(Unet(), tmp_path / "x.safetensors")
    tt.convert(tmp_path / "x.safetensors", tmp_path / "out", base=Unet(), part="unet")
    model = Unet()
    tt.load(model, tmp_path / "out")
    torch.testing.assert_close(update(model, Q), product(factors))
    save_file({f"base_model.model.{Q}.{k}": v for k, v in pair.items()}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(tt.CheckpointMismatch, match=r"peft.*give its folder"):
        tt.load(Unet(), tmp_path / "adapter_model.safetensors")
    assert CONV in dict(model.named_modules())
