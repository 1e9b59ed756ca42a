"""Fixtures of the core's tests."""

from __future__ import annotations

import pytest
from small_net import net, shake

import trimtab as tt


@pytest.fixture
def saved(tmp_path):
    model = net()
    tt.attach(model, tt.LoRA(rank=2))
    shake(model)
    tt.save(model, tmp_path / "a")
    return tmp_path / "a"
