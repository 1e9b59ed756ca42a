"""What the factors of one place of a diffusion model's adapter compute, as adapters of this library.

``lora_down``, ``lora_up`` and ``lora_mid``, with ``dora_scale`` DoRA; ``hada_*`` LoHa; ``lokr_*`` LoKr; ``diff`` and ``w_norm``
what is added to a weight, ``diff_b`` and ``b_norm`` to a bias. The scale is ``alpha / rank``, also of files trained with LyCORIS'
``rs_lora``: what it writes as alpha has held the root since July 2024, and its own loader divides by the rank whatever the notes
say. ``scalar`` multiplies the update. Facts: KohakuBlueleaf/LyCORIS lycoris/modules, kohya-ss/sd-scripts networks/lora.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.compat.peft_twins import tucker
from trimtab.core.contracts import MethodConfig
from trimtab.core.errors import ShapeMismatch, Unsupported
from trimtab.core.registry import get
from trimtab.core.site import Site, dense
from trimtab.kernels.divisors import factorization

__all__ = ["Part", "Tensors", "missing_of", "parts_of", "rows_of"]

Tensors = dict[str, Tensor]
_COLUMNS = ("lora_down.weight", "lora_mid.weight", "alpha", "scalar", "hada_w1_b", "hada_w2_b")
_ROWS = (
    "lora_up.weight", "lora_magnitude", "dora_scale", "hada_w1_a", "hada_w2_a", "diff", "diff_b", "w_norm", "b_norm",
)  # fmt: skip
_ADDED = {"weight": ("diff", "w_norm"), "bias": ("diff_b", "b_norm")}


class Part(NamedTuple):
    """An adapter of one parameter: which one, its config, our tensors, and the factors of the file that it uses up."""

    tensor: str
    config: MethodConfig
    ours: Tensors
    used: list[str]


def _prefixes(tensors: Tensors) -> list[str]:
    return [prefix for prefix in ("lora_", "hada_", "lokr_") if any(key.startswith(prefix) for key in tensors)]


def missing_of(tensors: Tensors) -> list[str]:
    """Factors that lack beside those that are there."""
    needed = {
        "lora_": ["lora_down.weight", "lora_up.weight"],
        "hada_": ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"],
        "lokr_": [k for w in ("lokr_w1", "lokr_w2") for k in ([w] if w in tensors else [f"{w}_a", f"{w}_b"])],
    }
    return [name for prefix in _prefixes(tensors) for name in needed[prefix] if name not in tensors]


def rows_of(tensors: Tensors, first: int, last: int, total: int) -> Tensors:
    """The factors of some rows of the matrix that they are factors of, which has ``total`` rows.

    Raises:
        Unsupported: factors that have no rows of their own. ShapeMismatch: another number of rows.
    """
    cut = {}
    for key, value in tensors.items():
        if key in _COLUMNS:
            cut[key] = value
        elif key in _ROWS:
            if not value.dim() or value.shape[0] != total:
                raise ShapeMismatch(f"{key} is {tuple(value.shape)}, and the modules that share its rows have {total}")
            cut[key] = value[first:last]
        else:
            raise Unsupported(f"{key} is of one matrix that is several modules in this model, and it cannot be cut into their rows")
    return cut


def parts_of(tensors: Tensors, site: Site, scale: float | None = None) -> list[Part]:
    """The adapters that a place's factors make; factors that none of them uses are left over.

    Args:
        site: of the module's weight.
        scale: in front of a LoRA whose factors have no alpha; None: 1.

    Raises:
        Unsupported, ShapeMismatch: what no method here computes, or factors that do not fit each other.
    """
    parts = []
    kinds = _prefixes(tensors)
    added = [key for key in _ADDED["weight"] if key in tensors]
    if len(kinds) + len(added) > 1:
        raise Unsupported(f"{' and '.join([*kinds, *added])} change one weight together; merge them where they were made")
    for tensor, names in _ADDED.items():
        for key in names:
            if key in tensors:
                parts.append(_added(tensors, key, tensor, site))
    if kinds:
        tensors = {key: value for key, value in tensors.items() if key not in sum(_ADDED.values(), ())}
        make = {"lora_": _lora, "hada_": _loha, "lokr_": _lokr}[kinds[0]]
        parts.append(make(_scaled(tensors, kinds[0]), site, scale))
    return parts


def _added(tensors: Tensors, key: str, tensor: str, site: Site) -> Part:
    """``W + diff`` as a value of its own, beside the base."""
    base = site.module._parameters.get(tensor)
    if base is None:
        raise Unsupported(f"{key} is for the {tensor} of a {type(site.module).__name__}, which has none in this model")
    diff, whole = tensors[key], dense(base, site.module).detach()
    if diff.squeeze().shape != whole.squeeze().shape:
        raise ShapeMismatch(f"{key} is {tuple(diff.shape)}, the {tensor} of this model {tuple(whole.shape)}")
    total = whole.float() + diff.reshape(whole.shape).to(whole.device)
    return Part(tensor, get("Unfreeze")(), {"value": total.flatten(1) if total.dim() > 2 else total}, [key])


def _scaled(tensors: Tensors, prefix: str) -> Tensors:
    """The factors with ``scalar`` multiplied into one of them."""
    if "scalar" not in tensors:
        return tensors
    first = {"lora_": ("lora_up.weight",), "hada_": ("hada_w1_a",), "lokr_": ("lokr_w1", "lokr_w1_a")}[prefix]
    key = next(key for key in first if key in tensors)
    return tensors | {key: tensors[key] * _number(tensors, "scalar")}


def _number(tensors: Tensors, key: str) -> float:
    if tensors[key].numel() != 1:
        raise ShapeMismatch(f"{key} is {tuple(tensors[key].shape)}, and one number is needed")
    return float(tensors[key])


def _alpha(tensors: Tensors, rank: int, scale: float | None = None) -> float:
    """The numerator over ``rank`` that gives the file's scale; an alpha of 0 is a scale of 1, as is none."""
    alpha = _number(tensors, "alpha") if "alpha" in tensors else 0.0
    return alpha or rank * (1.0 if scale is None else scale)


def _matrix(tensors: Tensors, key: str, axes: int = 2) -> Tensor:
    if tensors[key].dim() < axes or not tensors[key].numel():
        raise ShapeMismatch(f"{key} is {tuple(tensors[key].shape)}, which is no factor")
    return tensors[key]


def _lora(tensors: Tensors, site: Site, scale: float | None) -> Part:
    down, up, middle = _matrix(tensors, "lora_down.weight"), _matrix(tensors, "lora_up.weight"), tensors.get("lora_mid.weight")
    rank = up.shape[1]
    if middle is not None:  # (r, r, k...) between (r, in) and (out, r)
        if middle.dim() < 2 or middle.shape[:2] != (rank, down.shape[0]):
            raise ShapeMismatch(f"lora_mid.weight is {tuple(middle.shape)} between factors of rank {rank}")
        down = torch.einsum("mn...,ni->mi...", middle, down.flatten(1))
    if down.shape[0] != rank:
        raise ShapeMismatch(f"lora_down.weight is {tuple(down.shape)} and lora_up.weight {tuple(up.shape)}: their ranks differ")
    names = ("lora_down.weight", "lora_up.weight", "lora_mid.weight", "lora_magnitude", "alpha", "dora_scale", "scalar")
    used = [key for key in names if key in tensors]
    ours = {"a": down.flatten(1), "b": up.flatten(1)}
    alpha = _alpha(tensors, rank, scale)
    if "dora_scale" not in tensors and "lora_magnitude" not in tensors:
        return Part("weight", get("LoRA")(rank=rank, alpha=alpha), ours, used)
    return Part("weight", get("DoRA")(rank=rank, alpha=alpha), ours | {"m": _row_norms(tensors, site)}, used)


def _row_norms(tensors: Tensors, site: Site) -> Tensor:
    """The magnitudes of a decomposed weight, (out,): ``dora_scale`` (out, 1...) of LyCORIS, or peft's, which has any shape.

    Raises:
        Unsupported: they are of the inputs, as LyCORIS has them by an option. ShapeMismatch: another number of them.
    """
    out = site.shape[0]
    if "lora_magnitude" in tensors:  # always of the outputs; (1, out, 1...) on a convolution
        if tensors["lora_magnitude"].numel() != out:
            raise ShapeMismatch(f"the magnitudes are {tuple(tensors['lora_magnitude'].shape)}, and there are {out} outputs")
        return tensors["lora_magnitude"].flatten()
    scale = tensors["dora_scale"]
    if scale.numel() != out or scale.dim() == 0 or scale.shape[0] != out:
        raise Unsupported(
            f"dora_scale of shape {tuple(scale.shape)} scales inputs, and DoRA scales the {out} outputs; merge it where it was made"
        )
    return scale.flatten()


def _refuse_dora(tensors: Tensors, kind: str) -> None:
    if "dora_scale" in tensors:
        raise Unsupported(f"a {kind} whose rows are rescaled (dora_scale) has no form here; merge it where it was made")


def _loha(tensors: Tensors, site: Site, scale: float | None) -> Part:
    _refuse_dora(tensors, "LoHa")
    used = [k for k in tensors if k.startswith("hada_") or k in ("alpha", "scalar")]
    stored = {key: _matrix(tensors, key) for key in used if key.startswith("hada_")}
    for i in "12":
        if f"hada_t{i}" in stored:
            _tucker(stored, f"hada_t{i}", f"hada_w{i}_a", f"hada_w{i}_b")
    rank = stored["hada_w1_b"].shape[0]
    ours = {f"w{i}{x}": stored[f"hada_w{i}_{x}"].flatten(1) for i in "12" for x in "ab"}
    return Part("weight", get("LoHa")(rank=rank, alpha=_alpha(tensors, rank)), ours, used)


def _tucker(stored: Tensors, t: str, a: str, b: str) -> None:
    core = stored[t]
    if core.shape[:2] != (stored[a].shape[0], stored[b].shape[0]):
        raise ShapeMismatch(f"{t} is {tuple(core.shape)} between {a} {tuple(stored[a].shape)} and {b} {tuple(stored[b].shape)}")
    tucker(stored, t, a, b)


def _lokr(tensors: Tensors, site: Site, scale: float | None) -> Part:
    """Sizes are read off the factors: LyCORIS puts the smaller part of a width first, wherever its factor stands."""
    _refuse_dora(tensors, "LoKr")
    used = [k for k in tensors if k.startswith("lokr_") or k in ("alpha", "scalar")]
    stored = {key: _matrix(tensors, key) for key in used if key.startswith("lokr_")}
    if "lokr_t2" in stored:
        _tucker(stored, "lokr_t2", "lokr_w2_a", "lokr_w2_b")
    thin1, thin2 = "lokr_w1" not in stored, "lokr_w2" not in stored
    left = stored["lokr_w1_a" if thin1 else "lokr_w1"].shape
    right = stored["lokr_w2_a" if thin2 else "lokr_w2"].shape
    rank = right[1] if thin2 else left[1] if thin1 else max(right[0], site.shape[1] // stored["lokr_w1"].shape[1])
    # two full factors have a scale of 1, whatever alpha says
    alpha = _alpha(tensors, rank) if thin1 or thin2 else float(rank)
    ours = {k.removeprefix("lokr_").replace("_", ""): v.flatten(1) for k, v in stored.items() if k.startswith("lokr_w")}
    return Part("weight", get("LoKr")(rank=rank, alpha=alpha, factor=_factor(site, ours), decompose_both=thin1), ours, used)


def _factor(site: Site, ours: Tensors) -> int:
    """The size for which our LoKr cuts the layer as the file does, if there is one; the factors say it in any case."""
    out1, in1 = (ours["w1"] if "w1" in ours else ours["w1a"]).shape[0], (ours["w1"] if "w1" in ours else ours["w1b"]).shape[1]
    channels = site.parameter().shape[1] if site.kind in ("conv", "grouped") else site.shape[1]
    fits = (f for f in (-1, out1, in1) if factorization(site.shape[0], f)[0] == out1 and factorization(channels, f)[0] == in1)
    return next(fits, -1)
