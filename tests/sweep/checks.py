"""What a method must do on a model, whatever the model is: start, learn, merge, be saved and loaded. One verdict a check.

A verdict is ``ok``, ``refused: <sentence>`` (an error of ours), ``crash: <error>`` (any other error) or ``WRONG: <what>`` (no
error, and yet not what was promised). A note behind ``ok`` is in brackets.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import trimtab as tt
from sweep.tiny_models import Built, _limit, main_output, run, tensors

__all__ = ["CHECKS", "METHODS", "Verdicts", "examine", "peft_trains", "trains_itself"]

CHECKS = ("start", "gradient", "steps", "moved", "merge", "saved")
METHODS = {
    "LoRA": tt.LoRA(), "ParallelAdapter": tt.ParallelAdapter(), "PrefixTuning": tt.PrefixTuning(tokens=3),
    "PromptTuning": tt.PromptTuning(tokens=3),
}  # fmt: skip
SECONDS = 90
#: of the outputs' range: what rounding may move
CLOSE = 2e-3


@dataclass
class Verdicts:
    """The verdicts on one method and one model, by check."""

    found: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def check(self, name: str) -> Iterator[None]:
        """Run a check; what it raises becomes its verdict."""
        try:
            yield
        except Wrong as error:
            self.found[name] = f"WRONG: {error}"
        except tt.TrimtabError as error:
            self.found[name] = f"refused: {_line(error)}"
        except Exception as error:
            self.found[name] = f"crash: {type(error).__name__}: {_line(error)}"
        else:
            self.found.setdefault(name, "ok")

    def good(self, name: str) -> bool:
        """Whether a check was passed."""
        return self.found.get(name, "").startswith("ok")


class Wrong(Exception):
    """No error came, and the result is not what was promised."""


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _outputs(model: nn.Module, built: Built) -> list[Tensor]:
    with torch.no_grad():
        return [t.clone() for t in tensors(run(model.eval(), built.inputs))]


def _gap(one: list[Tensor], two: list[Tensor]) -> float:
    """The largest difference over the range of the tensor that it is in; infinite where shapes differ."""
    if [t.shape for t in one] != [t.shape for t in two]:
        return float("inf")
    found = 0.0
    for a, b in zip(one, two, strict=True):
        a, b = a.double().nan_to_num(0, 0, 0), b.double().nan_to_num(0, 0, 0)
        found = max(found, ((a - b).abs().max() / a.abs().max().clamp_min(1e-3)).item())
    return found


def _wanted(gap: float, what: str, built: Built) -> None:
    if built.deterministic and gap > CLOSE:
        raise Wrong(f"{what}: off by {gap:.1e} of the range")


def _shake(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in tt.parameters(model):
            p.add_(torch.randn(p.shape, generator=generator) * 0.05)


def examine(built: Built, method: tt.MethodConfig) -> dict[str, str]:
    """The verdicts of all checks; those that a failed one makes meaningless are left out."""
    verdicts = Verdicts()
    model = built.copy()
    base = _outputs(model, built)
    with _limit(SECONDS), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with verdicts.check("start"):
            tt.attach(model, method, head=False, rng=torch.Generator().manual_seed(0))
            at_start = _outputs(model, built)
            if type(method).adapter_class.identity(method):
                _wanted(_gap(base, at_start), "the adapted model does not start at the base", built)
            elif [t.shape for t in at_start[:1]] != [t.shape for t in base[:1]]:
                raise Wrong(f"an output of {tuple(at_start[0].shape)} in place of {tuple(base[0].shape)}")
        if not verdicts.good("start"):
            return verdicts.found
        _train(model, built, verdicts)
        with verdicts.check("moved"):
            _shake(model)
            moved = _outputs(model, built)
            if built.deterministic and _gap(base, moved) == 0:
                raise Wrong("an adapter that has moved changes nothing")
        if verdicts.good("moved"):
            _keep(model, built, base, moved, verdicts)
    return verdicts.found


def _train(model: nn.Module, built: Built, verdicts: Verdicts) -> None:
    """Two steps with the check of gradients: on what a user would put a loss on, or else on all that the model gives."""
    start = copy.deepcopy(model.state_dict())
    for loss, note in ((_main_loss, "ok"), (_whole_loss, "ok (with a loss on all outputs)")):
        trial = Verdicts()
        model.load_state_dict(start)
        for p in model.parameters():
            p.grad = None
        optimizer = torch.optim.SGD(tt.parameters(model), lr=1e-3)
        for name in ("gradient", "steps"):
            with trial.check(name):
                _step(model, built, optimizer, loss)
                trial.found[name] = note
        if trial.good("steps") or not trial.found["gradient"].startswith("refused: at the first optimizer step"):
            break
    verdicts.found |= trial.found


def _main_loss(output: Any) -> Tensor:
    return sum(t.float().square().mean() for t in main_output(output))


def _whole_loss(output: Any) -> Tensor:
    return sum(t.float().square().mean() for t in tensors(output) if t.requires_grad)


def _step(model: nn.Module, built: Built, optimizer: torch.optim.Optimizer, loss: Callable[[Any], Tensor]) -> None:
    value = loss(run(_mode(model, built), built.inputs))
    if not isinstance(value, Tensor) or not value.requires_grad:
        raise Wrong("nothing of what is adapted reaches the output")
    optimizer.zero_grad()
    value.backward()
    optimizer.step()


def _mode(model: nn.Module, built: Built) -> nn.Module:
    """Training mode, if the base runs in it on these inputs (some want labels, or longer ones)."""
    if not hasattr(built, "_trains"):
        try:
            with torch.no_grad():
                run(built.copy().train(), built.inputs)
            object.__setattr__(built, "_trains", True)
        except Exception:  # the base's own refusal: it is trained in the mode in which it was built
            object.__setattr__(built, "_trains", False)
    model.train(built._trains)
    for module in model.modules():
        if getattr(module, "track_running_stats", False):
            module.eval()  # running statistics are the base's: they stay as they are
    return model


def _keep(model: nn.Module, built: Built, base: list[Tensor], moved: list[Tensor], verdicts: Verdicts) -> None:
    """What a saved, and what a merged adapter gives."""
    with verdicts.check("saved"), tempfile.TemporaryDirectory() as folder:
        tt.save(model, folder)
        fresh = built.copy()
        tt.load(fresh, folder)
        _wanted(_gap(moved, _outputs(fresh, built)), "a loaded adapter is another", built)
    with verdicts.check("merge"):
        try:
            tt.merge(model, "default", untie=True)
        except tt.NotMergeable as error:
            verdicts.found["merge"] = f"ok (has no weight form: {_line(error)[:80]})"
            return
        _wanted(_gap(moved, _outputs(model, built)), "the merged model is another", built)
        tt.unmerge(model, "default")
        tt.detach(model, "default")
        if _gap(base, _outputs(model, built)) > 0 and built.deterministic:
            raise Wrong("the base has not come back")


def trains_itself(built: Built) -> str:
    """Whether the base without adapters can be trained on the inputs at all."""
    verdicts = Verdicts()
    with verdicts.check("base"), _limit(SECONDS):
        model = _mode(built.copy(), built)
        for p in model.parameters():
            p.requires_grad_(p.is_floating_point())
        _main_loss(run(model, built.inputs)).backward()
    return verdicts.found["base"]


def peft_trains(built: Built) -> str:
    """peft's LoRA on all linear layers: two steps."""
    import peft

    verdicts = Verdicts()
    with verdicts.check("peft"), _limit(SECONDS), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(built.copy(), peft.LoraConfig(r=8, target_modules="all-linear"))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(2):
            inner = model.base_model.model
            loss = _main_loss(run(_mode(inner, built), built.inputs))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return verdicts.found["peft"]
