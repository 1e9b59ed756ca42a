"""Averages of checkpoints: against sums of dense tensors, printed weights, and dense updates."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import trimtab as tt
from artifacts.pairs import adapter, move
from core.small_net import IDS, net
from trimtab.artifacts.average import checkpoints_of, mean
from trimtab.artifacts.average_weights import checkpoint_weights, effective_count
from trimtab.core.checkpoint import inspect, read_tensors

LOSSES = [0.8, 0.6, 0.5, 0.4]


def tensors(folder: Path) -> dict[str, Tensor]:
    return read_tensors(folder, inspect(folder))


def run_of(folder: Path, method: tt.MethodConfig | None = None, *, drift: float = 0.02, head: bool = False) -> Path:
    """A run's folder: four checkpoints of one adapter that drifts, with what was recorded of them."""
    model = net()
    tt.attach(model, method or tt.LoRA(rank=2), rng=torch.Generator().manual_seed(7))
    if head:
        tt.attach(model, tt.Unfreeze(), targets=["lm_head"])
    move(model, 0, 0.3)
    for i, loss in enumerate(LOSSES):
        move(model, i + 1, drift)
        step = 100 * (i + 1)
        tt.save(model, folder / "steps" / f"step-{step}")
        score = [0.5, 0.8, 0.7, 0.8][i]
        record = {"step": step, "loss": loss, "last_loss": loss + 0.1, "eval_loss": 1 - 0.1 * i, "eval_accuracy": score}
        (folder / "steps" / f"step-{step}" / "record.json").write_text(json.dumps(record))
    return folder


def test_the_printed_weights() -> None:
    close = lambda found, wanted: found == pytest.approx(wanted, abs=1e-6)  # noqa: E731
    assert close(checkpoint_weights(LOSSES, strength=0.0), [0.25] * 4)
    assert close(checkpoint_weights(LOSSES, strength=0.7), [0.190943, 0.233539, 0.265330, 0.310187])
    assert close(checkpoint_weights(LOSSES, strength=1.0), [0.168539, 0.224719, 0.269663, 0.337079])
    assert close(checkpoint_weights(LOSSES, strength=50.0)[-1], 0.999986)
    assert close(checkpoint_weights(LOSSES, scheme="softmax", strength=0.1), [0.012038, 0.088947, 0.241783, 0.657233])
    steps = [100, 200, 300, 400]
    assert close(checkpoint_weights(steps, by="step", strength=1.0), [0.1, 0.2, 0.3, 0.4])
    assert close(checkpoint_weights(steps, by="step", strength=1.05), [0.094994, 0.196687, 0.301073, 0.407246])
    assert effective_count(checkpoint_weights(LOSSES, strength=0.7)) == pytest.approx(3.8817, abs=1e-4)
    assert effective_count(checkpoint_weights(steps, by="step", strength=1.0)) == pytest.approx(3.3333, abs=1e-4)


def test_an_average_is_the_weighted_sum(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", head=True)
    result = tt.average(run, tmp_path / "out")
    weights = checkpoint_weights(LOSSES, strength=0.7)
    assert result.weights == weights and [folder.name for folder in result.used] == [f"step-{s}" for s in (100, 200, 300, 400)]
    each = [tensors(checkpoint.folder) for checkpoint in checkpoints_of(run)]
    for key, value in tensors(tmp_path / "out").items():
        want = sum(w * t[key].double() for w, t in zip(weights, each, strict=True))
        torch.testing.assert_close(value.double(), want, rtol=1e-6, atol=1e-7)
    assert any("lm_head" in key for key in each[0])
    model = net()
    tt.load(model, tmp_path / "out")
    assert torch.isfinite(model(IDS)).all()
    made = json.loads((tmp_path / "out" / "manifest.json").read_text())["made"]
    assert made["weights"] == weights and (made["scheme"], made["strength"]) == ("power", 0.7)
    assert "as many as 3.88" in str(result)


def test_equal_checkpoints_come_back_to_the_bit(tmp_path: Path) -> None:
    values = {"a": torch.randn(50, generator=torch.Generator().manual_seed(0)) * 1e3, "b": torch.tensor([0.1, 1 / 3]).bfloat16()}
    found = mean([values] * 10, [0.1] * 10)
    assert all(torch.equal(found[key], values[key]) and found[key].dtype == values[key].dtype for key in values)
    naive = sum(0.1 * values["a"] for _ in range(10))
    assert not torch.equal(naive, values["a"])  # what the incremental form avoids
    run = run_of(tmp_path / "run")
    tt.average([run / "steps" / "step-100"], tmp_path / "one")
    one, same = tensors(run / "steps" / "step-100"), tensors(tmp_path / "one")
    assert all(torch.equal(one[key], same[key]) for key in one)


def test_order_and_units_do_not_matter(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run")
    folders = [checkpoint.folder for checkpoint in checkpoints_of(run)]
    tt.average(folders, tmp_path / "a", values=LOSSES)
    tt.average(folders[::-1], tmp_path / "b", values=[100 * loss for loss in LOSSES[::-1]])
    a, b = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-6, atol=1e-7)
    assert tt.average(folders, tmp_path / "c", values=[0.3] * 4).weights == pytest.approx([0.25] * 4)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"last": 2}, (300, 400)), ({"last": 2, "stride": 2}, (200, 400)), ({"stride": 3}, (100, 400)),
        ({"best": 2}, (200, 400)), ({"best": 1}, (400,)), ({"best": 2, "metric": "eval_loss"}, (300, 400)),
        ({"last": 3, "best": 2}, (200, 400)),
    ],
)  # fmt: skip
def test_which_checkpoints_count(tmp_path: Path, options: dict, steps: tuple[int, ...]) -> None:
    result = tt.average(run_of(tmp_path / "run"), tmp_path / "out", scheme="uniform", **options)
    assert [int(folder.name[5:]) for folder in result.used] == list(steps)
    assert result.weights == [1 / len(steps)] * len(steps)


def test_what_is_recorded_can_count(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run")
    power = lambda values, by: pytest.approx(checkpoint_weights(values, by=by, strength=0.7))  # noqa: E731
    assert tt.average(run, tmp_path / "o", by="step").weights == power([100, 200, 300, 400], "step")
    assert tt.average(run, tmp_path / "o", by="score").weights == power([0.5, 0.8, 0.7, 0.8], "score")
    assert tt.average(run, tmp_path / "o", metric="last_loss").weights == power([0.9, 0.7, 0.6, 0.5], "loss")
    assert tt.average(run, tmp_path / "o", metric="eval_loss").weights == power([1, 0.9, 0.8, 0.7], "loss")


@pytest.mark.parametrize("drift", [0.3, 0.1, 0.03])
def test_the_gap_between_factors_and_updates_is_the_covariance(tmp_path: Path, drift: float) -> None:
    run = run_of(tmp_path / "run", drift=drift)
    result = tt.average(run, tmp_path / "out", scheme="uniform")
    each = [tensors(checkpoint.folder) for checkpoint in checkpoints_of(run)]
    off = size = identity = 0.0
    for key in (key[:-1] for key in each[0] if key.endswith(".b")):
        a, b = ([t[key + name].double() for t in each] for name in "ab")
        updates = sum(bi @ ai for bi, ai in zip(b, a, strict=True)) / 4
        A, B = sum(a) / 4, sum(b) / 4
        covariance = sum((bi - B) @ (ai - A) for bi, ai in zip(b, a, strict=True)) / 4
        identity = max(identity, float((updates - B @ A - covariance).abs().max()))
        off, size = off + float(covariance.square().sum()), size + float(updates.square().sum())
    assert identity < 1e-12
    assert result.gap == pytest.approx(math.sqrt(off / size), rel=1e-3)
    assert f"{result.gap:.2e}" in str(result)


def test_a_shared_factor_and_selections_leave_no_gap(tmp_path: Path) -> None:
    assert tt.average(run_of(tmp_path / "m", tt.MiSS(rank=4)), tmp_path / "a").gap < 1e-6
    assert tt.average(run_of(tmp_path / "n", tt.BitFit()), tmp_path / "b").gap == 0.0
    assert tt.average(run_of(tmp_path / "d", tt.DoRA(rank=2)), tmp_path / "c").gap is None
    with_base = tt.average(run_of(tmp_path / "d", tt.DoRA(rank=2)), tmp_path / "c", model=net())
    assert 0 < with_base.gap < 0.1


def test_rotated_factors_are_no_checkpoints_of_one_run(tmp_path: Path) -> None:
    """(B Q, Q^T A) is the same update: the average of its factors with (B, A) is not."""
    model = net()
    tt.attach(model, tt.LoRA(rank=2))
    move(model, 1, 0.3)
    tt.save(model, tmp_path / "a")
    Q = torch.linalg.qr(torch.randn(2, 2, generator=torch.Generator().manual_seed(0)))[0]
    with torch.no_grad():
        for one in model.__dict__["_trimtab_state"].groups["default"].adapters:
            one.b.copy_(one.b @ Q)
            one.a.copy_(Q.T @ one.a)
    tt.save(model, tmp_path / "b")
    with pytest.raises(tt.NotMergeable, match=r"drifted far apart .*space='update'"):
        tt.average([tmp_path / "a", tmp_path / "b"], tmp_path / "out", scheme="uniform")
    assert not (tmp_path / "out").exists()


def test_runs_of_other_seeds_are_refused_unless_their_average_is_exact(tmp_path: Path) -> None:
    one, two = (adapter(tmp_path / str(seed), seed=seed, moved=seed, size=0.01) for seed in (1, 2))
    with pytest.raises(tt.NotMergeable, match="different seeds"):
        tt.average([one, two], tmp_path / "out", scheme="uniform")
    linear = [adapter(tmp_path / f"m{seed}", tt.MiSS(rank=4), seed=seed, moved=seed) for seed in (1, 2)]
    tt.average(linear, tmp_path / "out", scheme="uniform")
    a, b, c = (tensors(folder) for folder in (*linear, tmp_path / "out"))
    torch.testing.assert_close(c, {key: (a[key] + b[key]) / 2 for key in a})


def test_updates_can_be_averaged_instead(tmp_path: Path) -> None:
    one, two = (adapter(tmp_path / str(seed), seed=seed, moved=seed) for seed in (1, 2))
    result = tt.average([one, two], tmp_path / "out", weights=[0.25, 0.75], space="update")
    models = [net(), net(), net()]
    for model, folder in zip(models, (one, two, tmp_path / "out"), strict=True):
        tt.load(model, folder, name="x")
    for layer in ("layers.0.attn.q_proj", "layers.1.down_proj"):
        W = net().get_submodule(layer).weight
        d = [tt.effective_weight(model, layer, name="x") - W for model in models]
        torch.testing.assert_close(d[2], 0.25 * d[0] + 0.75 * d[1], rtol=1e-4, atol=1e-6)
    assert result.gap > 0.3 and result.space == "update"


def test_the_best_setting_on_data_is_taken(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", drift=0.2)
    target = tensors(run / "steps" / "step-400")
    model = net()

    def score(m: torch.nn.Module) -> float:
        group = next(iter(m.__dict__["_trimtab_state"].groups.values()))
        live = {f"{a.site.path}.{a.site.slot}.{k}": v for a in group.adapters for k, v in a.state_dict().items()}
        return -sum(float((value - target[key]).square().sum()) for key, value in live.items())

    tried = {"scheme": ["uniform", "power"], "strength": [0.7, 5.0], "last": [None, 2]}
    result = tt.average(run, tmp_path / "out", model=model, score=score, **tried)
    assert len(result.trials) == 6  # uniform has no strength
    assert (result.setting["scheme"], result.setting["strength"], result.setting["last"]) == ("power", 5.0, 2)
    assert max(result.trials, key=lambda row: row["score"])["strength"] == 5.0
    assert "_trimtab_state" not in model.__dict__
    out = tensors(tmp_path / "out")
    used = [tensors(folder) for folder in result.used]
    want = mean(used, result.weights)
    assert all(torch.equal(out[key], want[key]) for key in out)


def test_bad_input_is_refused_in_sentences(tmp_path: Path) -> None:
    run, out = run_of(tmp_path / "run"), tmp_path / "out"
    folders = [checkpoint.folder for checkpoint in checkpoints_of(run)]
    with pytest.raises(tt.NoMatch, match="keep_adapters=10"):
        tt.average(tmp_path, out)
    with pytest.raises(tt.NoMatch, match="no checkpoint"):
        tt.average([], out)
    with pytest.raises(tt.CheckpointMismatch, match="given twice"):
        tt.average([folders[0], folders[0]], out)
    with pytest.raises(tt.NoMatch, match="no eval_f1 recorded .*eval_accuracy"):
        tt.average(run, out, metric="eval_f1")
    for values in ([0.1, 0.2, 0.0, 0.3], [0.1, math.nan, 1, 1], [0.1, math.inf, 1, 1]):
        with pytest.raises(tt.Unsupported, match="must be finite"):
            tt.average(run, out, values=values)
    with pytest.raises(tt.Unsupported, match="out of range"):
        tt.average(run, out, strength=-1)
    with pytest.raises(tt.Unsupported, match="scheme must be one of"):
        tt.average(run, out, scheme="magic")
    with pytest.raises(tt.ShapeMismatch, match="3 values for 4 checkpoints"):
        tt.average(run, out, values=[1, 2, 3])
    with pytest.raises(tt.ShapeMismatch, match="do not sum to 1"):
        tt.average(run, out, weights=[0.5, 0.5, 0.5, 0.5])
    with pytest.raises(tt.Unsupported, match="several settings"):
        tt.average(run, out, strength=[0.1, 0.2])
    with pytest.raises(tt.Unsupported, match="space must be"):
        tt.average(run, out, space="deltas")
    other = adapter(tmp_path / "rank", tt.LoRA(rank=3))
    with pytest.raises(tt.ShapeMismatch, match=r"problems:(.|\n)*\[3, 16\]"):
        tt.average([folders[0], other], out, scheme="uniform")
    scaled = adapter(tmp_path / "scale", tt.LoRA(rank=2, alpha=1.0))
    with pytest.raises(tt.CheckpointMismatch, match="other places, methods or hyperparameters"):
        tt.average([folders[0], scaled], out, scheme="uniform")
    assert not out.exists()
