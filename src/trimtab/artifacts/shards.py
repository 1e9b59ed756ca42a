"""A checkpoint written file by file beside its final place, resumable, and moved there when it is whole."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from trimtab import __version__
from trimtab.compat.model_config import read_config
from trimtab.compat.pretrained import INDEX
from trimtab.compat.safetensors_file import Header, read_header, write_file
from trimtab.core.errors import NotMergeable, TrimtabError
from trimtab.core.files import locked, sync
from trimtab.core.folders import writing
from trimtab.core.reading import read_json

__all__ = ["Output", "Staging"]

PROGRESS = "progress.json"
RECORD = "trimtab_merge.json"
#: endings of weights and of what belongs to them; all else in a model's folder is copied
_WEIGHTS = (
    ".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx",
    ".gguf",
)  # fmt: skip


@dataclass(frozen=True)
class Output:
    """One tensor of the new checkpoint.

    Attributes:
        file: the name of its file.
        name: its own.
        dtype: as safetensors names it.
        shape: its shape; None where only the tensor tells it (a quantised weight's notes).
        produce: gives the tensor, or where its bytes stand in another file.
        size: in bytes, where they are copied.
    """

    file: str
    name: str
    dtype: str
    shape: tuple[int, ...] | None
    produce: Callable[[], Tensor | tuple[Header, str]]
    size: int | None = None


class Staging:
    """The hidden folder beside ``out`` where the work stands until it is whole; a context.

    An error of trimtab's removes it; a kill or an interrupt leaves it, and the next merge of the same ``job`` finds its files.

    Args:
        out: the final folder.
        job: everything that decides the result; another job starts anew.
        files: the base's.

    Raises:
        Busy: another process works on the same ``out``. WriteError: a full disk, a read-only folder.
    """

    def __init__(self, out: Path, job: dict[str, Any], files: Sequence[Header]):
        self.out = Path(os.path.abspath(out))
        self.folder = self.out.with_name(f".{self.out.name}.part")
        marks = [[h.file.name, h.file.stat().st_size, h.file.stat().st_mtime_ns, sorted(h.entries)] for h in files]
        text = json.dumps([__version__, job, marks], sort_keys=True, default=str)
        self.job = hashlib.sha256(text.encode()).hexdigest()
        self.done: dict[str, list[list[Any]]] = {}

    def __enter__(self) -> Staging:
        with contextlib.ExitStack() as stack:
            stack.enter_context(writing(self.out))
            stack.enter_context(locked(self.out, "is merging into"))
            self._begin()
            self._held = stack.pop_all()
        return self

    def _begin(self) -> None:
        """Take up what an earlier process of the same job left, and remove all else of it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            progress = json.loads((self.folder / PROGRESS).read_text("utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            progress = {}
        if progress.get("job") == self.job:
            self.done = {name: rows for name, rows in progress["done"].items() if (self.folder / name).is_file()}
        for entry in self.folder.iterdir():
            if entry.name not in {PROGRESS, *self.done}:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> bool | None:
        if kind is not None and issubclass(kind, TrimtabError):
            shutil.rmtree(self.folder, ignore_errors=True)
        return self._held.__exit__(kind, error, trace)

    def write(self, file: str, outputs: Sequence[Output], metadata: dict[str, str]) -> None:
        """One file of weights, whole or not at all."""
        by_name = {output.name: output for output in outputs}
        listed = [(o.name, o.dtype, o.shape) for o in outputs]
        sizes = {output.name: output.size for output in outputs if output.size is not None}
        write_file(self.folder / file, listed, lambda name: by_name[name].produce(), metadata=metadata, sizes=sizes)

    def record(self, file: str, rows: list[list[Any]]) -> None:
        """Note that ``file`` is finished, and what was reported while it was written."""
        self.done[file] = rows
        self.put(PROGRESS, {"job": self.job, "done": self.done})

    def finish(
        self, source: Path, outputs: Sequence[Output], config: dict[str, Any], record: dict[str, Any],
        check: Callable[[Path], None],
    ) -> None:  # fmt: skip
        """Copy all that is no weight, write index, config and record, and move the folder to its place.

        Args:
            source: the base's folder.
            config: changes of ``config.json``; None takes a key out.
            record: what ``trimtab_merge.json`` holds.
            check: looks at the folder before it gets its name, and raises if it is not to have it.
        """
        for entry in sorted(source.iterdir()):
            if entry.is_file() and not entry.name.endswith(_WEIGHTS) and not entry.name.startswith((".", "README")):
                shutil.copyfile(entry, self.folder / entry.name)
        if config:
            old = read_config(self.folder)
            self.put("config.json", {k: v for k, v in {**old, **config}.items() if v is not None})
        if (source / INDEX).is_file():
            about = read_json(source / INDEX).get("metadata")
            written = [e for name in {o.file for o in outputs} for e in read_header(self.folder / name).entries.values()]
            metadata = {**(about if isinstance(about, dict) else {}), "total_size": sum(e.end - e.begin for e in written)}
            if "total_parameters" in metadata:
                metadata["total_parameters"] = sum(math.prod(e.shape) for e in written)
            self.put(INDEX, {"metadata": metadata, "weight_map": {o.name: o.file for o in sorted(outputs, key=lambda o: o.name)}})
        self.put(RECORD, {"trimtab": __version__, **record})
        check(self.folder)
        for file in self.folder.iterdir():
            sync(file)
        (self.folder / PROGRESS).unlink(missing_ok=True)
        if os.path.lexists(self.out):
            raise NotMergeable(f"{self.out} came to be while the merge was at work; choose another folder for the merged model")
        os.replace(self.folder, self.out)

    def put(self, name: str, content: Any) -> None:
        """A JSON file of the folder, whole or not at all."""
        draft = self.folder / f".{name}.part"
        draft.write_text(json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n", "utf-8")
        sync(draft)
        os.replace(draft, self.folder / name)
