"""Parallel adapters: a bottleneck beside a module, on the same input.

``y' = y + s (Up f(Down x + a) + b)`` with ``Down`` (m, in), ``Up`` (out, m), ``x`` and ``y`` the module's input and output. ``Up``
and ``b`` start at zero, so training starts at the base. Sources: arXiv 2110.04366 Sec. 3.3 (beside the feed-forward), arXiv
2304.01933 Sec. 3 (beside linear layers, no biases, tanh). Trainable: ``m (in + out) + m + out`` a place, without biases
``m (in + out)``. Saved for backward: ``x``, shared by all that read it, and m numbers a token where ``16 m <= in``.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Generator

from trimtab.core.anatomy import Anatomy
from trimtab.core.contracts import MethodConfig, Span
from trimtab.core.registry import method
from trimtab.core.site import Site
from trimtab.methods.additive.series_adapter import Bottleneck, present, refuse_indices, require_bottleneck

__all__ = ["ParallelAdapter", "ParallelAdapterAdapter"]


@dataclass(frozen=True)
class ParallelAdapter(MethodConfig):
    """A bottleneck beside the feed-forward, on the same input; of the bottlenecks the strongest for its size.

    Not where the model must stay as fast as its base: it cannot be merged unless ``act`` is none.

    Args:
        bottleneck: m, the width in the middle.
        act: activation in the middle: none, relu, gelu, gelu_tanh, silu or tanh. With none it is linear and merges beside a Linear.
        scale: factor of the adapter's output (4 in the paper's scaled form), or ``"learned"``: one number, starting at 1.
        dropout: probability of zeroing an entry of the adapter's input while training.
        bias: whether both layers have biases.
        init: ``"zero"`` (Up zero, starts at the base), ``"bert"`` (both N(0, 0.02)) or ``"houlsby"`` (both N(0, 0.01), cut off).
        placement: beside the ``"mlp"``, the ``"attn"`` or ``"both"``; ``"llm"``: beside the linear layers into and out of the
            feed-forward, as in LLM-Adapters.
    """

    search = {"bottleneck": (16, 32, 64, 128, 256, 512), "placement": ("both", "mlp"), "scale": (0.1, 1.0, 4.0)}
    learning_rate = Span(5e-5, 5e-3, log=True)

    bottleneck: int = 64
    act: str = "relu"
    scale: float | str = 1.0
    dropout: float = 0.0
    bias: bool = True
    init: str = "zero"
    placement: str = "mlp"

    def __post_init__(self) -> None:
        require_bottleneck(self)
        self.require_choice("placement", ("mlp", "attn", "both", "llm"))


@method(
    ParallelAdapter, paper="arXiv:2110.04366 Sec. 3.3",
    tests=({"bottleneck": 3}, {"bottleneck": 2, "act": "none", "scale": 0.5}, {"bottleneck": 2, "bias": False, "scale": "learned"}),
)  # fmt: skip
class ParallelAdapterAdapter(Bottleneck):
    """The bottleneck from the place's input to its output."""

    targets = "mlp"

    def __init__(self, config: ParallelAdapter, site: Site, *, rng: Generator):
        super().__init__(config, site)
        self.act = config.act
        self.start(site.in_features, site.out_features, bias=config.bias, init=config.init, rng=rng)

    @classmethod
    def places(cls, config: ParallelAdapter, anatomy: Anatomy) -> str:
        if config.placement == "llm":
            return present(anatomy, "mlp.up", "mlp.gate_up", "mlp.down")
        return "attn | mlp" if config.placement == "both" else config.placement

    @classmethod
    def check(cls, config: ParallelAdapter, site: Site) -> None:
        refuse_indices(config, site)

    @classmethod
    def merges(cls, config: ParallelAdapter, site: Site) -> bool:
        return config.act == "none"

    @classmethod
    def identity(cls, config: ParallelAdapter) -> bool:
        return config.init == "zero"
