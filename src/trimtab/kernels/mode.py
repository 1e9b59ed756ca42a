"""When a custom autograd Function may run, in which dtype it computes, and what of its input it keeps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

__all__ = ["compute_dtype", "fused", "given", "if_learnt"]

_PLAIN = (Tensor, nn.Parameter)


def fused(*tensors: Tensor | None) -> bool:
    """Whether a hand-written Function is right here; otherwise a kernel runs its plain composition of torch operations.

    The plain form serves ``torch.compile`` (which fuses by itself), the function transforms (vmap, grad, jvp: a Function
    would need a rule for each), forward-mode derivatives, and tensor subclasses (DTensor, FakeTensor).
    """
    return (
        not torch.compiler.is_compiling()
        and torch._C._functorch.maybe_current_level() is None
        and forward_ad._current_level < 0
        and all(tensor is None or type(tensor) in _PLAIN for tensor in tensors)
    )


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a matrix product of ``x`` runs: autocast's if it is on (float64 is exempt from it), else ``x``'s."""
    kind = x.device.type
    if x.dtype != torch.float64 and kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def given(y: Tensor, *shape: int) -> Tensor:
    """``y``, made in a custom Function, in the shape in which the Function gives it out.

    No view: autograd refuses to let anybody write to a view that was made inside a custom Function, and a model may write to what
    a layer gave it (``x.mul_``, ``nn.ReLU(inplace=True)``).
    """
    return torch.ops.aten._unsafe_view(y, shape)


def if_learnt(x: Tensor, needs: Sequence[bool]) -> Tensor:
    """What a function keeps of an input that only its parameters' gradients read: ``x``, or if none of them learns a stand-in.

    The stand-in has shape, dtype and device of ``x``, and no storage to speak of; its values are zeros.
    """
    return x if any(needs) else x.new_zeros(1).expand(x.shape)
