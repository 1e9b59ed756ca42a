"""The folder of a saved adapter: ``manifest.json``, sealed, and one safetensors file that it names by its hash."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from trimtab.core.errors import CheckpointMismatch, NoMatch
from trimtab.core.files import stage_of, staged, sweep
from trimtab.core.folders import DRAFT, recover, steady, tensors_in, waiting, writing
from trimtab.core.manifest import check_manifest
from trimtab.core.reading import inside, read_json
from trimtab.core.recognition import MANIFEST

__all__ = ["BESIDE", "MANIFEST", "VERSION", "read_manifest", "read_saved", "read_tensors", "seal_of", "sha256_of", "write_folder"]

VERSION = 1
#: the folder of the adapters that stand beside a model's weights
BESIDE = "trimtab"
_TENSORS = re.compile(r"adapter-[0-9a-f]{12}\.safetensors")
_NOTE = re.compile(rf"\.({_TENSORS.pattern})\.[0-9a-f]{{8}}\.old")


def seal_of(manifest: dict[str, Any]) -> str:
    """SHA-256 of the manifest's content, so that an edited hyperparameter is noticed."""
    content = {key: value for key, value in manifest.items() if key != "seal"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sha256_of(file: Path) -> str:
    """SHA-256 of a file."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# -- reading


def adapter_in(folder: Path, name: str | None = None) -> Path:
    """The folder of the adapter that is meant by ``folder``: itself, or one that was saved beside a model's weights there.

    Args:
        name: which one, where there are several.

    Raises:
        NoMatch: there are several, and ``name`` is none of them.
    """
    folder = Path(folder)
    if (folder / MANIFEST).exists() or not (folder / BESIDE).is_dir():
        return folder
    found = {read_manifest(each)["name"]: each for each in sorted((folder / BESIDE).iterdir()) if (each / MANIFEST).is_file()}
    if not found:
        return folder
    if len(found) == 1:
        return next(iter(found.values()))
    if name not in found:
        raise NoMatch(
            f"{folder} holds the adapters {', '.join(map(repr, found))} beside its weights; say which one with name=..., or give "
            f"its folder, such as {next(iter(found.values()))}"
        )
    return found[name]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest in ``folder``.

    Raises:
        CheckpointMismatch: there is none, it is no JSON, it is of a later version, its seal does not fit, or an entry is not of its
        kind.
    """
    folder = Path(folder)
    recover(folder)
    file = folder / MANIFEST
    if not file.exists():
        names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else ["no such folder"]
        found = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise CheckpointMismatch(f"{folder} holds no trimtab adapter: there is no {MANIFEST} (found: {found or 'nothing'})")
    manifest = read_json(file, finite=False)
    if not isinstance(manifest, dict) or manifest.get("format") != "trimtab":
        raise CheckpointMismatch(f"{file} is not a trimtab manifest")
    version = manifest.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= VERSION:
        raise CheckpointMismatch(f"{file} has version {version!r}; this trimtab reads up to {VERSION}: upgrade it")
    missing = [key for key in ("name", "places", "tensors", "aliases", "base", "file", "sha256", "seal") if key not in manifest]
    if missing:
        raise CheckpointMismatch(f"{file} is damaged: it lacks {', '.join(missing)}")
    if manifest["seal"] != seal_of(manifest):
        raise CheckpointMismatch(f"{file} was changed after it was written: its seal does not fit its content")
    check_manifest(manifest, str(file))
    return manifest


def read_tensors(folder: Path, manifest: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors that ``manifest`` names, aliases included.

    Raises:
        CheckpointMismatch: the file is gone, is not the one that was written.
    """
    file = inside(folder, manifest["file"], folder / MANIFEST)
    if not file.is_file():
        raise CheckpointMismatch(f"{folder} is damaged: its manifest names {manifest['file']}, which is not there")
    try:
        if sha256_of(file) != manifest["sha256"]:
            raise CheckpointMismatch(f"{file} is damaged or was changed: its SHA-256 is not the manifest's; restore it from a copy")
        # cloned, since the file's stand at odd addresses, where vectorised sums differ in their last bits
        tensors = {key: value.clone() for key, value in load_file(file).items()}
    except (OSError, RuntimeError) as error:  # torch's own where it cannot map a file
        raise CheckpointMismatch(f"{file} cannot be read: {error}") from None
    except SafetensorError as error:
        raise CheckpointMismatch(f"{file} is no readable safetensors file: {error}") from None
    for key, source in manifest["aliases"].items():
        if source not in tensors:
            raise CheckpointMismatch(f"{file} is damaged: {key} is stored as {source}, which is not in it")
        tensors[key] = tensors[source]
    return tensors


def read_saved(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Manifest and tensors, of one and the same save even while another process saves there."""
    def read() -> tuple[dict[str, Any], dict[str, Tensor]]:
        manifest = read_manifest(folder)
        return manifest, read_tensors(folder, manifest)

    return steady([Path(folder) / MANIFEST], read)


# -- writing


def write_folder(folder: Path, tensors: dict[str, Tensor], manifest: dict[str, Any]) -> Path:
    """Write tensors, then a manifest that lacks only their file's name and hash and its own seal.

    Two writers come one after the other. Whenever one is killed, the folder's manifest and the file that it names are whole; what
    else it left is removed by the next. No file is removed that no manifest here has named.

    Raises:
        WriteError: a full disk, a read-only folder; what was there is left as it was.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with waiting(folder / MANIFEST, "saves"):
            _tidy(folder)
            old = _named(folder)
            with tensors_in(folder, tensors) as part:
                digest = sha256_of(part)
                final = folder / f"adapter-{digest[:12]}.safetensors"
                with _removing_unnamed(folder, old, None if final.exists() else final.name):
                    os.replace(part, final)
                    manifest = manifest | {"file": final.name, "sha256": digest}
                    text = json.dumps(manifest | {"seal": seal_of(manifest)}, indent=1, sort_keys=True) + "\n"
                    with staged(folder / MANIFEST, folder=False) as draft:
                        draft.write_text(text, "utf-8")
    return folder


def _named(folder: Path) -> str | None:
    """The tensors' file that the manifest in ``folder`` names, if it is one that a save wrote."""
    try:
        manifest = read_json(folder / MANIFEST, finite=False)
    except CheckpointMismatch:
        return None
    name = manifest.get("file") if isinstance(manifest, dict) and manifest.get("format") == "trimtab" else None
    sealed = isinstance(name, str) and _TENSORS.fullmatch(name) and manifest.get("seal") == seal_of(manifest)
    return name if sealed else None


@contextmanager
def _removing_unnamed(folder: Path, *names: str | None) -> Iterator[None]:
    """Remove those of ``names`` that the manifest does not name when the block ends; a note of them outlives a kill."""
    for name in {name for name in names if name is not None}:
        stage_of(folder / name, "old").touch()
    try:
        yield
    finally:
        _tidy(folder)


def _tidy(folder: Path) -> None:
    """Remove what killed saves left: drafts, and tensors' files that are noted and not named by the manifest; under the lock."""
    sweep(folder / MANIFEST)
    sweep(folder / DRAFT)
    kept = _named(folder)
    for entry in list(folder.iterdir()):
        noted = _NOTE.fullmatch(entry.name)
        if noted is not None:
            if noted[1] != kept:
                (folder / noted[1]).unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):
                entry.unlink()
