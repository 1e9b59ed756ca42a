"""Series adapters: a bottleneck with a residual connection after a sublayer, inside the branch.

``y' = y + s (Up f(Down y + a) + b)`` with ``Down`` (m, d), ``Up`` (d, m); at a matrix's input, ``y' = W (x + s (Up f(Down x)))``.
``Up`` and ``b`` start at zero, so training starts at the base. Sources: arXiv 1902.00751 Sec. 2 (after attention and
feed-forward), arXiv 2005.00247 (after the feed-forward alone), arXiv 2304.01933 Sec. 3 (linear layers of a feed-forward, no
biases, tanh). Trainable: ``2 d m + m + d`` a place, without biases ``2 d m``. Saved for backward: ``y``, and m numbers a token
where ``16 m <= d``.

``Bottleneck`` is what the adapters with one pair of matrices share; they differ in what they read and where they add.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from trimtab.core.anatomy import Anatomy
from trimtab.core.contracts import ActivationAdapter, MethodConfig, Span
from trimtab.core.errors import Unsupported
from trimtab.core.registry import method
from trimtab.core.site import Site
from trimtab.kernels.bottleneck import ACTIVATIONS, bottleneck

__all__ = ["Bottleneck", "SeriesAdapter", "SeriesAdapterAdapter", "present", "refuse_indices", "require_bottleneck"]

_BEFORE = ("mlp.gate", "mlp.up", "mlp.gate_up")


def require_bottleneck(config: MethodConfig) -> None:
    """Check the fields ``bottleneck``, ``scale`` and ``dropout``, and ``act`` and ``init`` where ``config`` has a choice."""
    config.require_count("bottleneck")
    if hasattr(config, "act"):
        config.require_choice("act", tuple(ACTIVATIONS))
        config.require_choice("init", ("bert", "houlsby", "zero"))
    number = isinstance(config.scale, (int, float)) and not isinstance(config.scale, bool)
    config.require(
        (number and config.scale != 0) or config.scale == "learned",
        f"scale must be a number other than 0, or 'learned', found {config.scale!r}",
    )
    config.require_probability("dropout", config.dropout)


def present(anatomy: Anatomy, *roles: str) -> str:
    """Those of ``roles`` that the model has, as an expression; all of them if it has none, so that the error names them."""
    known = set(anatomy.roles.values())
    return " | ".join([role for role in roles if role in known] or roles)


def refuse_indices(config: MethodConfig, site: Site) -> None:
    """Raise ``Unsupported`` at an embedding, whose input is indices."""
    if isinstance(site.module, nn.Embedding):
        raise Unsupported(f"{type(config).__name__} reads a module's input, and {site.name} reads indices; put it elsewhere")


class Bottleneck(ActivationAdapter):
    """``down`` (m, in), ``up`` (out, m), ``down_bias`` (m,) and ``up_bias`` (out,) or None, ``gain`` (1,) where the scale learns.

    A subclass calls ``start`` with the sizes and says what it reads.
    """

    act = "relu"
    hidden_dropout = False  # whether ``config.dropout`` is of the hidden activation, and not of the input

    def start(self, fan_in: int, out: int, *, bias: bool, init: str, rng: Generator) -> None:
        """Make the parameters. ``zero``: Down Kaiming-uniform (a = sqrt 5), Up zero; ``bert``: both N(0, 0.02); ``houlsby``:
        both N(0, 0.01) cut off at two deviations; biases start at zero."""
        m = self.config.bottleneck
        if init == "zero":
            self.down, self.up = self.kaiming(m, fan_in, rng=rng), self.zeros(out, m)
        else:
            self.down, self.up = self._normal(m, fan_in, init, rng), self._normal(out, m, init, rng)
        self.down_bias, self.up_bias = (self.zeros(m), self.zeros(out)) if bias else (None, None)
        self.gain = self.ones(1) if self.config.scale == "learned" else None

    def _normal(self, rows: int, columns: int, init: str, rng: Generator) -> nn.Parameter:
        if init == "bert" or self.site.is_meta:
            return self.normal(rows, columns, std=0.02, rng=rng)
        return self.parameter(nn.init.trunc_normal_(torch.empty(rows, columns), std=0.01, a=-0.02, b=0.02, generator=rng))

    def beside(self, y: Tensor, x: Tensor | None) -> Tensor:
        """``y`` with the network's output on ``x`` (None: on ``y``) added."""
        p = self.config.dropout * self.training
        return bottleneck(
            y,
            x,
            (self.down, self.down_bias, self.up, self.up_bias),
            act=self.act,
            scale=self.config.scale if self.gain is None else self.gain,
            dropout=0.0 if self.hidden_dropout else p,
            hidden_dropout=p if self.hidden_dropout else 0.0,
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.beside(y, x)

    def change(self, x: Tensor, y: Tensor) -> Tensor:
        return self.beside(torch.zeros_like(y), y if self.reads(self.config) == "output" else x)


@dataclass(frozen=True)
class SeriesAdapter(MethodConfig):
    """A bottleneck with a residual connection after attention and feed-forward: the classic adapter.

    Not where the model must stay as fast as its base, since it cannot be merged (LoRA can), nor where memory is tight: it keeps
    the output of every place. A parallel adapter of the same size is usually the better one in decoders.

    Args:
        bottleneck: m, the width in the middle.
        act: activation in the middle: none, relu, gelu, gelu_tanh, silu or tanh. With none it is linear and merges.
        scale: factor of the adapter's output, or ``"learned"``: one number, starting at 1.
        dropout: probability of zeroing an entry of the adapter's input while training.
        bias: whether both layers have biases.
        init: ``"zero"`` (Up zero, starts at the base), ``"bert"`` (both N(0, 0.02): changes outputs by a fifth at width 4096) or
            ``"houlsby"`` (both N(0, 0.01), cut off).
        placement: ``"houlsby"``, after attention and feed-forward; ``"pfeiffer"``, after the feed-forward (what LLM-Adapters'
            paper uses); ``"llm"``, on the linear layers of the feed-forward: before gate and up, after down.
        position: at a given place: ``"after"`` its output, ``"before"``, at its input, or ``"auto"``: as the placement says.
    """

    search = {"bottleneck": (16, 32, 64, 128, 256), "placement": ("houlsby", "pfeiffer"), "dropout": (0.0, 0.1)}
    learning_rate = Span(5e-5, 5e-3, log=True)

    bottleneck: int = 64
    act: str = "gelu"
    scale: float | str = 1.0
    dropout: float = 0.0
    bias: bool = True
    init: str = "zero"
    placement: str = "houlsby"
    position: str = "auto"

    def __post_init__(self) -> None:
        require_bottleneck(self)
        self.require_choice("placement", ("houlsby", "pfeiffer", "llm"))
        self.require_choice("position", ("auto", "before", "after"))

    def before(self, site: Site) -> bool:
        """Whether the adapter stands at the input of ``site``."""
        return self.position == "before" or (self.position == "auto" and self.placement == "llm" and site.role in _BEFORE)


@method(
    SeriesAdapter, paper="arXiv:1902.00751 Sec. 2",
    tests=({"bottleneck": 3}, {"bottleneck": 2, "act": "none", "scale": "learned"},
           {"bottleneck": 2, "act": "tanh", "bias": False, "position": "before", "init": "bert"}),
)  # fmt: skip
class SeriesAdapterAdapter(Bottleneck):
    """The bottleneck on the place's output, or on its input."""

    targets = "attn | mlp"

    def __init__(self, config: SeriesAdapter, site: Site, *, rng: Generator):
        super().__init__(config, site)
        self.act, self.at_input = config.act, config.before(site)
        width = site.in_features if self.at_input else site.out_features
        self.start(width, width, bias=config.bias, init=config.init, rng=rng)

    @classmethod
    def places(cls, config: SeriesAdapter, anatomy: Anatomy) -> str:
        if config.placement == "llm":
            return present(anatomy, *_BEFORE, "mlp.down")
        return "mlp" if config.placement == "pfeiffer" else cls.targets

    @classmethod
    def check(cls, config: SeriesAdapter, site: Site) -> None:
        if config.before(site):
            refuse_indices(config, site)

    @classmethod
    def reads(cls, config: SeriesAdapter) -> str:
        return "output"

    @classmethod
    def merges(cls, config: SeriesAdapter, site: Site) -> bool:
        return config.act == "none" and not (config.bias and config.before(site))

    @classmethod
    def identity(cls, config: SeriesAdapter) -> bool:
        return config.init == "zero"

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.beside(y, None)
