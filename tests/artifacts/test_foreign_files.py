"""Files of kohya, LyCORIS, torchtune and adapter-hub, built by hand, against updates computed by their formulas."""

from __future__ import annotations

import json
import re

import pytest
import torch
from bases import make
from safetensors.torch import save_file
from torch import Tensor, nn

import trimtab as tt

G = torch.Generator().manual_seed(0)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=G) * 0.3


def update(model: nn.Module, path: str, name: str | None = None) -> Tensor:
    """``W' - W`` as a matrix (out, in) of the loaded adapter."""
    with tt.disabled(model):  # outside of it, the module's weight is the adapted one
        W = model.get_submodule(path).weight.detach()
    if hasattr(model.get_submodule(path), "nf"):
        W = W.t()
    return tt.effective_weight(model, path, name) - W.reshape(len(W), -1)


# -- kohya and LyCORIS


class Block(nn.Module):
    def __init__(self, width: int = 12):
        super().__init__()
        self.attn1 = nn.Module()
        self.attn1.to_q, self.attn1.to_k = nn.Linear(width, width), nn.Linear(width, width)
        self.attn1.to_out = nn.ModuleList([nn.Linear(width, width)])


class Unet(nn.Module):
    """Names as diffusers has them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv_in = nn.Conv2d(4, 12, 3)
        self.down_blocks = nn.ModuleList([nn.Module() for _ in range(3)])
        for block in self.down_blocks:
            block.attentions, block.resnets = nn.ModuleList([nn.Module(), nn.Module()]), nn.ModuleList([nn.Module(), nn.Module()])
            for attention in block.attentions:
                attention.proj_in = nn.Linear(12, 12)
                attention.transformer_blocks = nn.ModuleList([Block()])
            for resnet in block.resnets:
                resnet.conv1, resnet.conv2, resnet.time_emb_proj = nn.Conv2d(12, 12, 3), nn.Conv2d(12, 12, 3), nn.Linear(8, 12)
            block.downsamplers = nn.ModuleList([nn.Module()])
            block.downsamplers[0].conv = nn.Conv2d(12, 12, 3, stride=2)
        self.mid_block = nn.Module()
        self.mid_block.attentions, self.mid_block.resnets = nn.ModuleList([nn.Module()]), nn.ModuleList([nn.Module(), nn.Module()])
        self.mid_block.attentions[0].proj_in = nn.Linear(12, 12)
        for resnet in self.mid_block.resnets:
            resnet.conv1 = nn.Conv2d(12, 12, 3)
        self.time_embedding = nn.Module()
        self.time_embedding.linear_1 = nn.Linear(4, 12)


Q, CONV = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", "down_blocks.0.resnets.0.conv1"


def flat(path: str) -> str:
    return "lora_unet_" + path.replace(".", "_")


def kohya(tmp_path, places: dict[str, dict[str, Tensor]], metadata=None):
    file = tmp_path / "style.safetensors"
    save_file(
        {f"{name}.{key}": v.contiguous().clone() for name, found in places.items() for key, v in found.items()},
        file,
        metadata=metadata,
    )
    return file


def low(out: int, fan_in: int, r: int, alpha: float | None, kernel: tuple[int, ...] = ()) -> dict[str, Tensor]:
    ones = (1,) * len(kernel)
    found = {"lora_down.weight": draw(r, fan_in, *kernel), "lora_up.weight": draw(out, r, *ones)}
    return found if alpha is None else found | {"alpha": torch.tensor(alpha)}


@pytest.mark.parametrize("alpha", [3.0, None])
def test_kohya_lora(alpha, tmp_path) -> None:
    linear, conv, half = low(12, 12, 2, alpha), low(12, 12, 4, alpha, (3, 3)), low(12, 12, 2, alpha)
    out = "down_blocks.2.attentions.1.transformer_blocks.0.attn1.to_out.0"
    file = kohya(tmp_path, {flat(Q): linear, flat(CONV): conv, flat(out): {k: v.half() for k, v in half.items()}})
    model = Unet()
    assert tt.load(model, file) == "style"
    for path, factors in ((Q, linear), (CONV, conv)):
        up, down = factors["lora_up.weight"].flatten(1), factors["lora_down.weight"].flatten(1)
        scale = 1.0 if alpha is None else alpha / up.shape[1]
        torch.testing.assert_close(update(model, path), scale * up @ down)
    up, down = half["lora_up.weight"].half().float(), half["lora_down.weight"].half().float()
    torch.testing.assert_close(update(model, out), (1.0 if alpha is None else alpha / 2) * up @ down)


def test_names_of_the_original_code_are_found(tmp_path) -> None:
    """SDXL files: two layers and a resampling make one of diffusers' blocks; entry 0 is the first convolution."""
    names = {
        "input_blocks_0_0": "conv_in", "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
        "input_blocks_2_0_out_layers_3": "down_blocks.0.resnets.1.conv2",
        "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
        "input_blocks_4_1_transformer_blocks_0_attn1_to_q": Q, "input_blocks_8_1_proj_in": "down_blocks.2.attentions.1.proj_in",
        "input_blocks_5_0_emb_layers_1": "down_blocks.1.resnets.1.time_emb_proj", "time_embed_0": "time_embedding.linear_1",
        "middle_block_1_proj_in": "mid_block.attentions.0.proj_in", "middle_block_2_in_layers_2": "mid_block.resnets.1.conv1",
    }  # fmt: skip
    places = {}
    for name, path in names.items():
        module = Unet().get_submodule(path)
        fan_in = module.in_channels if isinstance(module, nn.Conv2d) else module.in_features
        kernel = module.kernel_size if isinstance(module, nn.Conv2d) else ()
        places[f"lora_unet_{name}"] = low(module.weight.shape[0], fan_in, 2, 1.0, kernel)
    model = Unet()
    tt.load(model, kohya(tmp_path, places))
    for name, path in names.items():
        factors = places[f"lora_unet_{name}"]
        torch.testing.assert_close(
            update(model, path), 0.5 * factors["lora_up.weight"].flatten(1) @ factors["lora_down.weight"].flatten(1)
        )


def test_a_middle_factor_and_a_decomposed_weight(tmp_path) -> None:
    r = 3
    tucker = {
        "lora_down.weight": draw(r, 12, 1, 1), "lora_mid.weight": draw(r, r, 3, 3), "lora_up.weight": draw(12, r, 1, 1),
        "alpha": torch.tensor(1.5),
    }  # fmt: skip
    dora = low(12, 12, 2, 4.0) | {"dora_scale": draw(12, 1).abs() + 1}
    model = Unet()
    tt.load(model, kohya(tmp_path, {flat(CONV): tucker, flat(Q): dora}))
    up, down = tucker["lora_up.weight"][:, :, 0, 0], tucker["lora_down.weight"][:, :, 0, 0]
    expected = 0.5 * torch.einsum("mn...,im,nj->ij...", tucker["lora_mid.weight"], up, down)
    torch.testing.assert_close(update(model, CONV), expected.flatten(1))
    V = Unet().get_submodule(Q).weight + 2.0 * dora["lora_up.weight"] @ dora["lora_down.weight"]
    torch.testing.assert_close(tt.effective_weight(model, Q), (dora["dora_scale"] * V / V.norm(dim=1, keepdim=True)).detach())
    inputs = low(12, 12, 2, 4.0) | {"dora_scale": draw(1, 12).abs()}
    with pytest.raises(tt.Unsupported, match="scales inputs"):
        tt.load(Unet(), kohya(tmp_path, {flat(Q): inputs}))


def hada(out: int, fan_in: int, r: int, alpha: float, kernel: tuple[int, ...] = (), tucker: bool = False) -> dict[str, Tensor]:
    if tucker:
        parts = {f"hada_{k}{i}{s}": v for i in "12" for k, s, v in
                 (("t", "", draw(r, r, *kernel)), ("w", "_a", draw(r, out)), ("w", "_b", draw(r, fan_in)))}  # fmt: skip
    else:
        columns = fan_in * torch.Size(kernel).numel()
        parts = {f"hada_w{i}_{x}": draw(*s) for i in "12" for x, s in (("a", (out, r)), ("b", (r, columns)))}
    return parts | {"alpha": torch.tensor(alpha)}


def test_lycoris_loha(tmp_path) -> None:
    plain, conv, tucker = hada(12, 12, 2, 3.0), hada(12, 12, 2, 1.0, (3, 3)), hada(12, 12, 2, 4.0, (3, 3), tucker=True)
    other = "down_blocks.1.resnets.1.conv2"
    model = Unet()
    tt.load(model, kohya(tmp_path, {flat(Q): plain, flat(CONV): conv, flat(other): tucker}))
    for path, parts, scale in ((Q, plain, 1.5), (CONV, conv, 0.5)):
        expected = scale * (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
        torch.testing.assert_close(update(model, path), expected, atol=1e-5, rtol=1e-4)
    one, two = (
        torch.einsum("ij...,ip,jr->pr...", tucker[f"hada_t{i}"], tucker[f"hada_w{i}_a"], tucker[f"hada_w{i}_b"]) for i in "12"
    )
    torch.testing.assert_close(update(model, other), (2.0 * one * two).flatten(1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("w1", "w2", "alpha", "scale"),
    [
        ((3, 3), (4, 4), 7.0, 1.0),  # two full factors: 1, whatever alpha says
        ((3, 3), 1, 0.5, 0.5),
        ((2, 2), 2, 3.0, 1.5),
        (1, 1, 2.0, 2.0),
    ],
)  # fmt: skip
def test_lycoris_lokr(w1, w2, alpha, scale, tmp_path) -> None:
    o1, i1 = w1 if isinstance(w1, tuple) else (3, 3)
    o2, i2 = 12 // o1, 12 // i1
    parts, full = {"alpha": torch.tensor(alpha)}, []
    for name, kind, (o, i) in (("w1", w1, (o1, i1)), ("w2", w2, (o2, i2))):
        if isinstance(kind, tuple):
            parts[f"lokr_{name}"] = draw(o, i)
            full.append(parts[f"lokr_{name}"])
        else:
            parts |= {f"lokr_{name}_a": draw(o, kind), f"lokr_{name}_b": draw(kind, i)}
            full.append(parts[f"lokr_{name}_a"] @ parts[f"lokr_{name}_b"])
    model = Unet()
    tt.load(model, kohya(tmp_path, {flat(Q): parts}))
    torch.testing.assert_close(update(model, Q), scale * torch.kron(*full), atol=1e-5, rtol=1e-4)


def test_lycoris_lokr_of_a_convolution(tmp_path) -> None:
    parts = {"lokr_w1": draw(3, 3), "lokr_w2_a": draw(4, 1), "lokr_w2_b": draw(1, 4 * 9), "alpha": torch.tensor(0.5)}
    full = {"lokr_w1": draw(3, 3), "lokr_w2": draw(4, 4, 3, 3), "alpha": torch.tensor(1.0)}
    other = "down_blocks.2.resnets.1.conv1"
    model = Unet()
    tt.load(model, kohya(tmp_path, {flat(CONV): parts, flat(other): full}))
    w2 = (parts["lokr_w2_a"] @ parts["lokr_w2_b"]).reshape(4, 4, 3, 3)
    for path, w1, right, scale in ((CONV, parts["lokr_w1"], w2, 0.5), (other, full["lokr_w1"], full["lokr_w2"], 1.0)):
        expected = scale * torch.kron(w1[:, :, None, None], right)
        torch.testing.assert_close(update(model, path), expected.flatten(1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("notes", [None, '{"rs_lora": "True"}', '{"rs_lora": true}', "no JSON"])
def test_the_scale_is_alpha_over_rank_whatever_the_notes_say(notes, tmp_path) -> None:
    """LyCORIS trained with ``rs_lora`` writes ``alpha sqrt(rank)``, and its own loader divides by the rank."""
    trained, rank = 6.0, 4
    parts = low(12, 12, rank, trained * rank**0.5)
    model = Unet()
    tt.load(model, kohya(tmp_path, {flat(Q): parts}, metadata=notes and {"ss_network_args": notes}))
    torch.testing.assert_close(update(model, Q), trained / rank**0.5 * parts["lora_up.weight"] @ parts["lora_down.weight"])


def test_what_does_not_fit_is_listed(tmp_path) -> None:
    good = low(12, 12, 2, 1.0)
    with pytest.raises(tt.CheckpointMismatch) as caught:
        places = {flat(Q): good | {"oft_blocks": draw(12)}, flat(CONV): {"lora_up.weight": draw(12, 2, 1, 1)}}
        tt.load(Unet(), kohya(tmp_path, places))
    text = re.sub(r" +", " ", str(caught.value))
    assert "used (3) missing (1) unused (2)" in text and f"{CONV}.lora_down.weight" in text and f"{flat(Q)}.oft_blocks" in text
    with pytest.raises(tt.NoMatch, match="acts on down_blocks_9_x, which this model does not have; nearest"):
        tt.load(Unet(), kohya(tmp_path, {"lora_unet_down_blocks_9_x": good}))
    with pytest.raises(tt.ShapeMismatch, match=r"needs a of \(2, 12\)"):
        tt.load(Unet(), kohya(tmp_path, {flat(Q): low(12, 10, 2, 1.0)}))
    two = kohya(tmp_path, {flat(Q): good, "lora_te_encoder_layers_0_q": good})
    with pytest.raises(tt.Unsupported, match="for 2 models: lora_te, lora_unet"):
        tt.load(Unet(), two)
    tt.convert(two, tmp_path / "out", base=Unet(), part="lora_unet")
    model = Unet()
    tt.load(model, tmp_path / "out")
    torch.testing.assert_close(update(model, Q), 0.5 * good["lora_up.weight"] @ good["lora_down.weight"])
    with pytest.raises(tt.Unsupported, match="does not tell its layers; say which base"):
        tt.convert(two, tmp_path / "x")
    whole = two.read_bytes()
    two.write_bytes(whole[:-5])
    with pytest.raises(tt.CheckpointMismatch, match=r"style\.safetensors is truncated: .* the file ends at byte"):
        tt.load(Unet(), two)


# -- torchtune


def tune_name(path: str) -> str:
    theirs = {"self_attn.o_proj": "attn.output_proj", "self_attn": "attn", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    for ours, name in theirs.items():
        path = path.replace(ours, name)
    return path.removeprefix("model.").replace("lm_head", "output")


def by_pairs(rows: Tensor, heads: int) -> Tensor:
    """transformers' rows of heads (halves) in torchtune's order (pairs), written out row by row."""
    size = len(rows) // heads
    order = [head * size + half * (size // 2) + i for head in range(heads) for i in range(size // 2) for half in (0, 1)]
    return rows[order]


@pytest.mark.parametrize("dora", [False, True])
def test_torchtune(dora, tmp_path) -> None:
    model = make("llama")
    paths = [
        f"model.layers.{i}.{p}"
        for i in (0, 1)
        for p in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    ]
    stored, expected = {}, {}
    for path in [*paths, "lm_head"]:
        out, fan_in = model.get_submodule(path).weight.shape
        a, b, m = draw(2, fan_in), draw(out, 2), draw(out).abs() + 0.5
        W = model.get_submodule(path).weight.detach()
        V = W + 2.5 * b @ a
        expected[path] = m[:, None] * V / V.norm(dim=1, keepdim=True) if dora else V
        heads = {"q_proj": 4, "k_proj": 2}.get(path.rpartition(".")[2])
        theirs = (lambda rows, heads=heads: by_pairs(rows, heads)) if heads else (lambda rows: rows)
        stored[f"{tune_name(path)}.lora_a.weight"], stored[f"{tune_name(path)}.lora_b.weight"] = a, theirs(b)
        if dora:
            stored[f"{tune_name(path)}.magnitude"] = theirs(m)
    folder = tmp_path / "epoch_0"
    folder.mkdir()
    torch.save(stored, folder / "adapter_model.pt")
    with pytest.raises(tt.CheckpointMismatch, match=r"does not hold alpha.*alpha=\.\.\. \(--alpha\)"):
        tt.load(make("llama"), folder)
    tt.convert(folder / "adapter_model.pt", tmp_path / "out", base=make("llama"), alpha=5)
    (folder / "adapter_config.json").write_text(
        json.dumps({"r": 2, "lora_alpha": 5, "peft_type": "LORA", "target_modules": ["q_proj"]})
    )
    for source in (folder, tmp_path / "out"):
        model = make("llama")
        tt.load(model, source)
        for path, W in expected.items():
            torch.testing.assert_close(tt.effective_weight(model, path), W, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["adapter_model.pt", "adapter_0.pt", "adapter_11.pt"])
@pytest.mark.parametrize("config", ["peft", "peft with a mark", "beside models"])
def test_a_torchtune_folder_beside_a_config_of_peft(name, config, tmp_path) -> None:
    path = "model.layers.0.self_attn.v_proj"
    a, b = draw(2, 32), draw(16, 2)
    torch.save({f"{tune_name(path)}.lora_a.weight": a, f"{tune_name(path)}.lora_b.weight": b}, tmp_path / name)
    about = {"r": 2, "lora_alpha": 5, "peft_type": "LORA", "target_modules": ["v_proj"], "base_model_name_or_path": "x"}
    encoding = "utf-8-sig" if config == "peft with a mark" else "utf-8"
    (tmp_path / "adapter_config.json").write_text(json.dumps(about), encoding)
    if config == "beside models":
        torch.save({"w": torch.zeros(1)}, tmp_path / "hf_model_0001_0.pt")
        save_file({"w": torch.zeros(1)}, tmp_path / "ft-model-00001-of-00001.safetensors")
    model = make("llama")
    tt.load(model, tmp_path)
    torch.testing.assert_close(update(model, path), 2.5 * b @ a)


def test_torchtune_files_that_do_not_fit(tmp_path) -> None:
    file = tmp_path / "adapter_0.pt"
    good = {"layers.0.attn.v_proj.lora_a.weight": draw(2, 32), "layers.0.attn.v_proj.lora_b.weight": draw(16, 2)}

    def refused(stored, error, match, model=None) -> None:
        torch.save(stored, file)
        with pytest.raises(error, match=match):
            tt.convert(file, tmp_path / "out", base=model or make("llama"), alpha=4)

    refused(good | {"layers.7.attn.v_proj.lora_a.weight": draw(2, 32)}, tt.NoMatch, r"layers\.7\.attn\.v_proj")
    refused(good | {"layers.1.mlp.w1.lora_a.weight": draw(2, 32)}, tt.CheckpointMismatch, r"missing \(1\)")
    refused(good | {"step": torch.tensor(1)}, tt.CheckpointMismatch, r"unused \(1\)")
    refused(good | {"layers.0.attn.v_proj.lora_b.weight": draw(15, 2)}, tt.ShapeMismatch, r"needs b of \(16, 2\)")
    other = make("llama")
    other.config.model_type = "novel"
    refused({k.replace("v_proj", "q_proj"): v for k, v in good.items()}, tt.Unsupported, "permute=True", other)
    torch.save(good, file)
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(tt.CheckpointMismatch, match=r"adapter_0\.pt cannot be read .* ends at byte \d"):
        tt.convert(file, tmp_path / "out", base=make("llama"), alpha=4)


def test_writing_them_is_refused(tmp_path) -> None:
    model = make("bert")
    tt.attach(model, tt.LoRA(rank=2), targets="attn.q")
    for format in ("kohya", "torchtune", "adapters"):
        with pytest.raises(tt.Unsupported, match="does not write them"):
            tt.save(model, tmp_path / "x", format=format)
