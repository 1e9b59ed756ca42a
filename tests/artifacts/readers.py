"""A small file or folder for every reader, and how it is read: for tests that damage them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import trimtab as tt
from artifacts.bases import make, save

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"


@dataclass(frozen=True)
class Reader:
    """One reader.

    Attributes:
        write: writes the sample into an empty folder; returns what is read.
        read: reads it; returns what came of it as tensors.
        sealed: whether any change of a value must be noticed.
        reseal: whether manifests with seals that fit their damage are tried too.
    """

    write: Callable[[Path], Path]
    read: Callable[[Path], dict[str, Tensor]]
    sealed: bool = False
    reseal: bool = True


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * 0.3


@cache
def model() -> nn.Module:
    return make("llama")


@cache
def bert() -> nn.Module:
    return make("bert")


class Unet(nn.Module):
    """Names as diffusers has them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv_in, self.norm = nn.Conv2d(4, 8, 3), nn.GroupNorm(2, 8)
        self.attn = nn.Module()
        self.attn.to_q, self.attn.to_k, self.attn.to_v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 12)


@cache
def unet() -> nn.Module:
    return Unet()


def groups(root: nn.Module) -> list[str]:
    state = root.__dict__.get("_trimtab_state")
    return [] if state is None else list(state.groups)


def attached(root: Callable[[], nn.Module], **options: Any) -> Callable[[Path], dict[str, Tensor]]:
    """Load onto a model, read the adapter's tensors, take it off again."""

    def read(path: Path) -> dict[str, Tensor]:
        whole = root()
        try:
            name = tt.load(whole, path, name="fuzz", **options)
            group = whole._trimtab_state.groups[name]
            scales = [torch.tensor(float(getattr(a.config, "scale", 1.0))) for a in group.adapters]
            values = {
                f"{a.site.name}.{type(a.config).__name__}.{k}": v.detach().clone()
                for a in group.adapters for k, v in a.state_dict().items()
            }  # fmt: skip
            return values | {f"scale {i}": scale for i, scale in enumerate(scales)}
        except Exception:
            left = groups(whole)
            assert not left, f"an error left the group {left} on the model"
            raise
        finally:
            for name in groups(whole):
                tt.detach(whole, name)

    return read


def own(folder: Path) -> Path:
    net = make("llama")
    tt.attach(net, tt.LoRA(rank=2), targets=[Q, V], name="own")
    for i, value in enumerate(tt.parameters(net)):
        value.data.copy_(draw(*value.shape, seed=i))
    return tt.save(net, folder / "own", name="own")


def packed(folder: Path) -> Path:
    tt.compress(own(folder), folder / "x.tern", density=0.5)
    return folder / "x.tern"


def expanded(path: Path) -> dict[str, Tensor]:
    """What a compressed adapter becomes without its base."""
    from safetensors.torch import load_file

    out = tt.expand(path, path.parent / "expanded", model=None)
    found = load_file(next(out.glob("adapter-*.safetensors")))
    shutil.rmtree(out)
    return found


def peft(folder: Path, *, pickled: bool = False) -> Path:
    path = folder / "peft"
    path.mkdir()
    pairs = {f"base_model.model.{Q}.lora_{x}.weight": draw(*s) for x, s in (("A", (2, 32)), ("B", (32, 2)))}
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 6, "target_modules": [Q], "bias": "none",
        "lora_dropout": 0.0, "use_rslora": False, "use_dora": False, "init_lora_weights": True, "rank_pattern": {},
        "alpha_pattern": {}, "modules_to_save": None, "base_model_name_or_path": "x", "fan_in_fan_out": False,
        "inference_mode": True, "layers_to_transform": None, "layers_pattern": None,
    }  # fmt: skip
    (path / "adapter_config.json").write_text(json.dumps(config))
    (torch.save if pickled else save_file)(pairs, path / ("adapter_model.bin" if pickled else "adapter_model.safetensors"))
    return path


def kohya(folder: Path, *, suffix: str = ".safetensors") -> Path:
    places = {
        "lora_unet_attn_to_q": {"lora_down.weight": draw(2, 8), "lora_up.weight": draw(8, 2), "alpha": torch.tensor(3.0)},
        "lora_unet_conv_in": {
            "lora_down.weight": draw(2, 4, 3, 3), "lora_up.weight": draw(8, 2, 1, 1), "dora_scale": draw(8, 1, 1, 1),
        },
    }  # fmt: skip
    stored = {f"{name}.{key}": value for name, found in places.items() for key, value in found.items()}
    path = folder / f"style{suffix}"
    save_file(stored, path, metadata={"ss_network_args": "{}"}) if suffix == ".safetensors" else torch.save(stored, path)
    return path


def lycoris(folder: Path) -> Path:
    hada = {f"hada_w{i}_{x}": draw(*s) for i in "12" for x, s in (("a", (8, 2)), ("b", (2, 8)))}
    places = {
        "lycoris_attn_to_q": hada | {"alpha": torch.tensor(1.0)}, "lycoris_norm": {"w_norm": draw(8), "b_norm": draw(8)},
        "lycoris_attn_to_k": {"lokr_w1": draw(2, 4), "lokr_w2_a": draw(4, 1), "lokr_w2_b": draw(1, 2), "alpha": torch.tensor(2.0)},
        "lycoris_attn_to_v": {"diff": draw(12, 8), "diff_b": draw(12)},
    }  # fmt: skip
    save_file({f"{n}.{k}": v for n, found in places.items() for k, v in found.items()}, folder / "x.safetensors")
    return folder / "x.safetensors"


def diffusers(folder: Path) -> Path:
    pairs = {f"unet.attn.to_q.lora_{x}.weight": draw(*s) for x, s in (("A", (2, 8)), ("B", (8, 2)))}
    notes = {"unet.r": 2, "unet.lora_alpha": 4, "unet.rank_pattern": {}, "unet.alpha_pattern": {"attn.to_q": 3}}
    save_file(pairs, folder / "pytorch_lora_weights.safetensors", metadata={"lora_adapter_metadata": json.dumps(notes)})
    return folder


def hub(folder: Path) -> Path:
    path = folder / "hub"
    path.mkdir()
    config = {"architecture": "lora", "r": 2, "alpha": 6, "composition_mode": "add", "attn_matrices": ["q"], "use_gating": False}
    about = {"config": config, "name": "sst", "model_class": "BertModel", "version": "adapters.1.2.0", "hidden_size": 32}
    (path / "adapter_config.json").write_text(json.dumps(about))
    key = "bert.encoder.layer.0.attention.self.query.loras.sst.lora_"
    torch.save({f"{key}A": draw(2, 32), f"{key}B": draw(32, 2)}, path / "pytorch_adapter.bin")
    return path


def torchtune(folder: Path) -> Path:
    path = folder / "tune"
    path.mkdir()
    pair = {f"layers.0.attn.v_proj.lora_{x}.weight": draw(*s) for x, s in (("a", (2, 32)), ("b", (16, 2)))}
    torch.save(pair, path / "adapter_0.pt")
    config = {"r": 2, "lora_alpha": 5, "peft_type": "LORA", "target_modules": ["v_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def mlx(folder: Path) -> Path:
    path = folder / "adapters"
    path.mkdir()
    save_file({f"{Q}.lora_a": draw(32, 2), f"{Q}.lora_b": draw(2, 32)}, path / "adapters.safetensors")
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 2, "scale": 20.0, "dropout": 0.0}}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def shards(folder: Path) -> Path:
    path = folder / "base"
    save(make("llama"), path)
    (path / "pytorch_model.bin").unlink()
    return path


def read_shards(path: Path) -> dict[str, Tensor]:
    from trimtab.compat.pretrained import Pretrained

    base = Pretrained(path, ["LlamaForCausalLM"])
    return {key: base.tensor(key) for key in base.where}


def sketched(folder: Path) -> Path:
    save(make("llama"), folder / "base", shard="10GB")
    (folder / "base" / "pytorch_model.bin").unlink()
    tt.compress_base(folder / "base", folder / "sketch", sketch=tt.BaseSketch(restarts=1), shard_bytes=30_000)
    return folder / "sketch"


def read_sketch(path: Path) -> dict[str, Tensor]:
    from trimtab.compat.sketch_folder import read_all

    _, tensors = read_all(path)
    return {key: value.dequantize() if hasattr(value, "sketch_codes") else value for key, value in tensors.items()}


READERS = {
    "own": Reader(own, attached(model), sealed=True),
    "packed": Reader(packed, attached(model), sealed=True),
    "packed, expanded": Reader(packed, expanded, sealed=True),
    "peft": Reader(peft, attached(model)), "peft .bin": Reader(lambda f: peft(f, pickled=True), attached(model)),
    "kohya": Reader(kohya, attached(unet)), "kohya .pt": Reader(lambda f: kohya(f, suffix=".pt"), attached(unet)),
    "lycoris": Reader(lycoris, attached(unet)), "diffusers": Reader(diffusers, attached(unet)), "hub": Reader(hub, attached(bert)),
    "torchtune": Reader(torchtune, attached(model)), "mlx": Reader(mlx, attached(model)),
    "base shards": Reader(shards, read_shards), "sketched base": Reader(sketched, read_sketch, sealed=True),
}  # fmt: skip
