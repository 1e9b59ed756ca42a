"""Full checkpoints on disk, read tensor by tensor: one safetensors file, or a folder of them with or without an index."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trimtab.compat.pretrained import index_of
from trimtab.compat.safetensors_file import read_header
from trimtab.core.errors import CheckpointMismatch
from trimtab.core.reading import inside

__all__ = ["Weights"]

SAMPLES = 64


class Weights:
    """The tensors of a checkpoint, none of them in memory.

    Attributes:
        path: a file, or a folder with ``*.safetensors``.
        files: key -> its file, in the order of files and keys.
        info: key -> (dtype, shape).

    Raises:
        CheckpointMismatch: there is nothing to read, or a file is damaged or lacks what the index says.
    """

    def __init__(self, path: Path):
        self.path = path
        self.files: dict[str, Path] = {}
        self.info: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._open: tuple[Path, Any] | None = None
        for file in self._found(path):
            stream = self._reader(file)
            for key in sorted(stream.keys()):
                part = stream.get_slice(key)
                self.files[key] = file
                self.info[key] = (_DTYPES.get(part.get_dtype(), part.get_dtype()), tuple(part.get_shape()))

    @staticmethod
    def _found(path: Path) -> list[Path]:
        if path.is_file():
            return [path]
        indexes = sorted(path.glob("*.safetensors.index.json")) if path.is_dir() else []
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else []
        if indexes:
            named = {inside(path, name, indexes[0]) for name in index_of(indexes[0]).values()}
            missing = sorted(file.name for file in named if not file.is_file())
            if missing:
                raise CheckpointMismatch(f"{indexes[0]} names {', '.join(missing)}, which is not there")
            files = sorted(named)
        if not files:
            raise CheckpointMismatch(f"{path} holds no checkpoint: it is no safetensors file, and no folder with one")
        return files

    def _reader(self, file: Path) -> Any:
        if self._open is None or self._open[0] != file:
            read_header(file)  # says at which byte a damaged file is damaged
            try:
                self._open = (file, safe_open(file, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise CheckpointMismatch(f"{file} is no readable safetensors file: {error}") from None
        return self._open[1]

    def __getitem__(self, key: str) -> Tensor:
        return self._reader(self.files[key]).get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def identity(self, keys: Sequence[str]) -> str:
        """A digest of names, shapes, dtypes and 64 evenly spaced values of every tensor: another checkpoint has another."""
        digest = hashlib.blake2b(digest_size=16)
        for key in keys:
            digest.update(repr((key, self.info[key])).encode())
            flat = self[key].reshape(-1)
            if flat.numel():
                where = torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel())).long()
                digest.update(flat[where].contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32", "I16": "int16",
    "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
