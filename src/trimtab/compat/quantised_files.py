"""Quantised weights in safetensors files: which tensors of a file make one weight together, both ways.

A codec knows one library's layout. ``parts`` finds the weights of a checkpoint and their tensors' names, ``read`` makes the
library's own parameter of them, ``write`` takes one apart again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from trimtab.compat.safetensors_file import Header
from trimtab.core.errors import CheckpointMismatch, Unsupported
from trimtab.core.reading import parse_json

__all__ = ["Codec", "codec_for"]


class Codec(Protocol):
    """One library's quantised weights in files."""

    def parts(self, files: Sequence[Header]) -> dict[str, list[str]]:
        """A weight's name -> the names of its tensors."""
        ...

    def read(self, name: str, tensor: Callable[[str], Tensor]) -> nn.Parameter:
        """The weight ``name`` as a parameter, from ``tensor(key)`` of its parts."""
        ...

    def write(self, name: str, weight: nn.Parameter) -> dict[str, Tensor]:
        """The tensors of a weight by their names in the file."""
        ...


class _Bits4:
    """bitsandbytes' 4 bits: packed bytes, scales, a table, and a small JSON as bytes; scales may be quantised again."""

    mark = ".quant_state.bitsandbytes__"

    def __init__(self) -> None:
        self._parts: dict[str, list[str]] = {}

    def parts(self, files: Sequence[Header]) -> dict[str, list[str]]:
        keys = [key for header in files for key in header.entries]
        names = [key.partition(self.mark)[0] for key in keys if self.mark in key]
        self._parts = {name: sorted(key for key in keys if key == name or key.startswith(f"{name}.")) for name in names}
        return self._parts

    def read(self, name: str, tensor: Callable[[str], Tensor]) -> nn.Parameter:
        from bitsandbytes.nn import Params4bit

        stats = {key.removeprefix(f"{name}."): tensor(key) for key in self._parts[name] if key != name}
        return Params4bit.from_prequantized(tensor(name), stats, device="cpu")

    def write(self, name: str, weight: nn.Parameter) -> dict[str, Tensor]:
        state = {f"{name}.{key}": value for key, value in weight.quant_state.as_dict(packed=True).items()}
        return {name: weight.data, **state}


class _Bits8:
    """bitsandbytes' 8 bits: a row's int8 values and its largest magnitude."""

    def parts(self, files: Sequence[Header]) -> dict[str, list[str]]:
        keys = {key for header in files for key in header.entries}
        paths = sorted(key.removesuffix(".SCB") for key in keys if key.endswith(".SCB"))
        return {
            f"{path}.weight": [k for k in (f"{path}.weight", f"{path}.SCB", f"{path}.weight_format") if k in keys] for path in paths
        }

    def read(self, name: str, tensor: Callable[[str], Tensor]) -> nn.Parameter:
        from bitsandbytes.nn import Int8Params

        weight = Int8Params(tensor(name), requires_grad=False, has_fp16_weights=False)
        weight.SCB = tensor(name.removesuffix("weight") + "SCB")
        return weight

    def write(self, name: str, weight: nn.Parameter) -> dict[str, Tensor]:
        raise Unsupported(f'{name}: no way is known to write 8 bits of bitsandbytes again; use into="dequantised"')


class _TorchAO:
    """torchao's tensor classes, flattened: ``path._weight_<part>``, and the rest as JSON in the file's metadata."""

    def __init__(self) -> None:
        self._parts: dict[str, list[str]] = {}
        self._about: dict[str, str] = {}

    def parts(self, files: Sequence[Header]) -> dict[str, list[str]]:
        for header in files:
            for name in _note(header, "tensor_names", []):
                about = _note(header, name, {})
                if "_tensor_data_names" in about:
                    path, _, tensor = name.rpartition(".")
                    self._parts[name] = [f"{path}._{tensor}_{part}" for part in about["_tensor_data_names"]]
                    self._about[name] = header.metadata[name]
        return self._parts

    def read(self, name: str, tensor: Callable[[str], Tensor]) -> nn.Parameter:
        from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

        stored = {key: tensor(key) for key in self._parts[name]}
        made = unflatten_tensor_state_dict(stored, {name: self._about[name], "tensor_names": json.dumps([name])})
        return nn.Parameter((made[0] if isinstance(made, tuple) else made)[name], requires_grad=False)

    def write(self, name: str, weight: nn.Parameter) -> dict[str, Tensor]:
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

        tensors, about = flatten_tensor_state_dict({name: weight.data})
        if json.loads(about[name]) != json.loads(self._about[name]):
            raise Unsupported(f'{name} would be stored in another format than the base\'s; use into="dequantised"')
        return dict(tensors)


def _note(header: Header, name: Any, empty: Any) -> Any:
    """A part of a file's metadata, of the kind of ``empty``.

    Raises:
        CheckpointMismatch: it is damaged.
    """
    source = f"the metadata ({name}) of {header.file}"
    found = parse_json(header.metadata.get(name, json.dumps(empty)).encode(errors="surrogatepass"), source)
    if not isinstance(found, type(empty)) or (isinstance(found, list) and not all(isinstance(each, str) for each in found)):
        raise CheckpointMismatch(f"{source} are of another kind than torchao writes")
    return found


def codec_for(config: Mapping[str, Any], source: str) -> Codec | None:
    """The codec of a checkpoint with this ``config.json``; None if it is not quantised.

    Raises:
        Unsupported: quantised by a library whose files are not known here. CheckpointMismatch: it does not say how.
    """
    about = config.get("quantization_config")
    if not about:
        return None
    if not isinstance(about, Mapping):
        raise CheckpointMismatch(f"{source} says quantization_config={about!r}, where an object is needed")
    method = str(about.get("quant_method", "")).lower()
    if method == "bitsandbytes":
        return _Bits8() if about.get("load_in_8bit") else _Bits4()
    if method == "torchao":
        return _TorchAO()
    raise Unsupported(
        f"{source} is quantised by {method or 'an unnamed library'}, whose files trimtab does not take apart; merge into the "
        "unquantised model that it was made from, and quantise the result"
    )
