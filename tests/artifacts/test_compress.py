"""What compressing keeps: against the definition on dense vectors, printed numbers, and every method's true start."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import trimtab as tt
from artifacts.pairs import adapter, move, write_pair
from contract.contract_cases import Case, cases
from core.small_net import IDS, net
from trimtab.artifacts.packed import Packed
from trimtab.core.checkpoint import inspect, read_tensors

TAU = torch.tensor([0.9, -0.1, 0.05, -0.7, 0.3, 0, -0.2, 0.6, -0.4, 0.15])


def dense(tau: Tensor, k: float, alpha: float | None) -> Tensor:
    """The definition, on one vector: the floor(k d) first of a stable sort by magnitude."""
    kept = torch.zeros_like(tau)
    kept[torch.sort(tau.abs(), descending=True, stable=True).indices[: math.floor(k * len(tau) + 1e-9)]] = 1
    s = tau.sign() * kept
    scale = tau.abs()[s != 0].mean() if alpha is None else alpha * tau.std()
    return scale * s


def through(folder: Path, tau: Tensor, **options: object) -> Tensor:
    """``tau`` compressed as the difference to zeros, and expanded."""
    tuned, base = write_pair(folder, {"w": tau})
    tt.compress(tuned, folder / "c.tern", reference=base, **options)
    return load_file(tt.expand(folder / "c.tern", folder / "out", reference=base) / "base.safetensors")["w"]


def test_ten_entries_by_hand(tmp_path: Path) -> None:
    restored = through(tmp_path / "a", TAU, density=0.3, alpha=2)
    assert float(TAU.std()) == pytest.approx(0.4653553, abs=1e-7)
    assert restored.sign().tolist() == [1, 0, 0, -1, 0, 0, 0, 1, 0, 0]
    assert restored.abs().max().item() == pytest.approx(0.9307106, abs=1e-6)
    # what the authors' code keeps at k = 30: one entry more; and the scale of least error of those four
    restored = through(tmp_path / "b", TAU, density="40%")
    assert restored.nonzero()[:, 0].tolist() == [0, 3, 7, 8]
    assert restored.abs().max().item() == pytest.approx(0.65, abs=1e-7)


@pytest.mark.parametrize("k", [0.01, 0.05, 0.29, 0.5, 1.0])
@pytest.mark.parametrize("alpha", [None, 1.5])
def test_exactly_floor_kd_entries_and_two_values(tmp_path: Path, k: float, alpha: float | None) -> None:
    tau = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    restored = through(tmp_path, tau, density=k, alpha=alpha)
    assert torch.count_nonzero(restored) == math.floor(k * 1000 + 1e-9)
    assert len(restored.abs().unique()) == (2 if k < 1 else 1)
    torch.testing.assert_close(restored, dense(tau, k, alpha))


def test_ties_go_to_the_lowest_place_and_zeros_stay(tmp_path: Path) -> None:
    tau = torch.tensor([0.5, -0.5, 0.5, 1.0, -0.5, 0.0, 0.0, 0.5])
    assert through(tmp_path / "a", tau, density=0.5).nonzero()[:, 0].tolist() == [0, 1, 2, 3]
    assert torch.count_nonzero(through(tmp_path / "b", tau, density=1.0)) == 6  # a kept zero stays 0


def test_symmetries(tmp_path: Path) -> None:
    tau = torch.randn(200, generator=torch.Generator().manual_seed(1))
    once = through(tmp_path / "a", tau, density=0.2, alpha=1.0)
    assert torch.equal(through(tmp_path / "b", -tau, density=0.2, alpha=1.0), -once)
    torch.testing.assert_close(through(tmp_path / "c", 4 * tau, density=0.2, alpha=1.0), 4 * once)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(through(tmp_path / "d", tau[order], density=0.2, alpha=1.0), once[order])
    again = through(tmp_path / "e", once, density=0.2, alpha=1.0)
    assert torch.equal(again.sign(), once.sign())


@pytest.mark.parametrize(
    ("k", "alpha", "error", "cosine"),
    [(0.05, 2.3378, 0.7267, 0.5227), (0.1, 2.0627, 0.5745, 0.6523), (0.2, 1.7550, 0.3840, 0.7849), (0.5, 1.2711, 0.1921, 0.8988)],
)
def test_the_scale_of_least_error_on_gaussian_entries(tmp_path: Path, k: float, alpha: float, error: float, cosine: float) -> None:
    tau = torch.randn(1_000_000, generator=torch.Generator().manual_seed(3))
    tuned, base = write_pair(tmp_path, {"w": tau})
    report = tt.compress(tuned, tmp_path / "c.tern", density=k, reference=base)
    scale = Packed(report.path).entries[0].scale
    assert scale / tau.std() == pytest.approx(alpha, rel=3e-3)
    assert report.error == pytest.approx(error, abs=3e-3)
    assert math.sqrt(1 - report.error) == pytest.approx(cosine, abs=3e-3)
    worse = [tt.compress(tuned, tmp_path / "d.tern", density=k, alpha=a * alpha, reference=base).error for a in (0.95, 1.05)]
    assert report.error < min(worse)


def _starts(case: Case) -> dict[str, Tensor]:
    """The tensors that an attach with the case's seed starts from."""
    model = case.model()
    case.attach(model, moved=False)
    state = model.__dict__["_trimtab_state"].groups["default"].adapters
    return {f"{a.site.path}.{a.site.slot}.{key}": v.detach().clone() for a in state for key, v in a.state_dict().items()}


LINEAR = [p for p in cases() if p.values[0].kind.name in ("linear", "fused part")]


@pytest.mark.parametrize("case", LINEAR)
def test_every_method_is_counted_from_its_true_start(case: Case, tmp_path: Path) -> None:
    model = case.model()
    case.attach(model)
    tt.save(model, tmp_path / "a", name="default")
    aliases = inspect(tmp_path / "a")["aliases"]
    learns = {key for key, _ in tt.named_parameters(model, "default")} - set(aliases)
    tt.compress(tmp_path / "a", tmp_path / "c.tern", density=0.5, model=case.model())
    fresh = case.model()
    case.attach(fresh)  # and with it what the method may need beside it
    tt.detach(fresh, "default")
    tt.load(fresh, tmp_path / "c.tern", name="default")
    values = read_tensors(tmp_path / "a", inspect(tmp_path / "a"))
    starts = _starts(case) if not case.adapter.wants(case.config) else {}
    for adapter_ in model.__dict__["_trimtab_state"].groups["default"].adapters:  # what a method measured, it keeps
        starts |= {f"{adapter_.site.path}.{adapter_.site.slot}.{k}": v for k, v in adapter_.starts().items()}
    entries = {e.key: e for e in Packed(tmp_path / "c.tern").entries}
    keys = sorted(key for key in values if key in learns)
    assert {key for key, e in entries.items() if e.store == "ternary"} == set(keys)
    tau = torch.cat([(values[key] - starts.get(key, torch.zeros_like(values[key]))).float().flatten() for key in keys])
    expected = dense(tau, 0.5, None).split([values[key].numel() for key in keys])
    got = dict(zip(keys, expected, strict=True))
    for adapter_ in fresh.__dict__["_trimtab_state"].groups["default"].adapters:
        for name, value in adapter_.state_dict().items():
            key = f"{adapter_.site.path}.{adapter_.site.slot}.{name}"
            key = aliases.get(key, key)
            if key in got:
                want = starts.get(key, torch.zeros_like(values[key])) + got[key].view_as(value).to(value.dtype)
                torch.testing.assert_close(value, want, rtol=1e-5, atol=1e-6)
            else:
                assert torch.equal(value, values[key])  # buffers and integers come back to the bit


def test_expanding_is_loading(tmp_path: Path) -> None:
    adapter(tmp_path / "a")
    tt.compress(tmp_path / "a", tmp_path / "c.tern", density=0.2)
    folder = tt.expand(tmp_path / "c.tern", tmp_path / "b")
    one, two = net(), net()
    tt.load(one, tmp_path / "c.tern")
    tt.load(two, folder)
    assert torch.equal(one(IDS), two(IDS)) and not torch.equal(one(IDS), net()(IDS))
    assert inspect(folder)["places"] == inspect(tmp_path / "a")["places"]
    with pytest.raises(tt.CheckpointMismatch, match="another base"):
        tt.load(net(seed=1), tmp_path / "c.tern")


def test_references(tmp_path: Path) -> None:
    """From its seed, A of an untouched LoRA costs nothing; from zero it is what the ranking is about; from a folder, both."""
    model = net()
    tt.attach(model, tt.LoRA(rank=2), rng=torch.Generator().manual_seed(3))
    tt.save(model, tmp_path / "start")
    with torch.no_grad():
        for key, value in tt.named_parameters(model):
            if key.endswith(".b"):
                value.normal_(generator=torch.Generator().manual_seed(len(key)))
    tt.save(model, tmp_path / "a")
    auto = tt.compress(tmp_path / "a", tmp_path / "auto.tern")
    zero = tt.compress(tmp_path / "a", tmp_path / "zero.tern", reference="zero")
    other = tt.compress(tmp_path / "a", tmp_path / "other.tern", reference=tmp_path / "start")
    assert auto.entries == other.entries == sum(v.numel() for k, v in tt.named_parameters(model) if k.endswith(".b"))
    assert zero.entries > auto.entries
    stores = {e.key.rpartition(".")[2]: e.store for e in Packed(auto.path).entries}
    assert stores == {"a": "start", "b": "ternary"}
    with pytest.raises(tt.Unsupported, match="reference="):
        tt.expand(other.path, tmp_path / "x")
    same = [tt.expand(auto.path, tmp_path / "x"), tt.expand(other.path, tmp_path / "y", reference=tmp_path / "start")]
    a, b = (read_tensors(folder, inspect(folder)) for folder in same)
    assert all(torch.equal(a[key], b[key]) for key in a)
    adapter(tmp_path / "elsewhere", seed=9)
    with pytest.raises(tt.CheckpointMismatch, match="another adapter"):
        tt.expand(other.path, tmp_path / "z", reference=tmp_path / "elsewhere")


def test_other_starts_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter(tmp_path / "a")
    tt.compress(tmp_path / "a", tmp_path / "c.tern")
    from trimtab.artifacts import starts

    monkeypatch.setattr(starts.torch, "Generator", lambda: _Shifted())
    with pytest.raises(tt.CheckpointMismatch, match="other starts"):
        tt.expand(tmp_path / "c.tern", tmp_path / "b")


class _Shifted(torch.Generator):
    """A generator whose numbers are another version's."""

    def manual_seed(self, seed: int) -> torch.Generator:
        return super().manual_seed(seed + 1)


def test_heads_that_learn_whole_stay_as_they_are(tmp_path: Path) -> None:
    model = net()
    tt.attach(model, tt.LoRA(rank=2))
    tt.attach(model, tt.Unfreeze(), targets=["lm_head"])
    move(model, 5)
    tt.save(model, tmp_path / "a")
    head = read_tensors(tmp_path / "a", inspect(tmp_path / "a"))["lm_head.weight.value"]
    for base in (None, net()):
        tt.compress(tmp_path / "a", tmp_path / "c.tern", density=0.1, model=base)
        folder = tt.expand(tmp_path / "c.tern", tmp_path / "b")
        assert torch.equal(read_tensors(folder, inspect(folder))["lm_head.weight.value"], head)
    sizes = {}
    for rest in ("raw", "bfloat16", "float16", "int8"):
        sizes[rest] = tt.compress(tmp_path / "a", tmp_path / "c.tern", density=0.1, rest=rest).plain_bytes
        folder = tt.expand(tmp_path / "c.tern", tmp_path / "b")
        error = (read_tensors(folder, inspect(folder))["lm_head.weight.value"] - head).abs().max() / head.abs().max()
        assert error <= {"raw": 0, "bfloat16": 2**-8, "float16": 2**-11, "int8": 0.5 / 127 + 1e-6}[rest]
    assert sizes["int8"] < sizes["bfloat16"] == sizes["float16"] < sizes["raw"]


def test_gains_start_at_one_and_zero_factors_change_nothing(tmp_path: Path) -> None:
    model = net()
    tt.attach(model, tt.IA3(), targets="attn.k | attn.v")
    with torch.no_grad():
        next(iter(tt.parameters(model)))[:3] = torch.tensor([1.5, 0.2, 1.1])
    tt.save(model, tmp_path / "a")
    tt.compress(tmp_path / "a", tmp_path / "c.tern", density=1 / 16)
    fresh = net()
    tt.load(fresh, tmp_path / "c.tern")
    gains = [a.l for a in fresh.__dict__["_trimtab_state"].groups["default"].adapters]
    assert all(torch.equal(gain[3:], torch.ones(13)) for gain in gains) and gains[0][1] < 1
    adapter(tmp_path / "l", tt.LoRA(rank=1))
    tt.compress(tmp_path / "l", tmp_path / "l.tern", density=0.02, reference="zero")
    lora = net()
    tt.load(lora, tmp_path / "l.tern")
    untouched = [
        a for a in lora.__dict__["_trimtab_state"].groups["default"].adapters if not a.a.any() or not a.b.any()
    ]
    assert untouched
    for a in untouched:
        W = tt.effective_weight(lora, a.site.path, name="default")
        assert torch.equal(W, net().get_submodule(a.site.path).weight)


@pytest.mark.parametrize("scope", ["global", "tensor", "factor"])
def test_scopes_rank_and_scale_their_own_groups(tmp_path: Path, scope: str) -> None:
    adapter(tmp_path / "a", tt.LoRA(rank=2))
    tt.compress(tmp_path / "a", tmp_path / "c.tern", density=0.25, alpha=1.0, scope=scope, reference="zero")
    values = read_tensors(tmp_path / "a", inspect(tmp_path / "a"))
    folder = tt.expand(tmp_path / "c.tern", tmp_path / "b")
    restored = read_tensors(folder, inspect(folder))
    group = {"global": lambda key: "", "tensor": lambda key: key, "factor": lambda key: key[-1]}[scope]
    for name in {group(key) for key in values}:
        keys = sorted(key for key in values if group(key) == name)
        flat, found = (torch.cat([t[key].flatten() for key in keys]) for t in (values, restored))
        torch.testing.assert_close(found, dense(flat, 0.25, 1.0))


def test_checkpoints_keep_what_is_no_float_and_cost_nothing_where_equal(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    base = {"a": torch.randn(6, 8, generator=rng).bfloat16(), "same": torch.randn(5, generator=rng), "ids": torch.arange(4)}
    moved = (base["a"].float() + 0.1 * torch.randn(6, 8, generator=rng)).bfloat16()
    tuned = {"a": moved, "same": base["same"], "ids": torch.arange(1, 5)}
    one, two = write_pair(tmp_path / "p", tuned, base)
    tt.compress(one, tmp_path / "c.tern", density=0.5, reference=two)
    out = load_file(tt.expand(tmp_path / "c.tern", tmp_path / "o", reference=two) / "base.safetensors")
    assert torch.equal(out["same"], base["same"]) and torch.equal(out["ids"], tuned["ids"]) and out["a"].dtype == torch.bfloat16
    tau = tuned["a"].float() - base["a"].float()
    assert torch.equal(out["a"], (base["a"].float() + dense(tau.flatten(), 0.5, None).view(6, 8)).bfloat16())
    with pytest.raises(tt.Unsupported, match="exists already"):
        tt.expand(tmp_path / "c.tern", tmp_path / "o", reference=two)
    other, _ = write_pair(tmp_path / "q", {**base, "same": base["same"] + 1})
    with pytest.raises(tt.CheckpointMismatch, match="another checkpoint"):
        tt.expand(tmp_path / "c.tern", tmp_path / "r", reference=other)


def test_bad_input_is_refused_in_sentences(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a")
    out = tmp_path / "c.tern"
    for density in (0, -0.1, 20, 1.5, "x", "120%", float("nan")):
        with pytest.raises(tt.ShapeMismatch, match="at most 1"):
            tt.compress(folder, out, density=density)
    for alpha in (0, -1, math.inf):
        with pytest.raises(tt.ShapeMismatch, match="alpha must be above 0"):
            tt.compress(folder, out, alpha=alpha)
    for options in ({"scope": "layer"}, {"coding": "zip"}, {"rest": "int3"}):
        with pytest.raises(tt.Unsupported, match="must be one of"):
            tt.compress(folder, out, **options)
    with pytest.raises(tt.ShapeMismatch, match="keeps none of the 896 entries"):
        tt.compress(folder, out, density=0.001)
    with pytest.raises(tt.NoMatch, match="matches no tensor"):
        tt.compress(folder, out, keep=["classifier"])
    with pytest.raises(tt.Unsupported, match="several densities"):
        tt.compress(folder, out, density=[0.1, 0.2])
    model = net()
    tt.attach(model, tt.MiSS(rank=4))
    tt.save(model, tmp_path / "untrained")
    with pytest.raises(tt.CheckpointMismatch, match="nothing to make ternary"):
        tt.compress(tmp_path / "untrained", out)
    tt.attach(model, tt.DoRA(rank=2), name="d")
    move(model, 1, name="d")
    tt.save(model, tmp_path / "d", name="d")
    with pytest.raises(tt.Unsupported, match="DoRA.*model="):
        tt.compress(tmp_path / "d", out)
    tuned, base = write_pair(tmp_path / "p", {"w": torch.tensor([1.0, math.nan])})
    with pytest.raises(tt.CheckpointMismatch, match="w holds NaN"):
        tt.compress(tuned, out, reference=base)
    _, other = write_pair(tmp_path / "q", {"w": torch.zeros(3), "v": torch.zeros(1)})
    with pytest.raises(tt.CheckpointMismatch, match=r"2 problems:(.|\n)*v is in(.|\n)*w is \(2,\)"):
        tt.compress(tuned, out, reference=other)
    assert not out.exists() and not list(tmp_path.glob(".*part"))


def test_updates_add_and_multiply_packed(tmp_path: Path) -> None:
    from trimtab.artifacts.packed_updates import read_update

    files, values = [], []
    for seed in (1, 2, 3):
        adapter(tmp_path / f"a{seed}", moved=seed)
        scope = "factor" if seed == 3 else "global"
        report = tt.compress(tmp_path / f"a{seed}", tmp_path / f"{seed}.tern", density=0.4, scope=scope)
        files.append(report.path)
        start = {e.key: e for e in Packed(report.path).entries}
        folder = tt.expand(report.path, tmp_path / f"b{seed}")
        model = net()
        tt.attach(model, tt.LoRA(rank=2), rng=torch.Generator().manual_seed(3))
        tt.save(model, tmp_path / "start")
        zero = read_tensors(tmp_path / "start", inspect(tmp_path / "start"))
        values.append({key: (v - zero[key]).double().numpy() for key, v in read_tensors(folder, inspect(folder)).items()})
        assert set(values[-1]) == set(start)
    x, y, z = map(read_update, files)
    total = x + 0.5 * y - z
    flat = lambda v: np.concatenate([v[key].ravel() for key in sorted(v)])  # noqa: E731
    a, b, c = map(flat, values)
    np.testing.assert_allclose(flat({key: total.values(key) for key in total.shapes}), a + 0.5 * b - c, atol=1e-6)
    assert x.dot(y) == pytest.approx(a @ b, rel=1e-5) and total.norm() == pytest.approx(np.linalg.norm(a + 0.5 * b - c), rel=1e-5)
    assert x.cosine(y) == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-5)
    votes = np.sign(np.sign(a) + np.sign(b) - np.sign(c))
    signs = flat({key: v.unpack() for key, v in total.majority().items()})
    close = np.abs(np.sign(np.round(a, 6)) - np.sign(a)) == 0  # entries whose start swallowed nothing
    assert np.array_equal(signs[close], votes[close])
    assert total.nbytes == 3 * x.nbytes
