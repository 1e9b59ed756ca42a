"""Reader and writer of huggingface/peft's adapter folders (``adapter_config.json`` and its tensors), without peft.

``tt.load(model, folder)`` recognises such a folder; ``tt.save(model, folder, format="peft")`` writes one. Reading is strict:
every tensor is used, none is missing, every config field is known to be harmless or is honoured. Writing takes peft's own
form of the method where there is one (``peft_twins.py``), else an exact LoRA of the update's factors (PiSSA, OLoRA, LoRA-GA:
rank 2r on the untouched base; rows of a fused projection; ranks by place where peft has one rank), else it refuses.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from trimtab.compat.peft_base import check_base as check_its_base
from trimtab.compat.peft_files import CONFIG, TENSORS, factor_places, others_config, read_config, read_tensors
from trimtab.compat.peft_prompts import PROMPTS, read_prompts
from trimtab.compat.peft_read import Reader
from trimtab.compat.peft_write import write
from trimtab.core.checkpoint import FORMATS, install
from trimtab.core.contracts import Adapter
from trimtab.core.errors import Unsupported
from trimtab.core.folders import steady

__all__ = ["PeftFolder"]


class PeftFolder:
    """The format ``"peft"`` of ``tt.save`` and ``tt.load``."""

    @staticmethod
    def test(folder: Path) -> bool:
        """Whether ``folder`` holds a peft adapter, whole or damaged; two other libraries use the config's name too."""
        return (folder / CONFIG).is_file() and not others_config(folder)

    @staticmethod
    def load(
        root: nn.Module, folder: Path, *, name: str | None, trainable: bool, active: bool | None, check_base: bool = True
    ) -> str:
        """Attach the adapter in ``folder`` under ``name`` (None: ``"default"``).

        Raises:
            CheckpointMismatch: damaged files, missing or unused tensors. ShapeMismatch: another base, or another rank than
            the config's. NoMatch: modules that this model lacks. Unsupported: what trimtab has no exact form for.
        """
        _, adapters, values = PeftFolder.read(root, folder, trainable=trainable)
        if check_base:
            check_its_base(root, folder, adapters)
        return install(
            root, adapters, values, name=name or "default", trainable=trainable, active=active, source=str(folder)
        )

    @staticmethod
    def read(root: nn.Module, folder: Path, *, trainable: bool = False) -> tuple[str, list[Adapter], dict[str, Tensor]]:
        """Name, adapters with shapes only, and their tensors, of one and the same save; raises as ``load`` does."""
        files = [folder, folder / CONFIG, folder / TENSORS]
        return steady(files, lambda: PeftFolder._read(root, folder, trainable))

    @staticmethod
    def _read(root: nn.Module, folder: Path, trainable: bool) -> tuple[str, list[Adapter], dict[str, Tensor]]:
        config = read_config(folder)
        if config["peft_type"] in PROMPTS:
            return "default", *read_prompts(root, folder, config)
        return "default", *Reader(root, folder, config, trainable).read()

    @staticmethod
    def inspect(folder: Path) -> dict[str, Any]:
        """Not possible: it has no manifest."""
        raise Unsupported(f"{folder} is peft's, which is read here and not inspected; trimtab convert makes an adapter of it")

    @staticmethod
    def places(folder: Path) -> list[dict[str, Any]]:
        """What low-rank factors tell of their places.

        Raises:
            Unsupported: another kind of tensor is there, whose layer the file does not tell.
        """
        return factor_places(folder, read_tensors(folder))

    @staticmethod
    def save(root: nn.Module, path: Path, name: str, *, base_name: str | None = None) -> Path:
        """Write the adapter ``name`` to the folder ``path``.

        Args:
            base_name: the base's folder or Hub id, for the config; None: the name that the model itself has.

        Raises:
            Unsupported: no form of it that peft reads computes the same.
        """
        return write(root, path, name, base_name)


FORMATS["peft"] = PeftFolder()
