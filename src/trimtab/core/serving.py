"""Token adapters need other modules: an attention that listens, blocks that carry. Here those modules learn of them, and what the
adapters must do in this model is tried (``trimtab.core.laws``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from trimtab.core import anatomy as anatomy_module
from trimtab.core.contracts import TokenAdapter
from trimtab.core.laws import manner, try_group
from trimtab.core.mounting import serve
from trimtab.core.stacks import companions, stack_of, stacks
from trimtab.core.state import ModelState, host

if TYPE_CHECKING:
    from trimtab.core.anatomy import Anatomy

__all__ = ["serve_tokens"]


def serve_tokens(root: nn.Module, state: ModelState, name: str, adapters: Sequence[TokenAdapter]) -> None:
    """Let the modules that serve the token adapters called ``name`` know of them, and try them.

    Raises:
        Unsupported: they would not do in this model what they must.
    """
    if not adapters:
        return
    anatomy = anatomy_module.of(root)
    for adapter in adapters:
        before = adapter.site.module
        for path, duty in companions(adapter, anatomy):
            module = anatomy.modules[path]
            if duty == "carry":
                host(before).next, before = path, module
            there = serve(module, path, name, duty, adapter)
            state.hosts[path] = module
            if adapter.duty == "fresh":
                host(adapter.site.module).reaches = there.reachable
        if adapter.duty == "prompt":
            _prepare_prompt(anatomy, adapter)
    _try_others(anatomy, state, name, [adapter for adapter in adapters if adapter.duty != "prompt"])


def _prepare_prompt(anatomy: Anatomy, adapter: TokenAdapter) -> None:
    """Find how a prompt acts in its stack."""
    from trimtab.compat.bodies import rotates

    here = host(adapter.site.module)
    here.rotates = rotates(adapter.site.module)
    here.blocks = [anatomy.modules[anatomy.blocks[index]] for index in stack_of(anatomy, adapter.site).blocks]
    here.width, here.asked = adapter.site.in_features, type(adapter.config).__name__
    manner(here, adapter.site.module)


def _try_others(anatomy: Anatomy, state: ModelState, name: str, adapters: Sequence[TokenAdapter]) -> None:
    """Try what stands at blocks and attentions, stack by stack."""
    from trimtab.compat.bodies import runner

    for stack in stacks(anatomy) if adapters else ():
        paths = [anatomy.blocks[index] for index in stack.blocks]
        here = [a for a in adapters if a.site.block in stack.blocks]
        body = runner(anatomy.modules, paths[0]) if here else None
        if body is None:
            continue
        inside = tuple(f"{path}." for path in paths)
        hosts = [host(module) for path, module in state.hosts.items() if path in paths or path.startswith(inside)]
        try_group(name, type(here[0].config).__name__, hosts, body, [anatomy.modules[path] for path in paths])
