"""Quantised base weights: torchao's tensors and bitsandbytes' parameters, recognised without importing either."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.errors import Unsupported
from trimtab.core.merging import REQUANTISERS
from trimtab.core.site import register_storage

__all__: list[str] = []


def _is(package: str, *names: str) -> Callable[[Tensor], bool]:
    def test(tensor: Tensor) -> bool:
        cls = type(tensor)
        return cls.__module__.startswith(package) and (not names or cls.__name__ in names)

    return test


def _torchao_dense(tensor: Any, module: nn.Module) -> Tensor:
    return tensor.dequantize()


def _torchao_again(weight: Tensor, old: Any) -> nn.Parameter:
    """Quantise ``weight`` (out, in) in the format of ``old``."""
    cls = type(old)
    if cls.__name__ == "Int8Tensor":
        from torchao.quantization.granularity import PerRow

        if list(old.block_size) != [1, old.shape[-1]]:
            raise Unsupported(
                f'an Int8Tensor of blocks {list(old.block_size)} cannot be requantised; use into="dequantised"'
            )
        new = cls.from_hp(weight, PerRow())
    elif cls.__name__ == "IntxUnpackedToInt8Tensor":
        new = cls.from_hp(weight, tuple(old.block_size), old.target_dtype)
    else:
        raise Unsupported(f'a {cls.__name__} cannot be requantised; use into="dequantised"')
    return nn.Parameter(new, requires_grad=False)


def _nf4_dense(tensor: Any, module: nn.Module) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(tensor.data, tensor.quant_state)


def _nf4_again(weight: Tensor, old: Any) -> nn.Parameter:
    new = type(old)(
        weight,
        requires_grad=False,
        quant_type=old.quant_type,
        blocksize=old.blocksize,
        compress_statistics=old.compress_statistics,
    )
    return new.to(old.device)


def _int8_dense(tensor: Any, module: nn.Module) -> Tensor:
    """bitsandbytes int8: row scales are on the parameter until the first forward moves them to the module's state."""
    scales = tensor.SCB if tensor.SCB is not None else module.state.SCB
    return tensor.data.to(torch.float32) * (scales / 127)[:, None]


register_storage(_is("torchao"), _torchao_dense)
register_storage(_is("bitsandbytes", "Params4bit"), _nf4_dense)
register_storage(_is("bitsandbytes", "Int8Params"), _int8_dense)
REQUANTISERS.append((_is("torchao"), _torchao_again))
REQUANTISERS.append((_is("bitsandbytes", "Params4bit"), _nf4_again))
