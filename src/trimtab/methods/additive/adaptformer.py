"""AdaptFormer: a scaled bottleneck beside the feed-forward of a vision transformer.

``x' = x + FFN(LN(x)) + s (Up drop(relu(Down x + a)) + b)`` with ``Down`` (m, d), ``Up`` (d, m); ``Up`` and both biases start at
zero, so training starts at the base. Source: arXiv 2205.13535, Eq. 3-5. The paper's formula reads ``LN(x)``, the authors' code
the residual stream ``x`` before the norm; the default follows the code, whose numbers the paper prints. Trainable:
``2 d m + m + d`` a block. Saved for backward: ``x``, and m numbers a token where ``16 m <= d``.

The output is added to the feed-forward's: layer scale and stochastic depth of the branch, where a model has them, scale it too.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Generator

from trimtab.core.contracts import MethodConfig, Span
from trimtab.core.registry import method
from trimtab.core.site import Site
from trimtab.methods.additive.series_adapter import Bottleneck, refuse_indices, require_bottleneck

__all__ = ["AdaptFormer", "AdaptFormerAdapter"]


@dataclass(frozen=True)
class AdaptFormer(MethodConfig):
    """A scaled parallel adapter beside the feed-forward of vision transformers.

    Not for models with a tiny layer scale on the branch (1e-5 at the start), which shrinks what it adds as well.

    Args:
        bottleneck: m, the width in the middle.
        scale: factor of the adapter's output, its bias included, or ``"learned"``: one number, starting at 1.
        dropout: probability of zeroing an entry of the hidden activation while training.
        pre_norm: read the feed-forward's own input, after the block's norm, as in the paper's formula; else the residual stream
            before the norm, as in the authors' code, which needs a block with its norms in front.
        init: ``"zero"`` (Up zero); ``"wheat"``, both layers like nn.Linear, not at the base, as in arXiv 2310.01825, which
            also takes ``scale=1, dropout=0``.
    """

    search = {"bottleneck": (1, 4, 8, 16, 32, 64, 128), "scale": (0.1, 0.5, 1.0), "pre_norm": (False, True)}
    learning_rate = Span(1e-4, 1e-2, log=True)

    bottleneck: int = 64
    scale: float | str = 0.1
    dropout: float = 0.1
    pre_norm: bool = False
    init: str = "zero"

    def __post_init__(self) -> None:
        self.require_choice("init", ("zero", "wheat"))
        require_bottleneck(self)


@method(
    AdaptFormer, paper="arXiv:2205.13535 Eq. 3-5",
    tests=({"bottleneck": 3, "pre_norm": True, "dropout": 0.0}, {"bottleneck": 2, "dropout": 0.0, "init": "wheat", "scale": 1.0},
           {"bottleneck": 2, "pre_norm": True, "dropout": 0.0, "scale": "learned"}),
)  # fmt: skip
class AdaptFormerAdapter(Bottleneck):
    """The bottleneck from the residual stream, or the feed-forward's input, to its output."""

    targets = "mlp"
    act = "relu"
    hidden_dropout = True

    def __init__(self, config: AdaptFormer, site: Site, *, rng: Generator):
        super().__init__(config, site)
        self.start(site.in_features, site.out_features, bias=True, init="zero", rng=rng)
        if config.init == "wheat":
            m, fan_in = self.down.shape
            self.up = self.kaiming(site.out_features, m, rng=rng)
            self.down_bias = self.uniform(m, bound=fan_in**-0.5, rng=rng)
            self.up_bias = self.uniform(site.out_features, bound=m**-0.5, rng=rng)

    @classmethod
    def check(cls, config: AdaptFormer, site: Site) -> None:
        refuse_indices(config, site)

    @classmethod
    def reads(cls, config: AdaptFormer) -> str:
        return "input" if config.pre_norm else "residual"

    @classmethod
    def identity(cls, config: AdaptFormer) -> bool:
        return config.init == "zero"
