"""Gradients of base weights on sample data, for methods that start from them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from trimtab.core.errors import Unsupported
from trimtab.core.site import Site, is_quantised

__all__ = ["site_gradients"]


def site_gradients(model: nn.Module, sites: list[Site], loss: Callable[[nn.Module], Tensor]) -> None:
    """Set ``site.gradient`` = dL/dW, shape ``(out, in)``, float32, on the CPU.

    A hook moves each gradient away as soon as it is accumulated, so that one gradient at a time stands beside the
    weights. Weights, flags and gradients of the model are as before afterwards.

    Raises:
        Unsupported: a quantised base, or a site that the loss does not depend on.
    """
    for site in sites:
        if is_quantised(site.parameter()):
            raise Unsupported(f"{site.name} is quantised; a gradient start needs the unquantised weights")
    taken: dict[int, Tensor] = {}
    flags = [(p, p.requires_grad) for p in model.parameters()]
    parameters = {id(site.parameter()): site.parameter() for site in sites}

    def take(parameter: Tensor) -> None:
        taken[id(parameter)] = parameter.grad.detach().float().cpu()
        parameter.grad = None

    hooks = []
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(id(parameter) in parameters)
        hooks = [p.register_post_accumulate_grad_hook(take) for p in parameters.values()]
        with torch.enable_grad():
            loss(model).backward()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    for site in sites:
        gradient = taken.get(id(site.parameter()))
        if gradient is None:
            raise Unsupported(f"the loss does not depend on {site.name}; a gradient start needs a loss that does")
        site.gradient = site.take(site.matrix(gradient))
