"""The builder of tiny models: it builds most of transformers, and the same model each time."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
from sweep.tiny_models import Built, NotBuilt, build, main_output, model_types, run

#: model types that are built of 632 with transformers 5.23
LEAST = 460


@pytest.mark.parametrize("model_type", ["bert", "llama", "t5", "whisper", "llava", "deepseek_v3", "jamba"])
def test_a_model_is_built_tiny_and_alike_each_time(model_type: str) -> None:
    one, two = build(model_type), build(model_type)
    assert isinstance(one, Built)
    assert sum(p.numel() for p in one.model.parameters()) < 1_000_000
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))
    assert all(torch.equal(one.inputs[name], two.inputs[name]) for name in one.inputs)
    with torch.no_grad():
        first, again = main_output(run(one.model, one.inputs)), main_output(run(two.model, two.inputs))
    assert first[0].shape[0] == 2
    assert torch.equal(first[0], again[0])


def test_what_is_not_built_says_why() -> None:
    missing = build("llama", "NoSuchClassOfTransformers")
    assert isinstance(missing, NotBuilt)
    assert "NoSuchClassOfTransformers" in missing.reason


@pytest.mark.slow
def test_most_model_types_are_built() -> None:
    missing = [found for name in model_types() if isinstance(found := build(name), NotBuilt)]
    assert len(model_types()) - len(missing) >= LEAST, [(m.model_type, m.reason) for m in missing]
