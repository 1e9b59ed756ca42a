"""GaLore: whole weights learn, and the optimizer works in a low-rank projection of their gradients.

For W (m, n) with gradient G: if m >= n, P (r, n) holds the leading right singular vectors of G and ``R = G P^T``; else P (m, r)
the left ones and ``R = P^T G``. The optimizer steps on R, from zero; its step D goes back, ``W += scale D P`` or ``W += scale P
D``. P is made anew from the present gradient every ``every`` steps; the moments stay as they are. Decoupled weight decay acts
on W. Moments of AdamW for 4096 x 4096 at rank 128: 1.05 million numbers and 0.52 million for P, where there were 33.6 million.
Source: arXiv 2403.03507, Algorithm 2; the default scale and rank are its code's.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.contracts import Selection
from trimtab.core.errors import Unsupported
from trimtab.schedules.contract import Schedule
from trimtab.schedules.registry import schedule

__all__ = ["GaLore", "basis", "lifted", "projected"]


def basis(G: Tensor, rank: int) -> Tensor:
    """P for a gradient (m, n): (r, n) if m >= n, else (m, r); by an SVD in float32 at least."""
    U, _, Vh = torch.linalg.svd(G.to(torch.promote_types(G.dtype, torch.float32)), full_matrices=False)
    return (Vh[:rank] if G.shape[0] >= G.shape[1] else U[:, :rank]).contiguous()


def projected(G: Tensor, P: Tensor) -> Tensor:
    """R: ``G P^T`` (m, r), or ``P^T G`` (r, n)."""
    return G @ P.t() if G.shape[0] >= G.shape[1] else P.t() @ G


def lifted(R: Tensor, P: Tensor, shape: tuple[int, int]) -> Tensor:
    """Back to ``shape`` (m, n): ``R P``, or ``P R``."""
    return R @ P if shape[0] >= shape[1] else P @ R


@schedule(paper="arXiv:2403.03507", tests=({"rank": 2, "every": 2},))
@dataclass(eq=False)
class GaLore(Schedule):
    """Full weights at the optimizer memory of a low rank: for ``tt.attach(model, tt.Unfreeze(), targets="linear")``.

    Not to save the weights' gradients, which are whole, nor a small adapter: what is stored is the whole weight.

    Args:
        rank: r of the projection, clamped to the smaller side of a matrix.
        scale: of the step that comes back.
        every: steps between two projections.
    """

    owns: ClassVar[frozenset[str]] = frozenset({"weights"})

    rank: int = 128
    scale: float = 0.25
    every: int = 200

    def __post_init__(self) -> None:
        if self.rank < 1 or self.every < 1 or not self.scale > 0:
            raise ValueError(
                f"rank and every must be at least 1, scale above 0; found {self.rank!r}, {self.every!r}, {self.scale!r}"
            )

    def start(self, model: nn.Module, *, steps: int | None) -> None:
        """Find the matrices that learn whole.

        Raises:
            Unsupported: there are none.
        """
        super().start(model, steps=steps)
        adapters = self.services.adapters()
        found = [a for a in adapters if isinstance(a, Selection) and a.value.dim() == 2 and min(a.value.shape) > 1]
        self.weights_of: dict[str, nn.Parameter] = {f"{a.site.path}.{a.site.slot}": a.value for a in found}
        if not found:
            methods = ", ".join(sorted({type(a.config).__name__ for a in adapters})) or "nothing"
            raise Unsupported(
                "GaLore projects the gradients of matrices that learn whole, such as those of tt.attach(model, tt.Unfreeze(), "
                f"targets='linear') (without targets the head alone learns); attached: {methods}"
            )
        if all(a.site.role == "head" for a in found):
            warnings.warn(
                f"the head alone learns ({found[0].site.path}), so that GaLore projects nothing else; for the model's other "
                "weights attach tt.Unfreeze() with targets='linear'",
                stacklevel=2,
            )
        if all(min(p.shape) < self.rank for p in self.weights_of.values()):
            warnings.warn(f"all matrices are smaller than rank={self.rank}, which is clamped: nothing is saved", stacklevel=2)
        self.bases: dict[str, Tensor] = {}
        self._whole: dict[str, Tensor] = {}

    @torch.no_grad()
    def before_optimizer(self) -> None:
        """Put projected gradients, and zeros of their shape, in place of the weights."""
        for name, p in self.weights_of.items():
            if p.grad is None:
                continue
            if name not in self.bases or self.step % self.every == 0:
                self.bases[name] = basis(p.grad, min(self.rank, *p.shape))
            P, G = self.bases[name], p.grad
            R = projected(G.to(P.dtype), P).to(G.dtype)
            self._whole[name], p.grad = p.data, None
            p.data = torch.zeros_like(R)
            p.grad = R

    @torch.no_grad()
    def step_end(self) -> None:
        """Put the weights back, moved by what the optimizer did."""
        super().step_end()
        groups = self.services.optimizer.param_groups
        decay = {id(p): group["lr"] * group.get("weight_decay", 0.0) for group in groups for p in group["params"]}
        for name, whole in self._whole.items():
            p, P = self.weights_of[name], self.bases[name]
            step, p.grad = p.data, None
            p.data = whole
            p.add_(lifted(step.to(P.dtype), P, p.shape).to(p.dtype), alpha=self.scale)
            p.mul_(1 - decay[id(p)])
        self._whole = {}

    def close(self) -> None:
        """After an error inside the optimizer: the weights as they were."""
        for name, whole in getattr(self, "_whole", {}).items():
            self.weights_of[name].grad, self.weights_of[name].data = None, whole

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"bases": {name: P.clone() for name, P in self.bases.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.bases = {name: P.to(self.weights_of[name].device) for name, P in state["bases"].items()}
