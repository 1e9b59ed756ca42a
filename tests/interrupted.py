"""A training run that is cut off in a given step, as by a kill."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from trimtab.training.trainer import AdapterTrainer


class Interrupted(BaseException):
    """Stands for a kill: nothing in trimtab catches it."""


@contextmanager
def interrupted_in(step: int) -> Iterator[None]:
    """Inside, a run ends in ``step`` (optimizer steps, 0-based) with ``Interrupted``; the block fails if none does."""
    original = AdapterTrainer.training_step

    def training_step(self: AdapterTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step:
            raise Interrupted
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(AdapterTrainer, "training_step", training_step)
        yield
