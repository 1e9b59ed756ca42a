"""Light-PEFT: what a task can spare of the base and of its adapters is found early, and cut out for the rest of training.

Stage 1, the first ``estimate`` steps: beside the adapters, one factor for each attention head (each group of heads that share
keys and values) and each feed-forward channel learns, from one on; ``l1 * sum |factor|`` is added to the loss. In its second half
two statistics are taken: of each adapted module, how large its update is beside the base's output; of each rank, a score.

The cut, at the beginning of the step after: in every attention the heads with the lowest factors go, in the whole model the
channels with the lowest, then the adapted modules with the smallest updates, then the lowest ranks of those that are left. What is
left are smaller dense matrices, in training and inference; the surviving factors are set back to one. Stage 2 trains on, with the
optimizer's state cut likewise. Source: arXiv 2406.03792; order, quantities and ratios as in its code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.attach import attach, remove_adapters
from trimtab.core.contracts import Adapter
from trimtab.core.cut import Kept, cut_of, packed, unpacked
from trimtab.core.errors import Unsupported
from trimtab.core.state import state_of, unwrap
from trimtab.methods.additive.unit_mask import UnitMask, UnitMaskAdapter
from trimtab.schedules import optim, surgery
from trimtab.schedules.contract import Group, Schedule
from trimtab.schedules.estimation import Estimation
from trimtab.schedules.registry import schedule
from trimtab.schedules.spare import keep_best, keep_best_of_all, measured, prune_count, ranks_of
from trimtab.schedules.units import KINDS, find_units

__all__ = ["LightPEFT"]

Key = tuple[str, str, str]  # name of the adapter, path, slot
_WHY = "; is the learning rate above zero in its first half? If it rises from zero, give a longer estimate"


@schedule(paper="arXiv:2406.03792", tests=({"estimate": 2, "heads": 0, "channels": 0.5, "modules": 0.5},))
class LightPEFT(Schedule):
    """Prune heads and channels of the base, and modules and ranks of the adapters, early: faster and smaller from then on.

    Not where the base must stay whole for other adapters while this one trains. Refused: a base that is quantised already (cut
    first), experts in one bank, models that count their heads outside their attention (T5, BLOOM). Stage 1 needs the memory of
    training without it.

    Args:
        estimate: length of stage 1: optimizer steps, or a share of the run (the authors: 0.38 epochs).
        heads: how many heads (groups of heads) of each attention go: a share, or a number; 0: none. One at least stays.
        channels: how many feed-forward channels go: a share, or a number of the whole model's.
        modules: how many adapted modules go.
        ranks: how many of the remaining modules' ranks go; a module that loses all of them goes.
        l1: weight of the factors' absolute values in the loss.
        mask_rate: the factors' learning rate over that of the optimizer's first group.
        masks: ``"reset"``: surviving factors become one, as the authors do; ``"keep"``: they stay, as a part of the adapter
            (``UnitMask``) that learns on, and the cut changes nothing but what it takes away.
        align: round counts of channels that are left to multiples of it (64 for GPUs).
        originals: what becomes of the uncut weights: ``"keep"``; ``"host"``, in the CPU's memory; ``"drop"``, to be given again
            when ``trimtab.schedules.restoration.restore`` puts the base back.
        official: count as the authors do: of n units a share p takes ``floor(p (n - 1)) + 1`` (what their strict comparison with a
            quantile takes), in place of the nearest whole number to ``p n``; a number is a number either way.

    Raises:
        ValueError: a number out of its range, or nothing to prune.
    """

    owns = frozenset({"rank"})

    def __init__(self, estimate: int | float = 0.05, *, heads: int | float = 1 / 3, channels: int | float = 1 / 3,
                 modules: int | float = 0.75, ranks: int | float = 0.5, l1: float = 1e-4, mask_rate: float = 1.0,
                 masks: str = "reset", align: int = 1, originals: str = "host", official: bool = False):  # fmt: skip
        self.amounts = {"heads": heads, "channels": channels, "modules": modules, "ranks": ranks}
        for name, value in self.amounts.items():
            if isinstance(value, bool) or not (value >= 0 if isinstance(value, int) else 0 <= value < 1):
                raise ValueError(f"{name} must be a share of at least 0 and below 1, or a whole number, found {value!r}")
        if not any(self.amounts.values()):
            raise ValueError("heads, channels, modules and ranks are all 0: nothing would be pruned")
        if isinstance(estimate, bool) or not (estimate >= 1 if isinstance(estimate, int) else 0 < estimate < 1):
            raise ValueError(f"estimate must be a number of steps of at least 1 or a share of the run, found {estimate!r}")
        if not l1 >= 0 or not mask_rate > 0 or align < 1:
            raise ValueError(f"l1 must be at least 0, mask_rate above 0, align at least 1; found {l1!r}, {mask_rate!r}, {align!r}")
        if masks not in ("reset", "keep"):
            raise ValueError(f"masks must be 'reset' or 'keep', found {masks!r}")
        if originals not in surgery.ORIGINALS:
            raise ValueError(f"originals must be one of {', '.join(surgery.ORIGINALS)}, found {originals!r}")
        self.estimate, self.l1, self.mask_rate, self.masks = estimate, l1, mask_rate, masks
        self.align, self.originals, self.official = align, originals, official
        self.needs_steps = isinstance(estimate, float)
        self.owns = frozenset({"rank"}) if modules or ranks else frozenset()
        self.stage: Estimation | None = None
        self.done: dict[str, Any] | None = None

    # -- moments

    def start(self, model: nn.Module, *, steps: int | None) -> None:
        """Find the units, and put factors on them.

        Raises:
            Unsupported: units or adapters that cannot be cut, all reasons together; or DDP.
            RuntimeError: it is driven by hand.
            ValueError: the estimation leaves no step of the run or ends before anything has moved, or more would go than there is.
        """
        super().start(model, steps=steps)
        least = self.services.idle_steps + 2  # something must have moved before the last step that is looked at
        self.until = self.estimate if isinstance(self.estimate, int) else max(least, round(self.estimate * steps))
        if self.until < least:
            rising = ", the first of which has a learning rate of zero" * bool(self.services.idle_steps)
            raise ValueError(
                f"an estimation of {self.until} steps{rising} would measure adapters that have not moved yet: estimate must be at "
                f"least {least} here"
            )
        if steps is not None and self.until >= steps:
            shorter = f", or a lower estimate (at least {least})" * (self.until > least)
            raise ValueError(
                f"the estimation takes {self.until} of {steps} steps: none is left for training what it leaves; LightPEFT needs a "
                f"run of at least {self.until + 1} steps{shorter}"
            )
        if self.services.ddp:
            raise Unsupported(
                "LightPEFT changes shapes, which DDP's buckets do not follow: run it in one process, and distribute the cut model"
            )
        self.root, self.done, self.lost = unwrap(model), None, []
        self.stage = None if cut_of(self.root) else self._begin()  # a run that goes on after its cut has load_state_dict next

    def _begin(self) -> Estimation:
        adapters = self._adapters()
        modules = [a for a in adapters if measured(a)] if self.amounts["modules"] else []
        ranks = [a for a in adapters if a.rank_axes] if self.amounts["ranks"] else []
        for name, found in (("modules", modules), ("ranks", ranks)):
            if self.amounts[name] and not found:
                raise Unsupported(
                    f"LightPEFT needs {name} to prune, which none of the {len(adapters)} adapted places has; set {name}=0"
                )
        units = {kind: find_units(self.root, kind) if self.amounts[kind] else [] for kind in KINDS}
        sizes = {
            "heads": min((u.count for u in units["heads"]), default=0), "channels": sum(u.count for u in units["channels"]),
            "modules": len(modules), "ranks": sum(map(ranks_of, ranks)),
        }  # fmt: skip
        for name, amount in self.amounts.items():
            if isinstance(amount, int) and 0 < sizes[name] <= amount:
                raise ValueError(f"{name}={amount} would take all of the {sizes[name]} that there are; at least one stays")
        stage = Estimation(self.root, [*units["heads"], *units["channels"]], modules, ranks)
        try:
            surgery.check(self.root, stage.all_but_one())
        except Unsupported as error:
            stage.close()
            raise Unsupported(f"LightPEFT needs adapters that follow their places: {error}") from None
        return stage

    def groups(self, groups: list[Group]) -> list[Group]:
        """A group for the factors, without weight decay; empty where they are gone."""
        mine = list(self.stage.masks.values()) if self.stage else [a.m for a in self._kept_masks()]
        others = {id(p) for p in (*mine, *self.lost)}
        groups = [group | {"params": [p for p in group["params"] if id(p) not in others]} for group in groups]
        for p in mine:
            p.requires_grad_(True)
        return [*groups, {"params": mine, "lr": groups[0]["lr"] * self.mask_rate, "weight_decay": 0.0}]

    def step_begin(self) -> None:
        """The cut, when the estimation is over."""
        if self.done is None and self.stage is None:
            raise Unsupported("units were cut out of this model before; trimtab.schedules.restoration.restore(model) first")
        if self.stage is not None:
            self.stage.observe(steps=self.step >= self.until // 2)
            for mask in self.stage.masks.values():
                mask.grad = None  # no parameter of the model, whose zero_grad() a loop may call in place of the optimizer's
            if self.step >= self.until:
                self._cut(self.stage)

    def extra_loss(self) -> Tensor | None:
        """``l1 * sum |factor|`` in stage 1."""
        if self.stage is None or not self.stage.masks or not self.l1:
            return None
        return self.l1 * torch.cat(list(self.stage.masks.values())).abs().sum()

    def backward_end(self) -> None:
        """Scores of the ranks."""
        if self.stage is not None and self.stage.observing:
            self.stage.scores.take()

    def step_end(self) -> None:
        """The step's ratios count."""
        super().step_end()
        if self.stage is not None:
            self.stage.ratios.take()

    def step_skipped(self) -> None:
        """The step's ratios do not count."""
        super().step_skipped()
        if self.stage is not None:
            self.stage.ratios.drop()

    def close(self) -> None:
        """Take the factors off, if the cut has not."""
        if self.stage is not None:
            self.stage.close()

    @property
    def deliverable(self) -> bool:
        """Not before the cut: the factors of stage 1 are no part of the adapter."""
        return self.stage is None

    # -- the cut

    def _cut(self, stage: Estimation) -> None:
        kept = self._units_left(stage)
        lost, ranks = self._adapters_left(stage)
        if stage.masks:
            stage.try_cut(kept)
        stage.close()
        masks = stage.masks
        self.stage = None
        surgery.cut(self.root, kept, originals=self.originals, optimizer=self.services.optimizer, resliced=self._tell)
        if self.masks == "keep":
            for path, (_, index) in ((p, of) for found in kept.values() for p, of in found.items()):
                masks[path].grad = None
                optim.reslice(self.services.optimizer, masks[path], 0, index)
            self._attach_masks(masks)
        else:
            optim.forget(self.services.optimizer, masks.values())
        self._thin_out(lost, ranks)
        self.done = {"kept": packed(kept), "lost": [list(key) for key in lost], "ranks": [[*key, r] for key, r in ranks.items()]}

    def _gone(self, what: str, n: int) -> int:
        """How many of ``n`` go."""
        return prune_count(self.amounts[what], n, official=self.official)

    def _units_left(self, stage: Estimation) -> Kept:
        """Which units stay, by the factors."""
        index: dict[str, Tensor] = {}
        pooled = []
        for u in stage.units:
            mask = stage.masks[u.reader].detach()
            if u.reader not in stage.reached or bool((mask == 1).all()):
                raise Unsupported(
                    f"no importance recorded: the factors of the {u.kind} that {u.reader} reads have not moved{_WHY}"
                )
            if u.kind == "heads":
                index[u.reader] = keep_best(mask, self._gone("heads", u.count))
            else:
                pooled.append(u)
        if pooled:
            gone = self._gone("channels", sum(u.count for u in pooled))
            left = keep_best_of_all([stage.masks[u.reader] for u in pooled], gone, align=self.align)
            index |= {u.reader: i for u, i in zip(pooled, left, strict=True)}
        return stage.kept(index)

    def _adapters_left(self, stage: Estimation) -> tuple[list[Key], dict[Key, Tensor]]:
        """Which modules go, and which ranks of the others stay."""
        lost: list[Adapter] = []
        if self.amounts["modules"]:
            means, found = stage.ratios.means(), stage.ratios.adapters
            if not bool((means > 0).any()):
                raise Unsupported(
                    f"no importance recorded: no adapted module changed anything in the estimation's second half{_WHY}"
                )
            stays = set(keep_best(means, self._gone("modules", len(found))).tolist())
            lost = [a for i, a in enumerate(found) if i not in stays]
        ranks: dict[Key, Tensor] = {}
        if self.amounts["ranks"]:
            scored = [(a, s) for a, s in zip(stage.scores.adapters, stage.scores.means(), strict=True) if a not in lost]
            flat = torch.cat([s for _, s in scored])
            if not bool((flat > 0).any()):
                raise Unsupported(
                    f"no importance recorded: all scores of ranks are 0 after the second half of the estimation{_WHY}"
                )
            stays_flat = torch.zeros(len(flat), dtype=torch.bool)
            stays_flat[keep_best(flat, self._gone("ranks", len(flat)))] = True
            for (a, _), mine in zip(scored, stays_flat.split([len(s) for _, s in scored]), strict=True):
                if mine.any():
                    ranks[self._key(a)] = mine.nonzero().flatten()
                else:
                    lost.append(a)
        return [self._key(a) for a in lost], ranks

    def _thin_out(self, lost: list[Key], ranks: Mapping[Key, Tensor]) -> None:
        """Take the modules ``lost`` off, and all ranks but ``ranks``; what is so already stays."""
        here = {self._key(a): a for a in self._adapters()}
        gone = [here[key] for key in lost if key in here]
        for name in dict.fromkeys(name for name, *_ in lost):
            remove_adapters(self.root, name, [here[key] for key in lost if key in here and key[0] == name])
        self.lost += [p for a in gone for p in a.parameters()]
        if self.services.optimizer is not None:
            optim.forget(self.services.optimizer, self.lost)
        for each in self.services.schedules:
            each.removed(gone)
        for key, index in ranks.items():
            if ranks_of(here[key]) != len(index):
                self.services.slice_rank(here[key], index)

    def _tell(self, parameter: nn.Parameter, dim: int, index: Tensor) -> None:
        for each in self.services.schedules:
            each.resliced(parameter, dim, index)

    # -- adapters

    def _adapters(self) -> list[Adapter]:
        return [a for group in state_of(self.root).groups.values() if group.trainable for a in group.adapters]

    def _key(self, adapter: Adapter) -> Key:
        name = next(name for name, group in state_of(self.root).groups.items() if adapter in group.adapters)
        return name, adapter.site.path, adapter.site.slot

    def _kept_masks(self) -> list[UnitMaskAdapter]:
        return [a for a in self._adapters() if isinstance(a, UnitMaskAdapter)]

    def _attach_masks(self, masks: Mapping[str, nn.Parameter]) -> None:
        """Make the factors a part of the first adapter that learns."""
        name = next(name for name, group in state_of(self.root).groups.items() if group.trainable)
        sizes: dict[int, list[str]] = {}
        for path, mask in masks.items():
            module = self.root.get_submodule(path)
            inputs = module.in_features if hasattr(module, "in_features") else module.nx
            sizes.setdefault(inputs // len(mask), []).append(path)
        for size, paths in sizes.items():
            places = lambda path, module, here=frozenset(paths): path in here  # noqa: E731
            attach(self.root, UnitMask(size=size), targets=places, name=name, rng=torch.Generator())
        for adapter in self._kept_masks():
            adapter.m = masks[adapter.site.path]

    # -- resuming

    def state_dict(self) -> dict[str, Any]:
        stage = None if self.stage is None else self.stage.state_dict()
        return super().state_dict() | {"until": self.until, "stage": stage, "done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a stored state: put the factors where they were, or make the cut again, adapters included.

        Raises:
            ValueError: it is of another run.
        """
        super().load_state_dict(state)
        if state["until"] != self.until:
            raise ValueError(f"the stored estimation takes {state['until']} steps, and this one {self.until}; resume with the same")
        if state["done"] is None:
            if self.stage is None:
                raise ValueError("the stored run has not cut the base yet, and this model's is cut; build the model anew")
            self.stage.load_state_dict(state["stage"])
            return
        self.done = state["done"]
        self.close()
        self.stage = None
        self.rebuild(self.root, state)
        if self.masks == "keep" and not self._kept_masks():
            left = unpacked(self.done["kept"])
            device = next(self.root.parameters()).device
            counts = {path: len(index) for found in left.values() for path, (_, index) in found.items()}
            # not learning until the optimizer has them, in groups
            self._attach_masks({p: nn.Parameter(torch.ones(n, device=device), requires_grad=False) for p, n in counts.items()})
        self._thin_out([tuple(key) for key in self.done["lost"]], {tuple(key): index for *key, index in self.done["ranks"]})

    def rebuild(self, model: nn.Module, state: dict[str, Any]) -> None:
        """Cut the base as it was cut."""
        root = unwrap(model)
        if state["done"] is not None and cut_of(root) is None:
            surgery.cut(root, unpacked(state["done"]["kept"]), originals=self.originals)
