"""AttentionFusion: the definition, what it can mix, what it needs, what it keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from trimtab.core.account import saved_bytes

D = torch.float64
SOURCES = {
    "series": tt.SeriesAdapter(bottleneck=2, init="bert", placement="pfeiffer"),
    "compact": tt.Compacter(reduction=3, divisions=1, placement="pfeiffer"),
    "lora": tt.LoRA(rank=2),
}


def encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 2, 16, 0.0, batch_first=True, dtype=D)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def shake(model: nn.Module, name: str, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in tt.parameters(model, name):
            p.add_(torch.randn_like(p) * 0.5)


def stocked(*names: str, targets: str | None = "mlp.down") -> nn.Module:
    """A model with these adapters on it, inactive."""
    model = encoder()
    for seed, name in enumerate(names):
        tt.attach(model, SOURCES[name], targets=targets, name=name)
        shake(model, name, seed)
    tt.activate(model)
    return model


def places(model: nn.Module, name: str) -> dict[str, nn.Module]:
    return {a.site.path: a for a in model.__dict__["_trimtab_state"].groups[name].adapters}


def output_of(model: nn.Module, path: str, x: Tensor, *active: str) -> Tensor:
    tt.activate(model, *active)
    return model.get_submodule(path)(x)


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("value", [True, False])
def test_the_definition(rank, value) -> None:
    model = stocked("series", "compact", "lora")
    tt.attach(model, tt.AttentionFusion(adapters=tuple(SOURCES), rank=rank, value=value), name="mix")
    shake(model, "mix", 9)
    for path, fusion in places(model, "mix").items():
        x = torch.randn(2, 3, 16, dtype=D)
        y = output_of(model, path, x)
        c = [output_of(model, path, x, name) - y for name in SOURCES]
        scores = torch.stack([((y @ fusion.query.t() + fusion.query_bias) * (n @ fusion.key.t())).sum(-1) for n in c], -1)
        mixed = sum(p[..., None] * n for p, n in zip(scores.softmax(-1).unbind(-1), c, strict=True))
        want = y + (mixed @ fusion.value.t() if value else mixed)
        torch.testing.assert_close(output_of(model, path, x, "mix"), want)


def test_it_starts_near_the_mean_and_one_adapter_alone_is_itself() -> None:
    model, x = stocked("series", "compact"), torch.randn(2, 3, 16, dtype=D)
    path = "layers.0.linear2"
    y = output_of(model, path, x)
    each = [output_of(model, path, x, name) - y for name in ("series", "compact")]
    tt.attach(model, tt.AttentionFusion(adapters=("series", "compact")), name="mix")
    tt.attach(model, tt.AttentionFusion(adapters=("compact",)), name="one")
    mixed = output_of(model, path, x, "mix") - y
    assert (mixed - sum(each) / 2).norm() < 0.05 * mixed.norm()
    torch.testing.assert_close(output_of(model, path, x, "one") - y, each[1])


def test_it_trains_alone_beside_frozen_adapters(tmp_path) -> None:
    """The recipe: adapters trained apart, loaded, mixed; saved without them, and loaded where they are."""
    model, x = stocked("series", "compact"), torch.randn(2, 3, 12, dtype=D)
    for name in ("series", "compact"):
        tt.save(model, tmp_path / name, name=name)
    model = encoder()
    for name in ("series", "compact"):
        tt.load(model, tmp_path / name)
    tt.activate(model)
    tt.attach(model, tt.AttentionFusion(adapters=("series", "compact"), rank=3), name="mix")
    before = {k: v.clone() for k, v in model.state_dict().items() if ".mix." not in k}
    optimizer = torch.optim.Adam(tt.parameters(model), lr=0.01)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    tt.save(model, tmp_path / "mix", name="mix")
    fresh = encoder()
    with pytest.raises(tt.NoMatch, match="'series' there; attach or load it first"):
        tt.load(fresh, tmp_path / "mix")
    for name in ("series", "compact"):
        tt.load(fresh, tmp_path / name)
    tt.load(fresh, tmp_path / "mix")
    tt.activate(fresh, "mix")
    torch.testing.assert_close(fresh(x), model(x))


def test_adapters_that_read_a_spread_branch() -> None:
    """Parallel adapters beside linear1 and linear2 together: the mixture reads what they read."""
    model, x = encoder(), torch.randn(2, 3, 12, dtype=D)
    for seed, name in enumerate(("a", "b")):
        tt.attach(model, tt.ParallelAdapter(bottleneck=2), name=name)
        shake(model, name, seed)
    tt.activate(model)
    tt.attach(model, tt.AttentionFusion(adapters=("a",)), name="one")
    alone = model(x)
    tt.activate(model, "a")
    torch.testing.assert_close(alone, model(x))
    tt.attach(model, tt.AttentionFusion(adapters=("a", "b")), name="mix")
    tt.activate(model, "mix")
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in tt.parameters(model, "mix"))


def test_what_it_needs_stays() -> None:
    model = stocked("series", "compact")
    tt.attach(model, tt.AttentionFusion(adapters=("series", "compact")), name="mix")
    with pytest.raises(tt.Unsupported, match=r"'mix' needs 'series'; tt.detach\(model, 'mix'\) first"):
        tt.detach(model, "series")
    with pytest.raises(tt.NotMergeable, match="'mix' needs 'compact'"):
        tt.merge(model, "compact")
    for name in ("mix", "series", "compact"):
        tt.detach(model, name)
    assert not [n for n, _ in model.named_modules() if "trimtab" in n]


def test_places_and_refusals() -> None:
    model = stocked("series", "compact", targets=None)
    table = tt.attach(model, tt.AttentionFusion(adapters=("series", "compact")), name="mix", dry_run=True)
    assert table.column("path") == ["layers.0.linear2", "layers.1.linear2"]
    with pytest.raises(tt.Unsupported, match="name some of those on the model"):
        tt.attach(model, tt.AttentionFusion(), name="mix")
    with pytest.raises(tt.Unsupported, match="no place where all of its adapters act"):
        tt.attach(model, tt.AttentionFusion(adapters=("series", "other")), name="mix")
    with pytest.raises(tt.NoMatch, match="needs the adapter 'series' there"):
        tt.attach(model, tt.AttentionFusion(adapters=("series",)), targets="attn", name="mix")
    tt.attach(model, tt.DoRA(rank=2), targets="mlp.down", name="dora")
    with pytest.raises(tt.Unsupported, match=r"cannot mix 'dora' \(DoRA\)"):
        tt.attach(model, tt.AttentionFusion(adapters=("series", "dora")), name="mix")
    tt.attach(model, tt.SeriesAdapter(bottleneck=2, position="before"), targets="mlp.down", name="before")
    with pytest.raises(tt.Unsupported, match="cannot mix 'before'"):
        tt.attach(model, tt.AttentionFusion(adapters=("before",)), name="mix")


def test_keeps_the_output_alone_whatever_it_mixes() -> None:
    for value in (True, False):
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(32, 32)).requires_grad_(False), torch.randn(64, 32, requires_grad=True)
        for name in ("a", "b", "c"):
            tt.attach(model, tt.SeriesAdapter(bottleneck=2), targets="0", name=name, trainable=False)
        tt.activate(model)
        tt.attach(model, tt.AttentionFusion(adapters=("a", "b", "c"), value=value), name="mix")
        with saved_bytes(model, beside=(x,)) as saved:
            model(x)
        assert saved.total == 64 * 32 * 4


@pytest.mark.parametrize(
    ("adapters", "message"),
    [(("a", "a"), "tuple of different names"), (("",), "tuple of different names"), ((1,), "each entry a text")],
)
def test_bad_names(adapters, message) -> None:
    with pytest.raises(tt.ShapeMismatch, match=message):
        tt.AttentionFusion(adapters=adapters)
    assert tt.AttentionFusion(adapters=["a"]).adapters == ("a",)  # as a YAML file has it
