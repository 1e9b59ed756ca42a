"""Gradients of base weights on sample data, for methods that start from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from trimtab.core.errors import Unsupported
from trimtab.core.site import Site, is_quantised

__all__ = ["site_gradients"]


def site_gradients(
    model: nn.Module, sites: list[Site], loss: Callable[[nn.Module], Tensor | Iterable[Tensor]], powers: list[int] | None = None
) -> None:
    """Set ``site.gradient``: the sum over batches of ``(dL/dW) ** power``, shape ``(out, in)``, float32, on the CPU.

    A hook moves each gradient away as soon as it is accumulated, so that one gradient at a time stands beside the
    weights. Weights, flags and gradients of the model are as before afterwards.

    Args:
        loss: gives a scalar, or yields scalars, one a batch; each graph is gone before the next batch is asked for.
        powers: 1 or 2 for every site; None: 1.

    Raises:
        Unsupported: a quantised base, a site that the loss does not depend on, or a gradient that is not finite.
    """
    wanted = list(zip(sites, powers or [1] * len(sites), strict=True))
    for site in sites:
        if is_quantised(site.parameter()):
            raise Unsupported(f"{site.name} is quantised; a gradient start needs the unquantised weights")
    sums = _collect(model, {(site.parameter(), power) for site, power in wanted}, loss)
    for site, power in wanted:
        gradient = sums.get((site.parameter(), power))
        if gradient is None:
            raise Unsupported(f"the loss does not depend on {site.name}; a gradient start needs a loss that does")
        if not bool(torch.isfinite(gradient).all()):
            raise Unsupported(f"the loss gives {site.name} a gradient with NaN or infinite values; use other sample data")
        site.gradient = site.take(site.matrix(gradient))


def _collect(
    model: nn.Module, wanted: set[tuple[Tensor, int]], loss: Callable[[nn.Module], Tensor | Iterable[Tensor]]
) -> dict[tuple[Tensor, int], Tensor]:
    """Sums of the wanted powers of the parameters' gradients; what the loss does not reach is not in it."""
    sums: dict[tuple[Tensor, int], Tensor] = {}
    flags = [(p, p.requires_grad) for p in model.parameters()]
    learning = {parameter for parameter, _ in wanted}

    def take(parameter: Tensor) -> None:
        gradient = parameter.grad.detach().float().cpu()
        parameter.grad = None
        for power in (2, 1):
            key = parameter, power
            if key in wanted:
                term = gradient.square() if power == 2 else gradient
                sums[key] = sums[key].add_(term) if key in sums else term

    hooks = []
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(parameter in learning)
        hooks = [p.register_post_accumulate_grad_hook(take) for p in learning]
        with torch.enable_grad():
            losses = loss(model)
            for batch in (losses,) if isinstance(losses, Tensor) else losses:
                if batch.requires_grad:  # else it reaches no site
                    batch.backward()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    return sums
