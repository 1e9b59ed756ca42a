"""Damaged and hostile files, for every reader: a sentence or the same weights; no raw error, no hang, little memory."""

from __future__ import annotations

import random
import shutil
import signal
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import trimtab as tt
from artifacts.damage import damage
from artifacts.readers import READERS

SECONDS = 20  # of one reading
CONSTANT = 128 << 20  # bytes of memory beside twice the file


@contextmanager
def limited(what: str) -> Iterator[None]:
    """Fail if the block takes too long."""

    def late(*_: object) -> None:
        raise AssertionError(f"{what}: took more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def resident(kind: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) * 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def copy_of(source: Path, target: Path) -> Path:
    (shutil.copytree if source.is_dir() else shutil.copyfile)(source, target)
    return target


def size_of(path: Path) -> int:
    return sum(p.lstat().st_size for p in path.rglob("*")) if path.is_dir() else path.lstat().st_size


def attack(name: str, count: int, tmp_path: Path, *, seed: int = 0) -> tuple[Counter, list[str]]:
    """What became of ``count`` damaged copies, and what should not have."""
    reader = READERS[name]
    (tmp_path / "good").mkdir()
    good = reader.write(tmp_path / "good")
    expected = reader.read(good)
    assert expected and all(torch.isfinite(value).all() for value in expected.values())
    outcomes: Counter = Counter()
    wrong: list[str] = []
    for number in range(count):
        target = copy_of(good, tmp_path / f"bad{good.suffix}")
        what, resealed = damage(target, random.Random(f"{name} {seed} {number}"), reseal=reader.reseal)
        what = f"{name} {seed} {number}: {what}"
        size = size_of(target) if target.exists() else 0
        reset_peak()
        before = resident("VmRSS")
        try:
            with limited(what):
                found = reader.read(target)
        except tt.TrimtabError as error:
            outcomes[type(error).__name__] += 1
            if not str(error).strip():
                wrong.append(f"{what}: an error without a word")
        except AssertionError as error:
            wrong.append(str(error))
        except BaseException as error:
            frames = traceback.extract_tb(error.__traceback__)
            at = [f"{Path(f.filename).name}:{f.lineno}" for f in frames if "trimtab" in f.filename]
            wrong.append(f"{what}: {type(error).__name__}: {str(error)[:150]} at {' '.join(at[-3:])}")
        else:
            outcomes["read"] += 1
            if not all(torch.isfinite(value).all() for value in found.values()):
                wrong.append(f"{what}: values that are not finite were read")
            same = found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in expected)
            if reader.sealed and not resealed and not same:
                wrong.append(f"{what}: other weights were read, and nobody noticed")
        grown = resident("VmHWM") - before
        if grown > 2 * size + CONSTANT:
            wrong.append(f"{what}: {grown:,} bytes of memory for a file of {size:,}")
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)
    return outcomes, wrong


@pytest.mark.parametrize("name", READERS)
def test_damage_is_told_in_a_sentence(name: str, tmp_path: Path) -> None:
    outcomes, wrong = attack(name, 40, tmp_path)
    assert not wrong, f"{len(wrong)} of 40, {dict(outcomes)}:\n" + "\n".join(wrong[:20])
    assert sum(count for kind, count in outcomes.items() if kind != "read") > 10


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_three_thousand_damaged_files_a_reader(name: str, tmp_path: Path) -> None:
    outcomes, wrong = attack(name, 3000, tmp_path, seed=1)
    assert not wrong, f"{len(wrong)} of 3000, {dict(outcomes)}:\n" + "\n".join(wrong[:40])


@pytest.mark.parametrize(
    ("beside", "refused"),
    [
        ("non_lora_trainables.bin", True), ("value_head.safetensors", True), ("pytorch_model.bin", True), ("optimizer.pt", False),
        ("rng_state_0.pth", False), ("training_args.bin", False), ("model-00001-of-00002.safetensors", False), ("x.json", False),
    ],
)  # fmt: skip
def test_what_was_trained_beside_an_adapter_of_peft_is_not_left_out_silently(beside: str, refused: bool, tmp_path: Path) -> None:
    good, _ = samples("peft", tmp_path)
    expected = READERS["peft"].read(good)
    torch.save({"mm_projector.weight": torch.ones(2)}, good / beside)
    if refused:
        with pytest.raises(tt.Unsupported, match=f"{beside} beside the adapter"):
            READERS["peft"].read(good)
    else:
        assert READERS["peft"].read(good).keys() == expected.keys()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("form", ["own", "peft", "peft .bin", "kohya", "kohya .pt"])
def test_reading_takes_no_more_than_twice_the_file(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    import json

    from safetensors.torch import save_file
    from torch import nn

    width, rank = 2048, 1024
    names = [f"fc{i}" for i in range(8)]

    def net() -> nn.Module:
        return nn.ModuleDict({name: nn.Linear(width, width, bias=False, device="meta") for name in names}).to_empty(device="cpu")

    tensors = {}
    for name in names:
        down, up = torch.ones(rank, width, dtype=dtype), torch.ones(width, rank, dtype=dtype)
        if form.startswith("kohya"):
            tensors |= {f"lora_unet_{name}.lora_down.weight": down, f"lora_unet_{name}.lora_up.weight": up}
        else:
            tensors |= {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
    source = tmp_path / "x"
    source.mkdir()
    write = torch.save if form.endswith((".bin", ".pt")) else save_file
    suffix = form.partition(" ")[2] or ".safetensors"
    if form == "own":
        model = net()
        for name in names:
            nn.init.ones_(model[name].weight)
        tt.attach(model, tt.LoRA(rank=rank), targets=names)
        tt.save(model, source)
    else:
        write(tensors, source / f"adapter_model{suffix}")
        about = {"peft_type": "LORA", "r": rank, "lora_alpha": 1, "target_modules": names}
        if form.startswith("peft"):
            (source / "adapter_config.json").write_text(json.dumps(about))
    del tensors
    size, model = size_of(source), net()
    for name in names:
        nn.init.ones_(model[name].weight)
    reset_peak()
    before = resident("VmRSS")
    tt.load(model, source)
    grown = resident("VmHWM") - before
    assert grown < 2 * size + (40 << 20), f"{grown / size:.2f} times the file of {size:,}"


# -- kinds of damage one by one, for every reader


def samples(name: str, tmp_path: Path) -> tuple[Path, list[Path]]:
    """A fresh sample, and the files in it relative to what is read."""
    (tmp_path / "good").mkdir()
    good = READERS[name].write(tmp_path / "good")
    return good, sorted(p.relative_to(good) for p in good.rglob("*") if p.is_file()) if good.is_dir() else [Path()]


def replace_value(file: Path, key: str, value: float) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as stream:
            notes = stream.metadata()
        tensors = load_file(file)
        tensors[key].view(-1)[-1] = value
        save_file(tensors, file, metadata=notes)
    else:
        tensors = torch.load(file, weights_only=True)
        tensors[key].view(-1)[-1] = value
        torch.save(tensors, file)


def keys_of(file: Path) -> list[str]:
    from safetensors.torch import load_file

    stored = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    return [key for key, value in stored.items() if value.is_floating_point() and value.numel()][:6]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [name for name in READERS if not name.startswith("packed")])
def test_values_that_are_not_finite_are_refused(name: str, value: float, tmp_path: Path) -> None:
    good, files = samples(name, tmp_path)
    tried = 0
    for inner in files:
        if (good / inner).suffix not in (".safetensors", ".bin", ".pt"):
            continue
        for key in keys_of(good / inner):
            bad = copy_of(good, tmp_path / f"bad{tried}{good.suffix}")
            replace_value(bad / inner if inner.parts else bad, key, value)
            with pytest.raises(tt.CheckpointMismatch, match="NaN or infinite|SHA-256"):
                READERS[name].read(bad)
            tried += 1
    assert tried


WITH_CONFIGS = ("own", "peft", "peft .bin", "hub", "torchtune", "mlx", "base shards", "sketched base")


@pytest.mark.parametrize("name", WITH_CONFIGS)
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_in_any_config_changes_nothing(name: str, encoding: str, tmp_path: Path) -> None:
    good, files = samples(name, tmp_path)
    expected = READERS[name].read(good)
    configs = [inner for inner in files if inner.suffix == ".json" and "tokenizer" not in inner.name]
    assert configs
    for inner in configs:
        text = (good / inner).read_text("utf-8-sig")
        (good / inner).write_text(text, encoding)
    found = READERS[name].read(good)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("kind", ["pipe", "directory", "device"])
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_regular_file_is_not_opened(name: str, kind: str, tmp_path: Path) -> None:
    import os

    good, files = samples(name, tmp_path)
    unread = ("README.md", "tokenizer.json", "chat_template.jinja", "generation_config.json")
    needed = [p for p in files if p.name not in unread and (name != "sketched base" or p.name.startswith("sketch"))]
    for number, inner in enumerate(needed):
        bad = copy_of(good, tmp_path / f"bad{number}{good.suffix}")
        file = bad / inner if inner.parts else bad
        file.unlink()
        if kind == "pipe":
            os.mkfifo(file)
        elif kind == "directory":
            file.mkdir()
        else:
            file.symlink_to("/dev/zero")
        with limited(f"{name}, {inner} as a {kind}"), pytest.raises(tt.TrimtabError):
            READERS[name].read(bad)


@pytest.mark.parametrize("name", ["peft .bin", "kohya .pt", "hub", "torchtune"])
def test_a_flipped_bit_in_a_file_of_torch_is_noticed(name: str, tmp_path: Path) -> None:
    good, files = samples(name, tmp_path)
    expected = READERS[name].read(good)
    inner = next(inner for inner in files if (good / inner).suffix in (".bin", ".pt"))
    whole, rng, refused = (good / inner).read_bytes(), random.Random(0), 0
    for _ in range(150):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (good / inner).write_bytes(data)
        try:
            found = READERS[name].read(good)
        except tt.TrimtabError:
            refused += 1
            continue
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    assert refused > 75
