"""A dense checkpoint on disk that is read one tensor at a time, and the model it belongs to, without a weight."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.artifacts.folder_base import local_folder
from trimtab.compat.model_config import config_class
from trimtab.compat.pretrained import read_files
from trimtab.compat.safetensors_file import DTYPES, Header, read_tensor
from trimtab.compat.sketch_folder import is_sketch
from trimtab.core.errors import Unsupported
from trimtab.training.errors import ConfigError

__all__ = ["Source", "empty_model"]

#: endings of weights, of which a sketch has its own; all else in a model's folder is copied
_WEIGHTS = (".safetensors", ".bin", ".h5", ".msgpack", ".onnx", ".ot", ".gguf", ".pt", ".pth", ".ckpt", ".index.json")
_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16


@dataclass(frozen=True)
class Source:
    """A folder in transformers' format with safetensors.

    Attributes:
        folder: the folder.
        name: what the user called it.
        where: tensor -> the header of the file that holds it, in the order of the files.
    """

    folder: Path
    name: str
    where: dict[str, Header]

    @classmethod
    def open(cls, model: str | Path) -> Source:
        """The checkpoint of ``model``: a folder, a packaged model, or a Hub id, which is downloaded.

        Raises:
            ConfigError: there is no such model. Unsupported: it is a sketch, or has tensors that torch has no dtype for.
            CheckpointMismatch: it has no safetensors, or a file is damaged or missing.
        """
        folder = local_folder(model)
        if is_sketch(folder):
            raise Unsupported(f"{folder} is a sketch already; trimtab expand-base writes the dense model that it stands for")
        where = {key: header for header in read_files(folder) for key in header.entries}
        odd = [key for key, header in where.items() if header.entries[key].dtype not in DTYPES]
        if odd:
            raise Unsupported(f"{folder} holds {odd[0]} as {where[odd[0]].entries[odd[0]].dtype}, which torch has no dtype for")
        return cls(folder, str(model), where)

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of one tensor."""
        return self.where[key].entries[key].shape

    def dtype(self, key: str) -> torch.dtype:
        """The dtype of one tensor."""
        return DTYPES[self.where[key].entries[key].dtype]

    def nbytes(self, key: str) -> int:
        """Bytes of one tensor."""
        entry = self.where[key].entries[key]
        return entry.end - entry.begin

    def read(self, key: str) -> Tensor:
        """One tensor, in memory of its own."""
        return read_tensor(self.where[key], key)

    def fingerprint(self) -> str:
        """SHA-256 of the files' names and sizes and of 64 KiB at 16 places of each: cheap, and any other checkpoint differs."""
        digest = hashlib.sha256()
        for file in dict.fromkeys(header.file for header in self.where.values()):
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


def empty_model(folder: Path) -> nn.Module:
    """The model that ``folder`` configures, its parameters on the meta device, its buffers real.

    Raises:
        ConfigError: transformers cannot build it. CheckpointMismatch: no configuration, or one that it cannot read.
    """
    import transformers
    from accelerate import init_empty_weights

    config = config_class(folder)
    try:
        cls = getattr(transformers, (config.architectures or ["AutoModel"])[0], transformers.AutoModel)
        with init_empty_weights(include_buffers=False):
            model: Any = cls.from_config(config, trust_remote_code=False) if hasattr(cls, "from_config") else cls(config)
    except (OSError, ValueError) as error:
        raise ConfigError(f"transformers cannot build the model in {folder}: {str(error).splitlines()[0]}") from error
    if hasattr(model, "tie_weights"):
        model.tie_weights()  # a tensor that goes to the meta device leaves its twin
    return model.eval().requires_grad_(False)
