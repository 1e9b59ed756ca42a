"""Adapters merged into one, against dense sums and exact SVDs."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from saved_adapters import X, adapter, dense_sum, merged_update, net

import trimtab as tt
from trimtab.artifacts.rules import rule_entry

Q, DOWN = "layers.0.attn.q_proj", "layers.1.down_proj"


@pytest.fixture
def three(tmp_path):
    """Different ranks and scales, PiSSA among them, a place that one of them lacks."""
    return [
        adapter(tmp_path / "a", tt.LoRA(rank=2, alpha=3.0), 1),
        adapter(tmp_path / "b", tt.RsLoRA(rank=3), 2, "attn.q | mlp"),
        adapter(tmp_path / "c", tt.PiSSA(rank=2), 3, "attn.q"),
    ]


def close(mine, other, tolerance=1e-6) -> None:
    assert (mine - other).norm() <= tolerance * other.norm().clamp_min(1e-12), ((mine - other).norm() / other.norm()).item()


@pytest.mark.parametrize("factors", [[0.5, 0.3, 0.2], [1.0, -1.0, 2.5], [0.0, 1.0, 0.0], None])
def test_a_sum_is_exact_for_any_ranks_and_signs(three, factors, tmp_path) -> None:
    report = tt.combine(three, tmp_path / "m", weights=factors)
    given = factors or [1 / 3] * 3
    for path in (Q, DOWN, "layers.0.up_proj"):
        close(merged_update(tmp_path / "m", path), dense_sum(three, given, path))
    ranks = {row["path"]: row["rank"] for row in report}
    assert (ranks[Q], ranks[DOWN], ranks["layers.0.up_proj"]) == (9, 5, 3)
    assert max(report.column("error")) < 1e-6 and set(report.column("cut")) == {0.0}
    made = json.loads((tmp_path / "m" / "manifest.json").read_text())["made"]
    assert made["weights"] == given and set(made["errors"]) == set(report.column("path"))


@pytest.mark.parametrize("rank", [1, 3, 5, 16])
def test_at_a_rank_it_is_the_best_one(three, rank, tmp_path) -> None:
    factors = [0.7, 0.5, -0.4]
    report = tt.combine(three, tmp_path / "m", weights=factors, rank=rank)
    for row in report:
        exact = dense_sum(three, factors, row["path"])
        u, s, vh = torch.linalg.svd(exact, full_matrices=False)
        close(merged_update(tmp_path / "m", row["path"]), (u[:, :rank] * s[:rank]) @ vh[:rank], 1e-5)
        assert row["error"] == pytest.approx((s[rank:].norm() / s.norm()).item(), abs=2e-7)
        assert row["rank"] <= rank


def test_an_error_bound_takes_the_fewest_ranks(three, tmp_path) -> None:
    report = tt.combine(three, tmp_path / "m", max_error=0.3)
    for row in report:
        s = torch.linalg.svdvals(dense_sum(three, [1 / 3] * 3, row["path"]))
        assert row["error"] <= 0.3
        assert row["rank"] == 1 or (s[row["rank"] - 1 :].norm() / s.norm()) > 0.3
    with pytest.raises(tt.ShapeMismatch, match="max_error is relative"):
        tt.combine(three, tmp_path / "n", max_error=1.5)


def test_rotated_factors_change_nothing(three, tmp_path) -> None:
    """(B Q, Q^T A) is the same update; a merge that is a function of updates cannot see it."""
    model = net()
    tt.load(model, three[0], trainable=True)
    q = torch.linalg.qr(torch.randn(2, 2, generator=torch.Generator().manual_seed(4)))[0]
    with torch.no_grad():
        for module in model.modules():
            if type(module).__name__ == "LoRAAdapter":
                module.a.copy_(q.t() @ module.a)
                module.b.copy_(module.b @ q)
    tt.save(model, tmp_path / "turned")
    for options in ({"rank": 3}, {"rule": "ties", "rank": 16, "density": 0.4}):
        tt.combine([three[0], three[1]], tmp_path / "x", **options)
        tt.combine([tmp_path / "turned", three[1]], tmp_path / "y", **options)
        close(merged_update(tmp_path / "y", Q), merged_update(tmp_path / "x", Q), 1e-5)


METHODS = {
    "LoHa": tt.LoHa(rank=2), "LoKr": tt.LoKr(rank=2), "VeRA": tt.VeRA(rank=4), "FourierFT": tt.FourierFT(coefficients=20),
    "DoRA": tt.DoRA(rank=2), "OFT": tt.OFT(block_size=4), "MiSS": tt.MiSS(rank=4), "Bat": tt.Bat(rank=4), "IA3": tt.IA3(),
    "SSF": tt.SSF(), "BOFT": tt.BOFT(block_size=4), "AdaLoRA": tt.AdaLoRA(rank=2), "SoKA": tt.SoKA(), "HUT": tt.HUT(rank=2),
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_any_mixture_of_methods(method, tmp_path) -> None:
    """Beside a LoRA, from the method's own definition where it has no factors; on a base, which some of them need."""
    folders = [adapter(tmp_path / "a", tt.LoRA(rank=2), 1), adapter(tmp_path / "b", METHODS[method], 2)]
    factors = [0.6, -0.8]
    report = tt.combine(folders, tmp_path / "m", weights=factors, rank=16, base=net())
    assert max(report.column("error")) < 1e-5
    close(merged_update(tmp_path / "m", Q), dense_sum(folders, factors, Q), 1e-5)
    model, parts = net(), [net() for _ in folders]
    for part, folder in zip(parts, folders, strict=True):
        tt.load(part, folder)
    tt.load(model, tmp_path / "m")
    for path in (Q, "layers.0.down_proj"):
        bias = lambda m, path=path: m.get_submodule(path).bias.double()  # noqa: E731
        total = bias(net()) + sum(w * (_bias(p, path) - bias(net())) for w, p in zip(factors, parts, strict=True))
        close(_bias(model, path), total, 1e-5)


def _bias(model, path):
    try:
        return tt.effective_weight(model, path, tensor="bias").double()
    except tt.NoMatch:
        return model.get_submodule(path).bias.detach().double()


def test_without_a_base_only_what_needs_none(tmp_path) -> None:
    folders = [adapter(tmp_path / "a", tt.LoRA(rank=2), 1), adapter(tmp_path / "b", tt.FourierFT(coefficients=9), 2)]
    tt.combine(folders, tmp_path / "m", rank=16)
    close(merged_update(tmp_path / "m", Q), dense_sum(folders, [0.5, 0.5], Q), 1e-5)
    with pytest.raises(tt.Unsupported, match="say at which rank"):
        tt.combine(folders, tmp_path / "n")
    dora = adapter(tmp_path / "d", tt.DoRA(rank=2), 3)
    with pytest.raises(tt.Unsupported, match=r"DoRA at layers.0.attn.q_proj depends on the base's weights; say which base"):
        tt.combine([folders[0], dora], tmp_path / "n")
    assert not (tmp_path / "n").exists()


@pytest.mark.parametrize("rule", ["ties", "dare", "dare_ties", "magnitude_prune", "task_arithmetic"])
def test_rules_act_on_dense_updates(three, rule, tmp_path) -> None:
    """The stored adapter is the rule's own answer on the dense updates, at full rank; the error against the sum is told."""
    report = tt.combine(three[:2], tmp_path / "m", rule=rule, rank=16, seed=5)
    again = tt.combine(three[:2], tmp_path / "n", rule=rule, rank=16, seed=5)
    assert report.records() == again.records()
    entry = rule_entry(rule)
    from trimtab.artifacts.combine import place_seed

    updates = [merged_update(folder, Q).float() for folder in three[:2]]
    expected = entry(updates, entry.default_weights(2), entry.bind({}), seed=place_seed(5, Q))
    close(merged_update(tmp_path / "m", Q).float(), expected, 1e-5)
    exact = dense_sum(three[:2], entry.default_weights(2), Q).float()
    row = next(row for row in report if row["path"] == Q)
    assert row["error"] == pytest.approx(((expected - exact).norm() / exact.norm()).item(), abs=1e-5)
    assert row["cut"] < 1e-5
    if rule.startswith("dare"):
        other = tt.combine(three[:2], tmp_path / "o", rule=rule, rank=16, seed=6)
        assert other.column("error") != report.column("error")


# -- what is no matrix


def test_heads_norms_and_biases(tmp_path) -> None:
    """Whole values: an average without the base, any weights with it."""
    folders = []
    for i, name in enumerate("ab"):
        model = net()
        tt.attach(model, tt.LoRA(rank=2), targets="attn.q", name=name)
        tt.attach(model, tt.NormTuning(), name=name)
        tt.attach(model, tt.BitFit(), targets="mlp.down", name=name)
        folders.append(adapter(tmp_path / name, tt.Unfreeze(), i, "head", model=model))
    tt.combine(folders, tmp_path / "mean")
    tt.combine(folders, tmp_path / "sum", weights=[2.0, -0.5], base=net())
    with pytest.raises(tt.Unsupported, match="only an average"):
        tt.combine(folders, tmp_path / "x", weights=[2.0, -0.5])
    for out, factors in (("mean", [0.5, 0.5]), ("sum", [2.0, -0.5])):
        model = net()
        tt.load(model, tmp_path / out)
        for path, tensor in (
            ("layers.0.norm", "weight"),
            ("layers.1.norm", "bias"),
            ("layers.0.down_proj", "bias"),
            ("lm_head", "weight"),
        ):
            base = getattr(net().get_submodule(path), tensor).detach()
            parts = []
            for folder in folders:
                one = net()
                tt.load(one, folder)
                parts.append(tt.effective_weight(one, path, tensor=tensor))
            expected = base + sum(w * (p - base) for w, p in zip(factors, parts, strict=True))
            torch.testing.assert_close(tt.effective_weight(model, path, tensor=tensor), expected)
        methods = {type(a.config).__name__ for a in model.__dict__["_trimtab_state"].groups["a+b"].adapters}
        assert methods == {"LoRA", "NormTuning", "BitFit", "Unfreeze"}


class Fused(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = type("Config", (), {"num_attention_heads": 2, "hidden_size": 8})()
        self.blocks = torch.nn.ModuleList([torch.nn.Module() for _ in range(2)])
        for block in self.blocks:
            block.attn = torch.nn.Module()
            block.attn.qkv, block.attn.proj = torch.nn.Linear(8, 24), torch.nn.Linear(8, 8)

    def forward(self, x):
        for block in self.blocks:
            q, k, v = block.attn.qkv(x).chunk(3, -1)
            x = x + block.attn.proj(torch.softmax(q @ k.transpose(-1, -2), -1) @ v)
        return x


def test_rows_of_a_fused_layer_meet_the_whole_of_it(tmp_path) -> None:
    q = adapter(tmp_path / "q", tt.LoRA(rank=2), 1, "attn.q", model=Fused())
    v = adapter(tmp_path / "v", tt.LoRA(rank=3), 2, "attn.v", model=Fused())
    whole = adapter(tmp_path / "w", tt.LoRA(rank=2), 3, "attn.qkv", model=Fused())
    path = "blocks.0.attn.qkv"
    for folders, places in (([q, v], 4), ([q, v, whole], 2)):
        for base in (None, Fused()):
            factors = [0.5, -1.0, 2.0][: len(folders)]
            report = tt.combine(folders, tmp_path / "m", weights=factors, base=base)
            assert len(report) == places
            close(merged_update(tmp_path / "m", path, make=Fused), dense_sum(folders, factors, path, make=Fused))
    folders = [q, whole]  # a rule that looks at entries sees the rows against the whole
    tt.combine(folders, tmp_path / "t", rule="ties", density=1.0, rank=8)
    parts = [merged_update(folder, path, make=Fused).float() for folder in folders]
    expected = rule_entry("ties")(parts, [0.5, 0.5], rule_entry("ties").bind({"density": 1.0}), seed=0)
    close(merged_update(tmp_path / "t", path, make=Fused).float(), expected, 1e-5)


class Experts(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mlp = torch.nn.Module()
        self.mlp.experts = torch.nn.Module()
        self.mlp.experts.up_proj = torch.nn.Parameter(torch.randn(3, 10, 6))

    def forward(self, x):
        return torch.einsum("eoi,...i->...eo", self.mlp.experts.up_proj, x)


@pytest.mark.parametrize("base", [None, Experts()])
def test_banks_of_experts_and_embeddings(base, tmp_path) -> None:
    banks = [adapter(tmp_path / f"e{i}", tt.LoRA(rank=i), i, "experts.up_proj", model=Experts()) for i in (1, 2)]
    for rank in (None, 2):
        report = tt.combine(banks, tmp_path / "m", weights=[1.5, -0.5], rank=rank, base=base)
        models = [Experts() for _ in range(3)]
        for model, folder in zip(models, [*banks, tmp_path / "m"], strict=True):
            tt.load(model, folder)
        W = Experts().mlp.experts.up_proj.detach()
        d = [tt.effective_weight(m, "mlp.experts").detach() - W for m in models]
        exact = (1.5 * d[0] - 0.5 * d[1]).double()
        u, s, vh = torch.linalg.svd(exact, full_matrices=False)
        k = report.column("rank")[0]
        assert k == (3 if rank is None else 2)
        close(d[2], ((u[..., :k] * s[:, None, :k]) @ vh[:, :k]).float(), 1e-5)
        assert report.column("error")[0] == pytest.approx((s[:, k:].norm() / s.norm()).item(), abs=1e-6)
    rows = [adapter(tmp_path / f"t{i}", tt.LoRA(rank=2), i, "embed") for i in (1, 2)]
    tt.combine(rows, tmp_path / "t", weights=[1.0, 1.0])
    model = net()
    tt.load(model, tmp_path / "t")
    close(tt.effective_weight(model, "embed") - net().embed.weight.t(), dense_embed(rows), 1e-5)


def dense_embed(folders):
    total = 0
    for folder in folders:
        model = net()
        tt.load(model, folder)
        total = total + tt.effective_weight(model, "embed") - net().embed.weight.t()
    return total.detach()


# -- bad input


def test_bad_input_is_refused_by_name(three, tmp_path) -> None:
    out = tmp_path / "out"
    for paths, options, error, match in (
        ([], {}, tt.ShapeMismatch, "nothing to merge"),
        ([three[0], three[0]], {}, tt.ShapeMismatch, "given twice"),
        (three, {"weights": [1.0]}, tt.ShapeMismatch, "3 adapters need as many"),
        (three, {"weights": [1.0, float("nan"), 1.0]}, tt.ShapeMismatch, "finite"),
        (three, {"rank": 0}, tt.ShapeMismatch, "a rank is"),
        (three, {"rule": "tys"}, tt.NoMatch, "nearest: ties"),
        (three, {"density": 0.2}, tt.NoMatch, "'linear' has no parameter 'density'"),
        ([three[0], tmp_path / "nothing"], {}, tt.CheckpointMismatch, "does not exist"),
        (three, {"format": "tt"}, tt.Unsupported, "nearest: trimtab"),
    ):
        with pytest.raises(error, match=match):
            tt.combine(paths, out, **options)
        assert not out.exists()


def test_adapters_of_other_bases_are_refused(three, tmp_path) -> None:
    other = adapter(tmp_path / "o", tt.LoRA(rank=2), 1, model=net(seed=9))
    with pytest.raises(tt.CheckpointMismatch, match="made for different bases"):
        tt.combine([three[0], other], tmp_path / "m")
    with pytest.raises(tt.CheckpointMismatch, match="another base"):
        tt.combine([other], tmp_path / "m", base=net())


def test_damaged_files_are_refused_by_name(three, tmp_path) -> None:
    file = next(three[1].glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(tt.CheckpointMismatch, match=file.name):
        tt.combine(three, tmp_path / "m")


def test_activations_have_no_update(tmp_path) -> None:
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Offset(tt.MethodConfig):
        """y + s"""

    @tt.method(Offset, paper="a test")
    class OffsetAdapter(tt.ActivationAdapter):
        def __init__(self, config, site, *, rng):
            super().__init__(config, site)
            self.s = self.zeros(site.shape[0])

        def forward(self, x, y):
            return y + self.s

    folders = [adapter(tmp_path / "a", Offset(), 1, "attn.q"), adapter(tmp_path / "b", tt.LoRA(rank=1), 2, "attn.q")]
    with pytest.raises(tt.NotMergeable, match="Offset at layers.0.attn.q_proj acts on activations"):
        tt.combine(folders, tmp_path / "m", base=net())


def test_a_live_base_keeps_its_adapters_and_its_values(three, tmp_path) -> None:
    """Also while one of them is merged: updates are of the base's own weights."""
    model = net()
    tt.attach(model, tt.LoRA(rank=1), name="m+", rng=torch.Generator().manual_seed(0))
    tt.load(model, three[0], name="in")
    dora = adapter(tmp_path / "d", tt.DoRA(rank=2), 4)
    tt.merge(model, "in")
    before = model(X)
    tt.combine([dora, three[1]], tmp_path / "p", rank=16, base=model, name="m+", format="peft")
    assert torch.equal(model(X), before) and tt.summary(model).column("name") == ["m+", "in"]
    shutil.rmtree(three[2])
    close(merged_update(tmp_path / "p", Q), dense_sum([dora, three[1]], [0.5, 0.5], Q), 1e-5)
