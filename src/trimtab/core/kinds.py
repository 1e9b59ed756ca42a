"""The kinds of site, one class each, and which one a module's parameter is (``site_for``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.core.site import Operation, Site, base_class, dense, inside, is_quantised, linear

if TYPE_CHECKING:
    from trimtab.core.contracts import Adapter
    from trimtab.core.selection import Place

__all__ = ["ModuleSite", "PartOperation", "Through", "bias_site", "linear_forward_kind", "site_for", "weight_site"]

_CONV_DIMS = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}


class _Tensor(Site):
    """What all kinds with a parameter share: rows of a fused one, and its own layout against the contraction's."""

    #: the axis of the contraction's layout that rows of a fused parameter stand on
    row_axis = -2

    @property
    def weight(self) -> Tensor:
        return self.take(self.matrix(dense(self.parameter(), self.module)))

    @property
    def bias(self) -> Tensor | None:
        bias = getattr(inside(self.module), "bias", None)
        return bias if bias is None or self.rows is None else self.rows.take(bias, 0)

    def take(self, whole: Tensor) -> Tensor:
        """This site's rows of the whole tensor, both in the contraction's layout."""
        return whole if self.rows is None else self.rows.take(whole, self.row_axis)

    def put(self, whole: Tensor, part: Tensor) -> Tensor:
        """The whole tensor with this site's rows replaced by ``part``, in ``part``'s dtype."""
        return part if self.rows is None else self.rows.put(whole.to(part.dtype), self.row_axis, part)

    def matrix(self, stored: Tensor) -> Tensor:
        """Stored layout -> the contraction's, ``(..., out, in)``; a view."""
        return stored

    def unmatrix(self, weight: Tensor) -> Tensor:
        """``(..., out, in)`` -> stored layout (up to a reshape)."""
        return weight


class _Matrix(_Tensor):
    """What the kinds with a known forward share."""

    def __call__(self, x: Tensor) -> Tensor:
        return base_class(self.module).forward(inside(self.module), x)


class LinearSite(_Matrix):
    """A Linear, quantised or not, or transformers' Conv1D, whose weight is stored transposed."""

    kind = "linear"

    @property
    def transposed(self) -> bool:
        """Whether the stored weight is ``(in, out)``."""
        return hasattr(self.module, "nf") and not isinstance(self.module, nn.Linear)

    @property
    def dense(self) -> Tensor | None:  # type: ignore[override]
        stored = self.parameter()
        # an exact type test: tensor subclasses (quantised, sharded) go through the module's own forward
        if self.rows is not None or type(stored) is not nn.Parameter or not stored.is_floating_point():
            return None
        return stored.t() if self.transposed else stored

    def matrix(self, stored: Tensor) -> Tensor:
        return stored.t() if self.transposed else stored

    unmatrix = matrix

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        return linear(x, weight, self.bias)

    def matmul(self, x: Tensor) -> Tensor:
        W = self.dense
        return super().matmul(x) if W is None else linear(x, W, None)

    def project(self, x: Tensor, a: Tensor) -> Tensor:
        return linear(x, a, None)

    def emit(self, u: Tensor) -> Tensor:
        return u


class ConvSite(_Matrix):
    """A convolution of one group; its matrix is ``(out, in_channels * kernel)``."""

    kind = "conv"

    def matrix(self, stored: Tensor) -> Tensor:
        return stored.reshape(stored.shape[0], -1)

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        stored = self.parameter()
        bias = self.bias
        kernel = weight.reshape(stored.shape).to(x.dtype)
        return self.module._conv_forward(x, kernel, None if bias is None else bias.to(x.dtype))

    def project(self, x: Tensor, a: Tensor) -> Tensor:
        u = self.module._conv_forward(x, a.to(x.dtype).reshape(a.shape[0], *self.parameter().shape[1:]), None)
        return u.movedim(self._channel_axis(u), -1)

    def emit(self, u: Tensor) -> Tensor:
        return u.movedim(-1, self._channel_axis(u))

    def _channel_axis(self, u: Tensor) -> int:
        spatial = len(self.module.kernel_size)
        return u.dim() - 1 - spatial  # 1 for a batch, 0 for a single sample


class GroupedConvSite(ConvSite):
    """A convolution of several groups: a row of the matrix sees its own group's channels, so only the weight form holds."""

    kind = "grouped"


class EmbeddingSite(_Matrix):
    """An Embedding: a one-hot input times the transposed table, matrix ``(dim, entries)``."""

    kind = "embedding"
    bias = None  # type: ignore[assignment]

    def matrix(self, stored: Tensor) -> Tensor:
        return stored.t()

    unmatrix = matrix

    @property
    def multiplies(self) -> bool:  # type: ignore[override]
        return self.module.max_norm is None and not self.module.scale_grad_by_freq

    def stilled(self, x: Tensor, y: Tensor) -> Tensor:
        pad = self.module.padding_idx  # never negative: nn.Embedding has counted it from the front
        return y if pad is None else torch.where((x == pad)[..., None], y.detach(), y)

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        m = self.module
        table = weight.t().to(self.dtype)
        # no sparse gradient: it goes on through the operations that made the table, which know none
        return F.embedding(x, table, m.padding_idx, m.max_norm, m.norm_type, m.scale_grad_by_freq)

    def project(self, x: Tensor, a: Tensor) -> Tensor:
        return F.embedding(x, a.t().to(self.dtype), self.module.padding_idx)

    def emit(self, u: Tensor) -> Tensor:
        return u


class BareSite(_Tensor):
    """Any parameter with two or more axes that its module reads by itself: packed in_proj, expert banks (experts, out, in)."""

    kind = "bare"
    substitutes = True
    bias = None  # type: ignore[assignment]
    #: whether the bank is stored (experts, in, out)
    transposed = False

    def matrix(self, stored: Tensor) -> Tensor:
        return stored.transpose(-1, -2) if self.transposed else stored

    unmatrix = matrix


class TransposedBareSite(BareSite):
    """A bare parameter that is stored with its input axis first: ``(experts, in, out)``."""

    transposed = True


class KernelSite(BareSite):
    """A kernel whose module's forward is not the known one, or any parameter of more than three axes: ``(out, in * kernel)``."""

    def matrix(self, stored: Tensor) -> Tensor:
        return stored.flatten(1)

    def unmatrix(self, weight: Tensor) -> Tensor:
        return weight


class TransposedKernelSite(BareSite):
    """The kernel of a transposed convolution, stored ``(in, out / groups, kernel...)``: ``(out, in / groups * kernel)``."""

    def matrix(self, stored: Tensor) -> Tensor:
        grouped = stored.unflatten(0, (self.module.groups, -1))  # (groups, in / groups, out / groups, kernel...)
        return grouped.transpose(1, 2).flatten(2).flatten(0, 1)

    def unmatrix(self, weight: Tensor) -> Tensor:
        _, out, *kernel = self.parameter().shape
        grouped = weight.reshape(self.module.groups, out, -1, *kernel)
        return grouped.transpose(1, 2).flatten(0, 1)


class VectorSite(_Tensor):
    """A parameter without a contraction: a bias, a norm's weight, a position table."""

    kind = "vector"
    substitutes = True
    row_axis = 0
    bias = None  # type: ignore[assignment]


def bias_site(site: Site) -> VectorSite:
    """The place of the bias of ``site``'s module (which may have none), the same rows of it."""
    out = site.shape[0] if site.kind == "vector" else site.shape[-2]
    same = {name: getattr(site, name) for name in ("module", "path", "part", "rows", "role", "block", "device", "dtype")}
    return VectorSite(**same, tensor=site.bias_name, shape=(out,))


def weight_site(site: Site) -> LinearSite | None:
    """The place of the matrix of ``site``'s module, if that is a Linear (or Conv1D) whose forward is the known one."""
    module = site.module
    if module._parameters.get("weight") is None or linear_forward_kind(module, "weight") is not LinearSite:
        return None
    same = {name: getattr(site, name) for name in ("module", "path", "role", "block", "device", "dtype", "shape")}
    return LinearSite(**same, tensor="weight")


class ModuleSite(Site):
    """A whole module, for adapters on activations and tokens; ``shape`` is ``(out, in)`` of its activations."""

    kind = "module"


class PartOperation(Operation):
    """Rows of a fused Linear while it runs: its output is computed once and shared by the parts."""

    kind = "linear"

    def __init__(self, site: Site, whole: Operation, x: Tensor, y: Tensor):
        self.site, self.whole, self.x, self.y = site, whole, x, y
        self.out_features, self.in_features = site.out_features, site.in_features

    def __call__(self, x: Tensor) -> Tensor:
        return self.site.rows.take(self.y if x is self.x else self.whole(x), -1)

    @property
    def weight(self) -> Tensor:
        return self.site.rows.take(self.whole.weight, 0)

    @property
    def bias(self) -> Tensor | None:
        bias = self.whole.bias
        return None if bias is None else self.site.rows.take(bias, 0)

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        return linear(x, weight, self.bias)

    def project(self, x: Tensor, a: Tensor) -> Tensor:
        return linear(x, a, None)

    def emit(self, u: Tensor) -> Tensor:
        return u


class Through(Operation):
    """A base with one adapter applied: what the next adapter at the same place sees as its base."""

    def __init__(self, adapter: Adapter, base: Operation):
        self.adapter, self.base = adapter, base
        self.kind, self.out_features, self.in_features = base.kind, base.out_features, base.in_features

    def __call__(self, x: Tensor) -> Tensor:
        return self.adapter.run(x, self.base)

    @property
    def weight(self) -> Tensor:
        return self.adapter.weight(self.base.weight)

    @property
    def bias(self) -> Tensor | None:
        return self.adapter.bias(self.base.bias)

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        y = self.base.apply(x, weight)
        return self.base.rebiased(y, self.bias) if self.adapter.rebias else y

    @property
    def multiplies(self) -> bool:  # type: ignore[override]
        return self.base.multiplies

    def stilled(self, x: Tensor, y: Tensor) -> Tensor:
        return self.base.stilled(x, y)

    def project(self, x: Tensor, a: Tensor) -> Tensor:
        return self.base.project(x, a)

    def emit(self, u: Tensor) -> Tensor:
        return self.base.emit(u)


def linear_forward_kind(module: nn.Module, tensor: str) -> type[Site]:
    """The site class for ``module``'s parameter ``tensor``: a known contraction if the module's forward is a known one.

    A subclass with a forward of its own (a scaled embedding, say) or a module whose parent reads the weight past it
    (``out_proj`` of nn.MultiheadAttention) is served by substitution, which is right whatever the forward does.
    """
    cls = base_class(module)
    stored = module._parameters[tensor]
    if tensor == "weight":
        if isinstance(module, nn.Linear) and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            if cls.forward is nn.Linear.forward or is_quantised(stored):
                return LinearSite
        elif type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
            return LinearSite
        elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            if cls.forward in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward):
                return ConvSite if module.groups == 1 else GroupedConvSite
        elif isinstance(module, nn.Embedding) and cls.forward is nn.Embedding.forward:
            return EmbeddingSite
    if stored.dim() < 2 or "Norm" in cls.__name__:
        return VectorSite
    if tensor == "weight" and isinstance(module, nn.modules.conv._ConvTransposeNd):
        return TransposedKernelSite
    if stored.dim() > 3 or (tensor == "weight" and isinstance(module, nn.modules.conv._ConvNd)):
        return KernelSite
    return TransposedBareSite if getattr(module, "is_transposed", False) and stored.dim() == 3 else BareSite


def site_for(place: Place, tensor: str) -> Site:
    """The site of ``place``'s parameter ``tensor``."""
    module = place.module
    cls = linear_forward_kind(module, tensor)
    stored = module._parameters[tensor]
    dtype = stored.dtype if stored.is_floating_point() else torch.get_default_dtype()
    site = cls(
        module=module,
        path=place.path,
        tensor=tensor,
        shape=(),
        part=place.part,
        rows=place.rows,
        role=place.role,
        block=place.block,
        device=stored.device,
        dtype=dtype,
    )
    site.shape = _shape(site, module, stored)
    return site


def _shape(site: Site, module: nn.Module, stored: Tensor) -> tuple[int, ...]:
    if isinstance(site, LinearSite) and hasattr(module, "in_features"):
        shape = [module.out_features, module.in_features]  # a quantised storage may have another shape of its own
    else:
        shape = list(site.matrix(stored).shape)
    if site.rows is not None:
        shape[site.row_axis] = site.rows.count
    return tuple(shape)
