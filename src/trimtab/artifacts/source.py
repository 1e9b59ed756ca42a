"""A dense checkpoint on disk that is read one tensor at a time, and the model it belongs to, without a weight."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from trimtab.compat.sketch_folder import is_sketch
from trimtab.core.errors import CheckpointMismatch, Unsupported
from trimtab.training.errors import ConfigError
from trimtab.training.models import resolve

__all__ = ["Source", "skeleton"]

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
#: what a model folder holds beside the weights that are read here; weights in other formats are left behind
_WEIGHTS = (".safetensors", ".bin", ".h5", ".msgpack", ".onnx", ".ot", ".gguf", ".pt", ".pth", ".ckpt", ".index.json")
_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16


@dataclass(frozen=True)
class Source:
    """A folder in transformers' format with safetensors.

    Attributes:
        folder: the folder.
        name: what the user called it.
        files: tensor -> the file that holds it, in the order of the files.
        shapes, dtypes: of the tensors; a dtype as torch calls it, such as ``float32``.
    """

    folder: Path
    name: str
    files: dict[str, Path]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]

    @classmethod
    def open(cls, model: str | Path) -> Source:
        """The checkpoint of ``model``: a folder, a packaged model, or a Hub id, which is downloaded.

        Raises:
            ConfigError: there is no such model, or it has no safetensors. Unsupported: it is a sketch.
            CheckpointMismatch: a file is damaged or missing.
        """
        folder = Path(resolve(str(model)))
        if not folder.is_dir():
            folder = _download(str(model))
        if is_sketch(folder):
            raise Unsupported(f"{folder} is a sketch already; trimtab expand-base writes the dense model that it stands for")
        files, shapes, dtypes = {}, {}, {}
        for file in _weight_files(folder):
            try:
                with safe_open(file, "pt") as stored:
                    for key in stored.keys():
                        part = stored.get_slice(key)
                        files[key], shapes[key] = file, tuple(part.get_shape())
                        dtypes[key] = _DTYPES.get(part.get_dtype(), part.get_dtype())
            except (SafetensorError, OSError) as error:
                raise CheckpointMismatch(f"{file} is no readable safetensors file: {error}") from None
        return cls(folder, str(model), files, shapes, dtypes)

    def read(self, key: str) -> Tensor:
        """One tensor, in memory of its own: the file is let go at once, so that no more than this stays resident."""
        with safe_open(self.files[key], "pt") as stored:
            return stored.get_tensor(key).clone()

    def nbytes(self, key: str) -> int:
        """Bytes of one tensor."""
        count = 1
        for size in self.shapes[key]:
            count *= size
        dtype = getattr(torch, self.dtypes[key], None)
        return count * (dtype.itemsize if dtype is not None else 1)

    def fingerprint(self) -> str:
        """SHA-256 of the files' names and sizes and of 64 KiB at 16 places of each: cheap, and any other checkpoint differs."""
        digest = hashlib.sha256()
        for file in dict.fromkeys(self.files.values()):
            size = file.stat().st_size
            digest.update(f"{file.name} {size}\n".encode())
            with open(file, "rb") as stream:
                for i in range(_SAMPLES):
                    stream.seek(max(0, (size - _SAMPLE_BYTES) * i // (_SAMPLES - 1)))
                    digest.update(stream.read(_SAMPLE_BYTES))
        return digest.hexdigest()

    def others(self) -> list[Path]:
        """The files that are no weights: configuration, tokenizer, documentation; relative to the folder."""
        inside = (path for path in sorted(self.folder.rglob("*")) if path.is_file() and not path.name.endswith(_WEIGHTS))
        found = (path.relative_to(self.folder) for path in inside)
        return [path for path in found if not any(part.startswith(".") for part in path.parts)]


_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32", "I16": "int16",
    "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        except (json.JSONDecodeError, KeyError, AttributeError) as error:
            raise CheckpointMismatch(f"{index} is damaged: {error!r}") from None
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise CheckpointMismatch(f"{folder} is damaged: {INDEX} names {', '.join(missing[:3])}, which is not there")
        return [folder / name for name in names]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    raise ConfigError(f"{folder} has no {SINGLE} or {INDEX}; load the model once and save_pretrained it, which writes safetensors")


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(model, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]))
    except (OSError, ValueError, HfHubHTTPError) as error:
        why = str(error).splitlines()[0]
        raise ConfigError(f"the model {model!r} is no folder here and cannot be had from the Hub: {why}") from error


def skeleton(folder: Path) -> nn.Module:
    """The model that ``folder`` configures, its parameters on the meta device, its buffers real.

    Raises:
        ConfigError: transformers does not know it.
    """
    import transformers
    from accelerate import init_empty_weights

    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        cls = getattr(transformers, (config.architectures or ["AutoModel"])[0], transformers.AutoModel)
        with init_empty_weights(include_buffers=False):
            model: Any = cls.from_config(config) if hasattr(cls, "from_config") else cls(config)
    except (OSError, ValueError) as error:
        raise ConfigError(f"transformers cannot build the model in {folder}: {str(error).splitlines()[0]}") from error
    if hasattr(model, "tie_weights"):
        model.tie_weights()  # a tensor that goes to the meta device leaves its twin
    return model.eval().requires_grad_(False)
