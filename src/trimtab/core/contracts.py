"""The contracts that a method fulfils. A method is one file: a frozen config, its adapter class, a docstring.

A minimal method, complete (it then trains, merges, saves, routes and serves)::

    @dataclass(frozen=True)
    class Gain(tt.MethodConfig):
        \"\"\"W' = diag(1 + g) W.\"\"\"

    @tt.method(Gain, paper="example")
    class GainAdapter(tt.Reparameterization):
        def __init__(self, config, site, *, rng):
            super().__init__(config, site)
            self.g = self.zeros(site.out_features, 1)

        def weight(self, W):
            return W * (1 + self.g)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.methodconfig import MethodConfig, Span
from trimtab.core.site import Operation, Site

if TYPE_CHECKING:
    from trimtab.core.anatomy import Anatomy

__all__ = ["ActivationAdapter", "Adapter", "MethodConfig", "Reparameterization", "Selection", "Span", "TokenAdapter"]


class Adapter(nn.Module):
    """A method's parameters at one place. Subclass one of the contracts below, not this class.

    Class attributes:
        targets: the place expression where the method acts if the user names none.
        kinds: the kinds of site that the method can act on.
        tensors: names of the parameters that it acts on; None means the module's matrix (or all, for selections).
        needs_gradient: whether starting it needs dL/dW (``attach(..., loss=...)``).
        gradient_power: what ``site.gradient`` sums over the batches then: 1, gradients; 2, their squares.
        identity_at_start: whether the adapted model equals the base before the first step.
        whole_ties: whether it stands at all modules that share a targeted tensor, and changes them alike.
        rank_axes: of a method whose ranks can be cut one by one, the parameters and buffers that carry them, each with the
            axis: 0 for a factor (r, in), 1 for (out, r). Sizes are then read off the tensors, and scales off ``config.rank``.
        in_axes, out_axes: likewise, what carries the place's inputs and outputs, of a method that can follow its place when some
            of these are cut away, so that ``weight(W)`` of what is left is what is left of ``weight(W)``; None if it cannot.

    Attributes:
        origin: seed of the attach that made it and its place's number there, if that start can be made again from them.
    """

    origin: tuple[int, int] | None = None

    targets: ClassVar[str] = "linear"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv", "grouped", "embedding", "bare"})
    tensors: ClassVar[tuple[str, ...] | None] = None
    needs_gradient: ClassVar[bool] = False
    gradient_power: ClassVar[int] = 1
    identity_at_start: ClassVar[bool] = True
    whole_ties: ClassVar[bool] = False
    rank_axes: ClassVar[Mapping[str, int]] = {}
    in_axes: Mapping[str, int] | None = None
    out_axes: Mapping[str, int] | None = None

    def __init__(self, config: MethodConfig, site: Site):
        super().__init__()
        self.config = config
        self.site = site

    @classmethod
    def check(cls, config: MethodConfig, site: Site) -> None:
        """Raise ``ShapeMismatch`` or ``Unsupported`` if ``config`` does not fit ``site``. Called before anything is built."""

    @classmethod
    def fit(cls, config: MethodConfig, site: Site) -> MethodConfig:
        """The config with what the user left open chosen to fit ``site``; nothing that was given is changed."""
        return config

    @classmethod
    def wants(cls, config: MethodConfig) -> str | None:
        """What must be measured on sample data before it starts: ``"gradient"``, ``"activation"``, or nothing."""
        return "gradient" if cls.needs_gradient else None

    @classmethod
    def places(cls, config: MethodConfig, anatomy: Anatomy) -> str:
        """Where the method acts if the user names no targets; override where an option or the model decides it."""
        return cls.targets

    @classmethod
    def needs(cls, config: MethodConfig) -> tuple[str, ...]:
        """Names of adapters that must be on the model, at the same places, before it."""
        return ()

    @classmethod
    def identity(cls, config: MethodConfig) -> bool:
        """Whether this config promises to start at the base; override where an option decides it."""
        return cls.identity_at_start

    @classmethod
    def layer(cls, config: MethodConfig) -> str:
        """A word that lets it stand beside another method of the same name at the same place, in the order of attaching."""
        return ""

    def losing(self, *, inputs: Tensor | None = None, outputs: Tensor | None = None) -> None:
        """Its place keeps these inputs or outputs alone: make up for the others, before ``in_axes`` or ``out_axes`` are cut."""

    # -- making parameters: on the site's device, in its adapter dtype; random ones drawn on the CPU from ``rng``,
    #    so that a seed gives the same start on every device

    def parameter(self, value: Tensor) -> nn.Parameter:
        """A trainable parameter with the given start value."""
        return nn.Parameter(self._place(value))

    def constant(self, value: Tensor) -> Tensor:
        """A tensor for ``register_buffer``: the given value on the site's device and in the adapter dtype."""
        return self._place(value)

    def zeros(self, *shape: int) -> nn.Parameter:
        """A parameter of zeros."""
        return nn.Parameter(torch.zeros(shape, device=self.site.device, dtype=self.site.adapter_dtype))

    def ones(self, *shape: int) -> nn.Parameter:
        """A parameter of ones."""
        return nn.Parameter(torch.ones(shape, device=self.site.device, dtype=self.site.adapter_dtype))

    def uniform(self, *shape: int, bound: float, rng: torch.Generator) -> nn.Parameter:
        """A parameter from U(-bound, bound)."""
        return self.parameter(self.random(*shape, rng=rng).mul_(2 * bound).sub_(bound))

    def kaiming(self, *shape: int, rng: torch.Generator) -> nn.Parameter:
        """Kaiming-uniform with a = sqrt(5): U(-1/sqrt(fan_in), 1/sqrt(fan_in)), fan_in = the second axis."""
        return self.uniform(*shape, bound=1 / math.sqrt(shape[1]), rng=rng)

    def normal(self, *shape: int, std: float, rng: torch.Generator) -> nn.Parameter:
        """A parameter from N(0, std^2)."""
        if self.site.is_meta:
            return self.zeros(*shape)
        return self.parameter(torch.randn(shape, generator=rng) * std)

    def random(self, *shape: int, rng: torch.Generator) -> Tensor:
        """U(0, 1) numbers on the CPU (empty on the meta device)."""
        if self.site.is_meta:
            return torch.empty(shape, device="meta")
        return torch.rand(shape, generator=rng)

    def _place(self, value: Tensor) -> Tensor:
        if self.site.is_meta:
            return torch.empty(value.shape, device="meta", dtype=self.site.adapter_dtype)
        return value.detach().to(device=self.site.device, dtype=self.site.adapter_dtype).clone()

    @property
    def resized(self) -> bool:
        """Whether a schedule has cut (or joined) ranks, so that there are not ``config.rank`` of them."""
        return any(getattr(self, name).shape[dim] != self.config.rank for name, dim in self.rank_axes.items())

    def replaces(self, where: Tensor) -> Tensor:
        """Which of the base tensor's entries at the flat places ``where`` (n,) it replaces whatever the base has, (n,) bool."""
        return torch.zeros(len(where), dtype=torch.bool)

    def starts(self) -> Mapping[str, Tensor]:
        """Start values of parameters that the adapter itself keeps, by the parameter's name. Default: none."""
        return {}

    def rebuild(self) -> None:
        """Recreate non-persistent buffers from config and site; called after a load. Default: there are none."""

    def extra_repr(self) -> str:
        return f"{self.config}"


class Reparameterization(Adapter):
    """A new weight from the old: state ``weight``; add ``forward`` where something faster exists.

    Law: ``forward(x, base)`` equals ``derived(x, base)`` in value and in every gradient.

    Class attributes:
        fast: the kinds of site whose ``forward`` the method overrides; elsewhere the derived form runs.
        needs_weight: whether the fast forward reads ``base.weight`` (on a quantised base: dequantises it).
        additive: whether ``weight(W) - W`` does not depend on W.
        rebias: whether the method has a ``bias`` of its own; for kinds whose module may carry one (linear, conv, norms).
    """

    fast: ClassVar[frozenset[str]] = frozenset()
    needs_weight: ClassVar[bool] = True
    additive: ClassVar[bool] = True
    rebias: ClassVar[bool] = False

    def weight(self, W: Tensor) -> Tensor:
        """The adapted matrix, ``(out, in) -> (out, in)``, differentiable in the parameters and in ``W``."""
        raise NotImplementedError

    def bias(self, b: Tensor | None) -> Tensor | None:
        """The adapted bias, ``(out,) -> (out,)``; ``b`` is None where the base has none. Set ``rebias`` to override it."""
        return b

    def forward(self, x: Tensor, base: Operation) -> Tensor:
        """The adapted operation on ``x``. Default, for every kind: the dense weight."""
        return self.derived(x, base)

    def derived(self, x: Tensor, base: Operation) -> Tensor:
        """The operation by its definition: the base's, with the adapted weight and bias, dense."""
        y = base.apply(x, self.weight(base.weight))
        return base.rebiased(y, self.bias(base.bias)) if self.rebias else y

    def run(self, x: Tensor, base: Operation) -> Tensor:
        """``forward`` where this kind of place has a fast one, else the derived form."""
        if base.kind not in self.fast or not base.multiplies:
            return self.derived(x, base)
        return base.stilled(x, self.forward(x, base))

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """``(B, A)`` with ``weight(W) - W == B @ A`` exactly, shapes (out, r) and (r, in), if the update is low-rank."""
        return None


class Selection(Reparameterization):
    """Existing parameters, or slices of them, that learn: ``weight(W)`` is W with the slice replaced by own values.

    The adapter holds a copy of what learns and substitutes it, so that the base itself is never written, all else stays
    the same to the bit, and only the slice is stored. ``index`` is None (the whole tensor) or an index of rows.
    """

    additive = False
    kinds = frozenset({"linear", "conv", "grouped", "embedding", "bare", "vector"})
    in_axes, out_axes = {"value": 1}, {"value": 0}

    def __init__(self, config: MethodConfig, site: Site):
        super().__init__(config, site)
        self.value = self.start()

    def start(self) -> nn.Parameter:
        """What learns, with its start value: the whole tensor unless a subclass says otherwise."""
        return nn.Parameter(self._place(self.site.weight))

    def weight(self, W: Tensor) -> Tensor:
        return self.value

    def replaces(self, where: Tensor) -> Tensor:
        return torch.full((len(where),), self.site.rows is None)


class ActivationAdapter(Adapter):
    """A small network at a place's output (series), beside it (parallel) or on its input.

    ``forward(x, y)``: ``x`` is what the adapter reads (``reads``), ``y`` the place's output (the first entry of a tuple);
    returns the new ``y``. The place is a whole module: a Linear, an attention, a feed-forward, a block.

    Law: the module's output is ``forward`` of its input and of what it gave before, and everything else of its output
    stays; if the map is affine, ``merges`` may say so, and the weight form, which is derived, gives the same output.

    Class attributes:
        at_input: whether it acts on the place's input, before the module runs: the input becomes ``forward(x, x)``.
    """

    kinds = frozenset({"module"})
    at_input: bool = False

    @classmethod
    def reads(cls, config: MethodConfig) -> str:
        """What ``x`` is: ``"input"``, the place's first input; ``"output"``, not used, so that any place with the right output
        serves; ``"residual"``, the input of the norm in front of the attention or feed-forward."""
        return "input"

    @classmethod
    def merges(cls, config: MethodConfig, site: Site) -> bool:
        """Whether ``forward`` is affine in ``x`` and ``y`` together (linear, if ``at_input``) at a matrix's place."""
        return False

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The new output of the place, same shape as ``y``."""
        raise NotImplementedError

    def change(self, x: Tensor, y: Tensor) -> Tensor:
        """``forward(x, y) - y``; override where it can be had without the rounding of that difference."""
        return self(x, y) - y

    def weight(self, W: Tensor) -> Tensor:
        """The adapted matrix of a Linear, ``(out, in) -> (out, in)``: ``forward`` on the unit vectors. For what ``merges``."""
        eye = torch.eye(W.shape[1], dtype=W.dtype, device=W.device)
        zero = self._shift(W.new_zeros(W.shape[0]))
        return W @ (self(eye, eye) - zero).t() if self.at_input else (self(eye, W.t()) - zero).t()

    def bias(self, b: Tensor | None) -> Tensor | None:
        """The adapted bias (out,); ``b`` is None where the Linear has none."""
        if self.at_input:
            return b
        shift = self._shift(self.site_zeros() if b is None else b)
        return None if b is None and not shift.any() else shift

    def site_zeros(self) -> Tensor:
        """A bias of zeros, (out,)."""
        return torch.zeros(self.site.out_features, device=self.site.device, dtype=self.site.adapter_dtype)

    def _shift(self, b: Tensor) -> Tensor:
        """What an input of zeros gives: (in,) at the input, else (out,)."""
        x = b.new_zeros(1, self.site.in_features)
        return self(x, x if self.at_input else b[None])[0]


class TokenAdapter(Adapter):
    """Learned tokens beside the model's own: it states what they are, and where they come in.

    Law: outputs have the base's shapes; the sequence's positions, masks and caches stay as they are; generation with a cache
    equals generation without, with padding on either side.

    ``entry(config)`` says where:

    - ``"attention"``: ``keys_values()`` join in the self-attention of each targeted block. Every query sees them; they have no
      position.
    - ``"block"``: ``tokens()`` come in at each targeted block and end with it. In effect they are keys and values that the
      block's own norm and projections make, and are run as such.
    - ``"model"``: ``tokens()`` come in at the first targeted block and go on to the last. In a causal model, where they do not
      depend on what follows, they are run once, alone, for the keys and values that the sequence sees; in others they are in
      the sequence, in front, inside the blocks.
    """

    targets = "block"
    kinds = frozenset({"module"})
    identity_at_start = False

    @classmethod
    def entry(cls, config: MethodConfig) -> str:
        """Where the tokens come in: ``"attention"``, ``"block"`` or ``"model"``."""
        raise NotImplementedError

    def tokens(self) -> Tensor:
        """The tokens, ``(p, width)``; for the entries ``"block"`` and ``"model"``."""
        raise NotImplementedError

    def keys_values(self) -> tuple[Tensor, Tensor]:
        """Keys ``(p, key width)`` and values ``(p, value width)``, all heads side by side; for the entry ``"attention"``."""
        raise NotImplementedError

    def gate(self) -> Tensor | None:
        """A factor (1,): the keys and values get a softmax of their own, whose result is added; None: they share the softmax."""
        return None

    def folded(self) -> tuple[MethodConfig, dict[str, Tensor]] | None:
        """A config and its adapter's tensors that act the same without what only training needs; None: there is nothing such."""
        return None

    @property
    def duty(self) -> str:
        """What the module that it stands at does for it (see ``trimtab.core.flows``)."""
        entry = self.entry(self.config)
        return {"attention": "beside", "block": "fresh"}.get(entry) or ("prompt" if self.site.role == "stack" else "enter")
