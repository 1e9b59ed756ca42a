"""What a training step would need, before any weight is read: the model is built and run on the meta device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import trimtab as tt
from trimtab.core.account import LiveBytes, count_flops, saved_bytes, stored_bytes
from trimtab.core.errors import Unsupported, nearest
from trimtab.core.table import Table

__all__ = ["OPTIMIZERS", "Plan", "plan"]

#: bytes of optimizer state a trainable float32 parameter
OPTIMIZERS = {"adamw": 8, "sgd": 0, "momentum": 4, "lion": 4}


@dataclass(frozen=True)
class Plan:
    """Predicted needs of one training step.

    Attributes:
        trainable, base: numbers of parameters.
        adapter_bytes, gradient_bytes, optimizer_bytes: of the trainable parameters.
        weight_bytes: of the base.
        activation_bytes: what autograd keeps for backward.
        peak_bytes: most bytes of tensors alive at once during the step, the activations among them.
        flops, floor_flops: of the step, and of the frozen model's forward and backward to its activations.
        memory: what there is, in bytes, or None.
        places: the table of ``tt.attach``.
    """

    trainable: int
    base: int
    adapter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    weight_bytes: int
    activation_bytes: int
    peak_bytes: int
    flops: int
    floor_flops: int
    memory: int | None
    places: Table

    @property
    def total_bytes(self) -> int:
        """Weights, adapter, optimizer state, and the step's peak (which holds activations and gradients)."""
        return self.weight_bytes + self.adapter_bytes + self.optimizer_bytes + self.peak_bytes

    @property
    def fits(self) -> bool | None:
        """Whether the total is within ``memory``; None if no memory was given."""
        return None if self.memory is None else self.total_bytes <= self.memory

    def table(self) -> Table:
        """The figures as they are printed."""
        table = Table(("what", "value", "note"))
        table.add("trainable parameters", f"{self.trainable:,}", f"{100 * self.trainable / self.base:.3f} % of {self.base:,}")
        for name in ("weight", "adapter", "gradient", "optimizer", "activation", "peak"):
            table.add(f"{name} bytes", _size(getattr(self, f"{name}_bytes")), _NOTES[name])
        table.add("total bytes", _size(self.total_bytes), "weights + adapter + optimizer + peak")
        table.add("FLOPs of a step", f"{self.flops:.3e}", f"{self.flops / self.floor_flops:.3f} x the frozen model's floor")
        if self.memory is not None:
            table.add("fits", "yes" if self.fits else "no", f"into {_size(self.memory)}")
        return table

    def __str__(self) -> str:
        return str(self.table())


_NOTES = {
    "weight": "the frozen base",
    "adapter": "its parameters, as stored",
    "gradient": "one a trainable parameter",
    "optimizer": "its state",
    "activation": "kept for backward",
    "peak": "most alive at once in a step, activations and gradients included",
}


def plan(
    model: str | nn.Module,
    method: tt.MethodConfig,
    *,
    batch: int = 8,
    length: int = 128,
    targets: Any = None,
    layers: Any = None,
    dtype: torch.dtype = torch.float32,
    optimizer: str = "adamw",
    memory: int | None = None,
    checkpointing: bool = False,
) -> Plan:
    """Predict the needs of one training step of ``method`` on ``model`` for a batch of ``batch`` x ``length`` tokens (or images).

    Args:
        model: an id or folder that transformers knows (its config alone is read), or a module, which is left as it is.
        dtype: of the base's weights.
        optimizer: one of ``OPTIMIZERS``.
        memory: bytes that there are.
        checkpointing: gradient checkpointing of transformers' blocks.

    Raises:
        Unsupported: the model cannot run on the meta device. NoMatch, ShapeMismatch: as ``tt.attach``.
    """
    if optimizer not in OPTIMIZERS:
        raise Unsupported(f"unknown optimizer {optimizer!r}{nearest(optimizer, OPTIMIZERS)}")
    base = _on_meta(model, dtype)
    inputs = _inputs(base, batch, length)
    floor = _floor(base, inputs)
    weights = sum(stored_bytes(p) for p in base.parameters())
    count = sum(p.numel() for p in base.parameters())
    places = tt.attach(base, method, targets=targets, layers=layers, head=False, check_gradients=False)
    if checkpointing:
        # the meta device has no random state to preserve
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False, "preserve_rng_state": False})
    trainable = tt.parameters(base)
    own = sum(p.numel() * p.element_size() for p in trainable)
    numbers = sum(p.numel() for p in trainable)
    base.train()
    with _on_meta_device():
        activations = _alive(base, inputs) if checkpointing else _saved(base, inputs)
        with LiveBytes() as live, count_flops() as counter:
            _loss(base, inputs).backward()
    return Plan(
        trainable=numbers, base=count, adapter_bytes=own, gradient_bytes=own, optimizer_bytes=OPTIMIZERS[optimizer] * numbers,
        weight_bytes=weights, activation_bytes=activations, peak_bytes=live.peak, flops=counter.get_total_flops(),
        floor_flops=floor, memory=memory, places=places,
    )  # fmt: skip


def _saved(model: nn.Module, inputs: dict[str, Tensor]) -> int:
    """Bytes that autograd keeps after the forward."""
    with saved_bytes(model) as saved:
        _loss(model, inputs)
    return saved.total


def _alive(model: nn.Module, inputs: dict[str, Tensor]) -> int:
    """Bytes alive after the forward; checkpoints are held past the hooks that ``saved_bytes`` counts by."""
    with LiveBytes() as live:
        loss = _loss(model, inputs)
        loss.detach()  # one more operation, so that what the last one freed is noticed
    return live.level


def _on_meta(model: str | nn.Module, dtype: torch.dtype) -> nn.Module:
    if isinstance(model, nn.Module):
        return copy.deepcopy(model).to("meta")
    import transformers

    from trimtab.compat.sketch_folder import is_sketch, shapes_of_sketch
    from trimtab.training.models import load_pretrained, resolve

    config = load_pretrained(transformers.AutoConfig.from_pretrained, model)
    name = (config.architectures or ["AutoModel"])[0]
    cls = getattr(transformers, name, transformers.AutoModel)
    with torch.device("meta"):
        built = cls.from_config(config, trust_remote_code=False) if hasattr(cls, "from_config") else cls(config)
    built.to(dtype)
    folder = resolve(model)
    return shapes_of_sketch(built, folder, dtype) if is_sketch(folder) else built


def _inputs(model: nn.Module, batch: int, length: int) -> dict[str, Tensor]:
    """A batch for the model's main input: token ids, or images at the size in its config."""
    config = getattr(model, "config", None)
    main = getattr(model, "main_input_name", "input_ids")
    if main == "pixel_values":
        size = config.image_size if isinstance(config.image_size, (tuple, list)) else (config.image_size,) * 2
        return {main: torch.empty(batch, getattr(config, "num_channels", 3), *size, device="meta", dtype=model.dtype)}
    if main != "input_ids":
        raise Unsupported(f"a plan runs on token ids or images; {type(model).__name__} takes {main}")
    ids = torch.zeros(batch, length, dtype=torch.long, device="meta")
    inputs = {"input_ids": ids}
    if type(model).__name__.endswith("ForCausalLM"):
        inputs["labels"] = ids
    return inputs


def _loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The model's own loss where it has one for these inputs, else the mean of its first output."""
    try:
        out = model(**inputs)
    except (NotImplementedError, RuntimeError) as error:
        raise Unsupported(
            f"{type(model).__name__} cannot run on the meta device ({error}); plan a smaller copy of it instead"
        ) from error
    loss = getattr(out, "loss", None)
    first = out if isinstance(out, Tensor) else out[0]
    return first.float().mean() if loss is None else loss


def _floor(model: nn.Module, inputs: dict[str, Tensor]) -> int:
    """FLOPs of the frozen model's forward and backward to the activations."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(False)
    # what comes first makes activations: let its output need a gradient
    first = next(m for m in model.modules() if isinstance(m, (nn.Embedding, nn.modules.conv._ConvNd, nn.Linear)))
    hook = first.register_forward_hook(lambda module, args, y: y.requires_grad_(True))
    try:
        with _on_meta_device(), count_flops() as counter:
            _loss(model, inputs).backward()
    finally:
        hook.remove()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    return counter.get_total_flops()


class _FullBatch(TorchFunctionMode):
    """Answers questions about a meta tensor's values ("is this batch unpadded, unpacked?") with yes: a full batch is planned."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.__bool__, Tensor.item) and args[0].is_meta and args[0].dtype == torch.bool:
            return True
        return func(*args, **(kwargs or {}))


@contextmanager
def _on_meta_device() -> Iterator[None]:
    """What a run on the meta device needs: a full batch, and fused attention.

    torch expands attention into a product of all pairs of tokens there. A function mode cannot replace it everywhere, since
    modes are off while a checkpointed block runs again in backward; so the function is exchanged while the plan runs.
    """
    original = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda *args, **kwargs: _attention(original, *args, **kwargs)
    try:
        with _FullBatch():
            yield
    finally:
        F.scaled_dot_product_attention = original


def _attention(
    original: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    if dropout_p or not query.is_meta:  # torch's CPU path expands attention that drops out, too
        return original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]


def _size(count: int) -> str:
    """Bytes with a binary unit."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            return f"{value:,.0f} {unit}" if unit == "B" else f"{value:,.2f} {unit}"
        value /= 1024
    raise AssertionError
