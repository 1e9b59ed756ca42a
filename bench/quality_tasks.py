"""The two small real tasks of ``bench/quality.py``: text (WordNet supersenses) and images (garments of Fashion-MNIST).

A task gives a fresh pretrained model with a fresh head for a seed, batches, and accuracy on a split. Everything that the
methods share (order of rows, head's start, number of steps) depends on the seed alone.

The images' base is a small ViT that this file pretrained on five classes of Fashion-MNIST (trousers, sandals, sneakers, bags,
boots); the methods then learn the other five (T-shirts, pullovers, dresses, coats, shirts), which it has never seen, from
1,000 images. Training is not bit for bit alike on two machines and a base moves every method's accuracy by a point, so the
base of the stored results lies beside this file (``fashion_vit.safetensors``, 16 bits); without that file a new one is
pretrained in its place, and its hash keeps its results apart. The data is Debian's package dataset-fashion-mnist, fetched on
first use.
"""

from __future__ import annotations

import copy
import gzip
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTModel

from trimtab.tasks import get as get_task
from trimtab.training.config import load_config
from trimtab.training.sampler import EpochSampler

__all__ = ["TASKS", "Fashion", "Supersense", "TaskData"]

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "bench" / ".cache"
BASE = ROOT / "bench" / "fashion_vit.safetensors"
Batch = dict[str, Tensor]


@dataclass
class TaskData:
    """One task: its examples in memory, by split.

    Attributes:
        name: of the task.
        epochs, batch_size: of every run.
        head: path of the head in the model.
        base: hash of the pretrained weights where they are not a published model's.
        settings: of a method's config, where its defaults do not fit the model's widths.
    """

    name: str
    epochs: int
    batch_size: int
    head: str
    splits: dict[str, Any] = field(default_factory=dict)
    base: str | None = None
    settings: ClassVar[dict[str, dict[str, Any]]] = {}

    def model(self, seed: int) -> nn.Module:
        """A fresh model on the pretrained weights; the head's start depends on ``seed``."""
        raise NotImplementedError

    def batches(self, split: str, *, seed: int | None = None, epoch: int = 0) -> Iterator[Batch]:
        """Batches with ``labels``; in the order of ``(seed, epoch)``, or the stored order without a seed."""
        raise NotImplementedError

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """(n, classes)."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy with label smoothing 0.1."""
        return F.cross_entropy(self.logits(model, batch), batch["labels"], label_smoothing=0.1)

    @torch.no_grad()
    def accuracy(self, model: nn.Module, split: str) -> float:
        """Share of a split's examples whose largest logit is the label's."""
        was = model.training
        model.eval()
        hits = total = 0
        for batch in self.batches(split):
            hits += int((self.logits(model, batch).argmax(-1) == batch["labels"]).sum())
            total += len(batch["labels"])
        model.train(was)
        return hits / total

    def steps(self) -> int:
        """Optimizer steps of a run."""
        return self.epochs * -(-len(self.splits["train"]) // self.batch_size)


class Supersense(TaskData):
    """examples/supersense.yaml's model and data, with its pooling and without its dropout; half of its training rows, once."""

    train_rows = 4000
    settings: ClassVar = {"TLoRA": {"order": 3}}

    def __init__(self, epochs: int = 1, batch_size: int = 32, train_rows: int | None = None):
        super().__init__("supersense", epochs, batch_size, head="classifier")
        config = load_config(ROOT / "examples" / "supersense.yaml")
        bundle = get_task(config.task).prepare(config)
        self.pristine = bundle.model
        self.splits = dict(bundle.splits)
        self.splits["train"] = self.splits["train"][: train_rows or self.train_rows]
        self.collate = bundle.collate

    def model(self, seed: int) -> nn.Module:
        model = copy.deepcopy(self.pristine)
        torch.manual_seed(seed)
        nn.init.normal_(model.classifier.weight, std=0.02)
        return model

    def batches(self, split: str, *, seed: int | None = None, epoch: int = 0) -> Iterator[Batch]:
        rows = self.splits[split]
        lengths = [len(row["input_ids"]) for row in rows]
        if seed is None:
            order, size = sorted(range(len(rows)), key=lengths.__getitem__), 64
        else:
            sampler = EpochSampler(lengths, batch_size=self.batch_size, seed=seed, bucket=True)
            sampler.set_epoch(epoch)
            order, size = list(sampler), self.batch_size
        for start in range(0, len(order), size):
            yield self.collate([rows[i] for i in order[start : start + size]])

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(**{key: value for key, value in batch.items() if key != "labels"})["logits"].float()


class GarmentClassifier(nn.Module):
    """A ViT without pooler, mean of its patches, a linear ``classifier``."""

    def __init__(self, classes: int):
        super().__init__()
        shape = {"image_size": 28, "patch_size": 4, "num_channels": 1, "hidden_size": 128, "intermediate_size": 512}
        config = ViTConfig(num_hidden_layers=6, num_attention_heads=4, hidden_dropout_prob=0.0, **shape)
        self.vit = ViTModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(128, classes)

    def forward(self, images: Tensor) -> Tensor:
        """(n, 1, 28, 28) to (n, classes)."""
        return self.classifier(self.vit(pixel_values=images).last_hidden_state[:, 1:].mean(1))


class Fashion(TaskData):
    """Five garments from 1,000 images, on a ViT that has seen the other five classes alone."""

    held_out, tuned = (1, 5, 7, 8, 9), (0, 2, 3, 4, 6)
    train_images, validation_images = 1000, 1000
    settings: ClassVar = {
        "TLoRA": {"order": 3},
        "Consolidator": {"groups": 128},
        "S2FT": {"ratio": 0.05},
        "PromptTuning": {"init": "normal"},
    }

    def __init__(self, epochs: int = 10, batch_size: int = 32, train_rows: int | None = None):
        super().__init__("fashion", epochs, batch_size, head="classifier")
        images, labels = _fashion("train")
        keep = np.flatnonzero(np.isin(labels, self.tuned))
        keep = np.random.default_rng(0).permutation(keep)
        cut = train_rows or self.train_images
        self.splits["train"] = self._tensors(images, labels, keep[:cut])
        self.splits["validation"] = self._tensors(images, labels, keep[-self.validation_images :])
        images, labels = _fashion("t10k")
        self.splits["test"] = self._tensors(images, labels, np.flatnonzero(np.isin(labels, self.tuned)))
        self.weights, self.base = _pretrained(self.held_out)

    def _tensors(self, images: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> list[tuple[Tensor, int]]:
        return [(_normalised(images[i]), self.tuned.index(int(labels[i]))) for i in rows]

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = GarmentClassifier(len(self.tuned))
        model.vit.load_state_dict(self.weights)
        return model

    def batches(self, split: str, *, seed: int | None = None, epoch: int = 0) -> Iterator[Batch]:
        rows, size = self.splits[split], self.batch_size if seed is not None else 250
        order = torch.arange(len(rows))
        if seed is not None:
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        for part in order.split(size):
            chosen = [rows[i] for i in part.tolist()]
            images = torch.stack([image for image, _ in chosen])
            yield {"images": images, "labels": torch.tensor([label for _, label in chosen])}

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(batch["images"])


TASKS: dict[str, type[TaskData]] = {"supersense": Supersense, "fashion": Fashion}


def _normalised(image: np.ndarray) -> Tensor:
    return (torch.from_numpy(image.astype(np.float32))[None] / 255 - 0.286) / 0.353  # the data set's mean and deviation


def _fashion(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 28, 28) and labels (n,) of ``train`` or ``t10k``, from the installed package or a copy in the cache."""
    folder = _fashion_folder()
    with gzip.open(folder / f"{split}-images-idx3-ubyte.gz") as stream:
        images = np.frombuffer(stream.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(folder / f"{split}-labels-idx1-ubyte.gz") as stream:
        labels = np.frombuffer(stream.read(), np.uint8, offset=8)
    return images, labels


def _fashion_folder() -> Path:
    places = [*Path("/usr/share").glob("*fashion*"), CACHE / "debian"]
    for place in places:
        for file in place.rglob("train-images-idx3-ubyte.gz"):
            return file.parent
    CACHE.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run(["apt-get", "download", "dataset-fashion-mnist"], cwd=CACHE, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", "") or error
        raise SystemExit(
            f"Fashion-MNIST is not here and apt could not fetch it ({said}); install the Debian package dataset-fashion-mnist"
        ) from error
    (package,) = CACHE.glob("dataset-fashion-mnist_*.deb")
    subprocess.run(["dpkg", "-x", package.name, "debian"], cwd=CACHE, check=True)
    package.unlink()
    return _fashion_folder()


def _pretrained(classes: tuple[int, ...], epochs: int = 4, batch_size: int = 64) -> tuple[dict[str, Tensor], str]:
    """Weights of the ViT, pretrained to tell ``classes`` apart, and their file's hash; pretrained if the file is not there."""
    if BASE.is_file():
        return {key: value.float() for key, value in load_file(BASE).items()}, hashlib.sha256(BASE.read_bytes()).hexdigest()[:16]
    print("pretraining the ViT, once", file=sys.stderr, flush=True)
    images, labels = _fashion("train")
    rows = np.flatnonzero(np.isin(labels, classes))
    x = torch.stack([_normalised(images[i]) for i in rows])
    y = torch.tensor([classes.index(int(labels[i])) for i in rows])
    torch.manual_seed(0)
    model = GarmentClassifier(len(classes)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    total = epochs * -(-len(x) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=total)
    for epoch in range(epochs):
        for part in torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch)).split(batch_size):
            batch = _augmented(x[part], torch.Generator().manual_seed(epoch * len(x) + int(part[0])))
            loss = F.cross_entropy(model(batch), y[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}: loss of the last batch {loss.item():.4f}", file=sys.stderr, flush=True)
    draft = BASE.with_suffix(f".{os.getpid()}.part")
    save_file({key: value.half().contiguous() for key, value in model.vit.state_dict().items()}, draft)
    os.replace(draft, BASE)
    return _pretrained(classes)


def _augmented(x: Tensor, rng: torch.Generator) -> Tensor:
    """Shifted by up to two pixels and mirrored, one draw a batch: five classes are easily learnt by heart."""
    down, right, mirror = torch.randint(-2, 3, (2,), generator=rng).tolist() + [int(torch.randint(2, (1,), generator=rng))]
    x = torch.roll(x, (down, right), (-2, -1))
    return x.flip(-1) if mirror else x
