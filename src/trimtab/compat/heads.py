"""The task head of a model, and whether it is fresh: transformers marks every parameter that a checkpoint filled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from trimtab.core import anatomy as anatomy_module

__all__ = ["Head", "head_of"]

#: set by transformers on the parameters that a checkpoint filled, and on those that it copied
FILLED = "_is_hf_initialized"


@dataclass(frozen=True)
class Head:
    """What stands behind a pretrained body for one task.

    Attributes:
        paths: its modules, the outermost ones.
        fresh: whether no checkpoint filled it; None: that cannot be known.
        outside: whether it stands beside a pretrained body that is known as such.
    """

    paths: tuple[str, ...]
    fresh: bool | None
    outside: bool

    @property
    def alarming(self) -> bool:
        """Whether a head that does not learn is most likely a mistake."""
        return self.fresh is True or (self.fresh is None and self.outside)

    def left_alone(self, paths: Sequence[str]) -> str:
        """What is to be said where ``paths`` of it do not learn."""
        names = ", ".join(paths)
        if self.fresh:
            return (
                f"the head {names} is fresh (no checkpoint filled it), and is neither trained nor saved with this adapter; "
                "head=True lets it learn beside the adapter, head=False leaves it to something else"
            )
        known = "stays as its checkpoint has it" if self.fresh is False else "stays as it is"
        return f"the head {names} {known}: it is neither trained nor saved with this adapter; head=True lets it learn, too"


def head_of(root: nn.Module) -> Head | None:
    """The task head of ``root``, or None where there is none (a language model's output embedding is none, unless it is fresh).

    In transformers it is what stands outside of the base model, in other nets what the anatomy calls a head.
    """
    paths = _outside(root)
    outside = paths is not None
    if paths is None:
        roles = anatomy_module.of(root).roles
        heads = [path for path, role in roles.items() if role == "head"]
        paths = [path for path in heads if not any(path.startswith(f"{other}.") for other in heads)]
    marked = any(_filled(p) for p in root.parameters())
    fresh = {path for path in paths if marked and not all(_filled(p) for p in root.get_submodule(path).parameters())}
    paths = [path for path in paths if path in fresh or not _reads_words(root, root.get_submodule(path))]
    return Head(tuple(paths), bool(fresh) if marked else None, outside) if paths else None


def _filled(p: nn.Parameter) -> bool:
    return bool(getattr(p, FILLED, False))


def _outside(root: nn.Module) -> list[str] | None:
    """Children of a transformers model that hold parameters, beside its base model; None where there is no such."""
    prefix = getattr(root, "base_model_prefix", None)
    base = root._modules.get(prefix) if isinstance(prefix, str) else None
    if base is None:
        return None
    others = {name: child for name, child in root._modules.items() if child is not None and child is not base}
    return [name for name, child in others.items() if any(True for _ in child.parameters())]


def _reads_words(root: nn.Module, head: nn.Module) -> bool:
    """Whether a head gives a number for each entry of an embedding: a language model's."""
    entries = {module.num_embeddings for module in root.modules() if isinstance(module, nn.Embedding)}
    return any(getattr(module, "out_features", None) in entries for module in head.modules())
