"""A sample of the base's weights, so that an adapter is not put on another base by mistake.

Sizes alone do not tell two checkpoints of one architecture apart. The sample holds up to ``SAMPLES`` evenly spaced values
of up to ``TENSORS`` of the adapted tensors. It is compared by direction, not by bits, so that the same base in bf16, fp16 or
8 bits passes while another base does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.errors import CheckpointMismatch
from trimtab.core.site import Site, dense, gathered

__all__ = ["compare", "take"]

TENSORS = 32
SAMPLES = 32
MIN_COSINE = 0.95  # int4 weights keep about 0.99, two random bases have about 0


def take(root: nn.Module, sites: list[Site], *, value: Callable[[Site], Tensor | None] | None = None) -> dict[str, Any]:
    """The base's class, and ``{path.tensor: values}`` for evenly chosen sites.

    Args:
        value: a site's tensor as it is stored, for a base whose values are elsewhere; None: the module's, before any merge.
    """
    keys = list({(s.path, s.tensor): s for s in sites if s.tensor}.values())
    step = max(1, len(keys) // TENSORS)
    samples = {}
    for site in keys[::step][:TENSORS]:
        stored = _original(root, site) if value is None else value(site)
        if stored is not None and not stored.is_meta:
            samples[f"{site.path}.{site.tensor}"] = [round(v, 8) for v in _sample(stored, site.module).tolist()]
    return {"class": type(root).__name__, "samples": samples}


def _original(root: nn.Module, site: Site) -> Tensor:
    """The base tensor as it was before any merge."""
    for saved in root.__dict__["_trimtab_state"].originals.values():
        for module, tensor, value, _ in saved:
            if module is site.module and tensor == site.tensor:
                return value
    return site.parameter()


def _sample(stored: Tensor, module: nn.Module) -> Tensor:
    flat = gathered(dense(stored, module).detach()).reshape(-1)
    where = torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel()), device=flat.device).long()
    return flat[where].double().cpu()


def compare(
    root: nn.Module,
    stored: dict[str, Any],
    source: str,
    *,
    view: Callable[[str, Tensor], Tensor] = lambda key, tensor: tensor,
    value: Callable[[str, str], Tensor | None] | None = None,
) -> None:
    """Check the sample in a manifest against ``root``'s weights.

    Args:
        view: ``(path.tensor, tensor) -> tensor``: what of a weight the sample was taken of, if not all of it.
        value: ``(path, parameter) -> tensor`` for a base whose values are elsewhere, None where it has none.

    Raises:
        CheckpointMismatch: the weights are another base's.
    """
    ours, theirs = [], []
    for key, values in stored["samples"].items():
        path, _, tensor = key.rpartition(".")
        module = root.get_submodule(path)
        parameter = module._parameters[tensor] if value is None else value(path, tensor)
        if parameter is None or parameter.is_meta:
            continue
        found = _sample(view(key, parameter), module)
        if len(found) == len(values):
            ours.append(found)
            theirs.append(torch.tensor(values, dtype=torch.float64))
    if not ours:
        return
    a, b = torch.cat(ours), torch.cat(theirs)
    scale = a.norm() * b.norm()
    cosine = (a @ b / scale).item() if scale > 0 else float(torch.equal(a, b))
    if not cosine >= MIN_COSINE:
        raise CheckpointMismatch(
            f"{source} was made for another base: a sample of the adapted weights agrees with this model's to a cosine of "
            f"{cosine:.2f} only ({stored['class']} then, {type(root).__name__} now); load the base it was trained on, or pass "
            "check_base=False if the weights were changed on purpose"
        )
