"""What users of other libraries suffered (the list of regression tests in the field notes), one small test each."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch
from small_net import IDS, net, shake
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import trimtab as tt

# -- selection


@pytest.mark.parametrize("targets", ["q_proj | FAKE", ["q_proj", "FAKE"], "attn.q | atn.v", r".*\.qq_proj"])
def test_a_typo_in_a_selector_raises_and_changes_nothing(targets) -> None:
    model = net()
    before = list(model.state_dict())
    with pytest.raises(tt.NoMatch, match="nearest|exists|there"):
        tt.attach(model, tt.LoRA(rank=2), targets=targets)
    assert list(model.state_dict()) == before
    assert all(p.requires_grad for p in model.parameters())


def test_a_typo_in_an_override_raises() -> None:
    with pytest.raises(tt.NoMatch):
        tt.attach(net(), tt.LoRA(rank=2), targets="q_proj", overrides={"q_prj": tt.LoRA(rank=4)})
    with pytest.raises(tt.NoMatch, match="override"):
        tt.attach(net(), tt.LoRA(rank=2), targets="q_proj", overrides={"v_proj": tt.LoRA(rank=4)})


def test_overrides_and_layers_reach_what_they_name() -> None:
    model = net()
    table = tt.attach(
        model, tt.LoRA(rank=2), targets="q_proj | v_proj", layers=[1], overrides={"v_proj": tt.LoRA(rank=4)}, dry_run=True
    )
    assert [(row["path"], row["parameters"]) for row in table] == [
        ("layers.1.attn.q_proj", 2 * 32),
        ("layers.1.attn.v_proj", 4 * 32),
    ]
    with pytest.raises(tt.NoMatch):
        tt.attach(model, tt.LoRA(rank=2), targets="q_proj", layers=[2])


def test_dry_run_changes_nothing() -> None:
    model = net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    table = tt.attach(model, tt.LoRA(rank=2), dry_run=True)
    assert table.total("parameters") > 0
    assert list(model.state_dict()) == list(before)
    assert not any("trimtab" in name for name in vars(model))
    real = tt.attach(model, tt.LoRA(rank=2))
    assert real.records() == table.records()


# -- trainability


def test_frozen_stays_frozen_whatever_happens(tmp_path) -> None:
    model = net()
    tt.attach(model, tt.LoRA(rank=2), name="frozen", trainable=False)
    tt.attach(model, tt.LoRA(rank=2), name="learns")

    def flags() -> tuple:
        state = model.__dict__["_trimtab_state"]
        return tuple(
            all(p.requires_grad is learns for a in state.groups[name].adapters for p in a.parameters())
            for name, learns in (("frozen", False), ("learns", True))
        )

    with tt.disabled(model):
        assert flags() == (True, True)
    tt.save(model, tmp_path / "x", name="frozen")
    tt.load(model, tmp_path / "x", name="third")
    tt.activate(model, "frozen")
    tt.activate(model, "frozen", "learns")
    model.train().eval()
    assert flags() == (True, True)
    assert {id(p) for p in tt.parameters(model)} == {id(p) for p in model.parameters() if p.requires_grad}
    assert tt.parameters(model, "third") == []


def test_loading_b_never_touches_a(tmp_path) -> None:
    model = net()
    tt.attach(model, tt.LoRA(rank=2), name="a")
    shake(model, "a")
    tt.save(model, tmp_path / "b", name="a")
    values = [p.clone() for p in tt.parameters(model, "a")]
    before = model(IDS)
    tt.load(model, tmp_path / "b", name="b")
    assert torch.equal(model(IDS), before)
    assert all(torch.equal(v, p) for v, p in zip(values, tt.parameters(model, "a"), strict=True))


def test_first_step_says_when_a_declared_parameter_gets_no_gradient() -> None:
    model = net()
    tt.attach(model, tt.LoRA(rank=2), targets="q_proj | o_proj")
    optimizer = torch.optim.SGD(tt.parameters(model), lr=0.1)
    model.layers[0](model.embed(IDS)).sum().backward()  # the second layer is not reached
    with pytest.raises(tt.GradientMismatch, match=r"layers\.1\.attn"):
        optimizer.step()


def test_first_step_says_when_an_undeclared_parameter_learns() -> None:
    model = net()
    tt.attach(model, tt.LoRA(rank=2), targets="q_proj")
    model.lm_head.requires_grad_(True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(IDS).sum().backward()
    with pytest.raises(tt.GradientMismatch, match=r"lm_head\.weight.*Unfreeze"):
        optimizer.step()


def test_extending_an_adapter_saves_both_parts_together(tmp_path) -> None:
    model = net()
    tt.attach(model, tt.LoRA(rank=2), targets="q_proj", name="task")
    tt.attach(model, tt.Unfreeze(), targets="lm_head", name="task")
    shake(model, "task")
    tt.save(model, tmp_path, name="task")
    fresh = net()
    tt.load(fresh, tmp_path)
    assert torch.equal(fresh(IDS), model(IDS))
    with pytest.raises(tt.Unsupported, match="already acts"):
        tt.attach(model, tt.LoRA(rank=2), targets="q_proj", name="task")


# -- merging


def test_fifty_bf16_rounds_are_bitwise_identical() -> None:
    model = net().to(torch.bfloat16)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tt.attach(model, tt.LoRA(rank=4))
    shake(model)
    for _ in range(50):
        tt.merge(model, "default")
        tt.unmerge(model, "default")
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


def test_merge_error_is_reported_and_bounded_in_bf16() -> None:
    model = net(width=64).to(torch.bfloat16)
    tt.attach(model, tt.LoRA(rank=4))
    shake(model)
    report = tt.merge(model, "default")
    assert len(report) == 12
    assert all(0 < row["output error"] < 2**-8 for row in report)
    tt.unmerge(model, "default")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(tt.NotMergeable, match="max_error"):
        tt.merge(model, "default", max_error=1e-6)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


def test_merged_adapters_must_be_unmerged_first() -> None:
    model = net()
    tt.attach(model, tt.LoRA(rank=2), name="a")
    tt.attach(model, tt.LoRA(rank=2), name="b")
    tt.merge(model, "a")
    tt.merge(model, "b")
    for call in (lambda: tt.activate(model, "b"), lambda: tt.detach(model, "a"), lambda: tt.merge(model, "a")):
        with pytest.raises((tt.Unsupported, tt.NotMergeable), match="merged"):
            call()
    with pytest.raises(tt.NotMergeable, match="on top"):
        tt.unmerge(model, "a")


def test_permanent_merge_leaves_an_ordinary_model() -> None:
    model = net().eval()
    tt.attach(model, tt.LoRA(rank=2))
    shake(model)
    adapted = model(IDS)
    tt.merge(model, "default", permanent=True)
    assert torch.allclose(model(IDS), adapted, atol=1e-5)
    assert {type(m) for m in model.modules()} == {type(m) for m in net().modules()}
    assert list(model.state_dict()) == list(net().state_dict())


def test_nan_in_an_adapter_is_neither_merged_nor_saved(tmp_path) -> None:
    model = net()
    tt.attach(model, tt.LoRA(rank=2))
    tt.save(model, tmp_path)
    good = sorted((f.name, f.read_bytes()) for f in tmp_path.iterdir())
    with torch.no_grad():
        tt.parameters(model)[0].fill_(float("nan"))
    with pytest.raises(tt.NotMergeable, match="NaN"):
        tt.merge(model, "default")
    with pytest.raises(tt.CheckpointMismatch, match="NaN"):
        tt.save(model, tmp_path)
    assert sorted((f.name, f.read_bytes()) for f in tmp_path.iterdir()) == good


# -- tied weights


def test_tied_embedding_survives_merge_save_and_load(tmp_path) -> None:
    model = net(tied=True).eval()
    tt.attach(model, tt.LoRA(rank=2), targets="embed")
    shake(model)
    adapted = model(IDS)
    tt.save(model, tmp_path)
    with pytest.raises(tt.NotMergeable, match="tied"):
        tt.merge(model, "default")
    assert model.lm_head.weight is model.embed._parameters["weight"]
    tt.merge(model, "default", untie=True)
    assert torch.allclose(model(IDS), adapted, atol=1e-5)
    tt.unmerge(model, "default")
    assert model.lm_head.weight is model.embed._parameters["weight"]
    assert torch.allclose(model(IDS), adapted, atol=1e-5)
    fresh = net(tied=True).eval()
    tt.load(fresh, tmp_path)
    assert torch.allclose(fresh(IDS), adapted, atol=1e-6)


@pytest.mark.parametrize("targets", [["embed", "lm_head"], ["lm_head"]])
def test_a_tied_tensor_that_learns_is_one_site(targets) -> None:
    with pytest.raises(tt.Unsupported, match="tied"):
        tt.attach(net(tied=True), tt.Unfreeze(), targets=targets)


# -- bad input


@pytest.mark.parametrize(
    "make", [lambda: tt.LoRA(rank=0), lambda: tt.LoRA(rank=-1), lambda: tt.LoRA(rank=2.5), lambda: tt.LoRA(dropout=1.0)]
)
def test_impossible_hyperparameters(make) -> None:
    with pytest.raises(ValueError, match="LoRA"):
        make()


def test_rank_larger_than_the_matrix_names_every_place_at_once() -> None:
    model = net()
    with pytest.raises(tt.ShapeMismatch, match=r"(?s)4 problems.*rank 17.*layers\.0\.attn\.q_proj.*layers\.1"):
        tt.attach(model, tt.LoRA(rank=17), targets="q_proj | k_proj")
    assert list(model.state_dict()) == list(net().state_dict())


def test_unknown_method_and_hyperparameter() -> None:
    with pytest.raises(AttributeError):
        tt.Lora  # noqa: B018
    with pytest.raises(tt.NoMatch, match="LoRA"):
        tt.get("Lora")
    with pytest.raises(tt.NoMatch, match="rank"):
        tt.core.registry.config_from_dict({"name": "LoRA", "rnak": 2})


def test_nan_base_weights_are_found_at_attach() -> None:
    model = net()
    with torch.no_grad():
        model.layers[1].attn.q_proj.weight[0, 0] = float("nan")
    with pytest.raises(tt.ShapeMismatch, match=r"layers\.1\.attn\.q_proj.*NaN"):
        tt.attach(model, tt.LoRA(rank=2))


# -- cost that does not grow


def python_calls(work) -> int:
    count = 0

    def tick(frame, event, arg) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(tick)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def test_the_hundredth_load_costs_what_the_first_did(saved) -> None:
    model = net()
    tt.attach(model, tt.LoRA(rank=2), name="own")
    costs = [python_calls(lambda i=i: tt.load(model, saved, name=f"n{i}")) for i in range(100)]
    assert costs[-1] <= 1.1 * costs[0]
    switching = [python_calls(lambda i=i: tt.activate(model, f"n{i}")) for i in (0, 99)]
    assert switching[1] <= 1.1 * switching[0]


class Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += 1
        return func(*args, **(kwargs or {}))


def test_operations_of_a_mixed_batch_do_not_grow_with_its_adapters() -> None:
    model = net().eval()
    for i in range(8):
        tt.attach(model, tt.LoRA(rank=2), name=f"n{i}")
        shake(model, f"n{i}")
    ids = torch.arange(32).reshape(8, 4) % 11
    counts = []
    for distinct in (2, 8):
        with torch.no_grad(), tt.routed(model, [f"n{i % distinct}" for i in range(8)]), Count() as count:
            model(ids)
        counts.append(count.n)
    assert counts[0] == counts[1]


def test_import_is_light() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import trimtab; "
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not set(eval(found)) & {"transformers", "accelerate", "datasets", "pydantic", "typer", "rich", "matplotlib", "peft"}


def test_hosts_may_run_in_several_threads() -> None:
    model = net().eval()
    tt.attach(model, tt.LoRA(rank=2))
    shake(model)
    expected, found = model(IDS), []
    threads = [threading.Thread(target=lambda: found.append(model(IDS))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(y, expected) for y in found)
    assert len(found) == 4


def test_the_transformer_encoders_inference_shortcut_sees_adapters() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True).eval()
    x = torch.randn(2, 3, 16)
    tt.attach(layer, tt.LoRA(rank=2), targets="linear1")
    shake(layer)
    with_grad = layer(x)
    with torch.no_grad():
        assert torch.allclose(layer(x), with_grad, atol=1e-6)


def test_wrappers_are_looked_through(tmp_path) -> None:
    model = net()
    tt.attach(model, tt.LoRA(rank=2))
    wrapped = nn.DataParallel(model)
    assert len(tt.parameters(wrapped)) == len(tt.parameters(model))
    tt.save(wrapped, tmp_path)
    with pytest.raises(tt.Unsupported, match="tt.attach"):
        tt.summary(net())


def test_a_head_with_layers_of_its_own_is_one_head() -> None:
    model = nn.Sequential()
    model.add_module("body", nn.Linear(4, 8))
    model.add_module("head", nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)))
    table = tt.attach(model, tt.Unfreeze())
    assert sorted(table.column("path")) == ["head.0", "head.0.bias", "head.2", "head.2.bias"]
    assert table.total("parameters") == sum(p.numel() for p in model.head.parameters() if not p.requires_grad)


def test_the_table_of_methods_is_there_after_the_registry_was_read() -> None:
    """The package trimtab.methods takes the verb's name as soon as anything imports it; in a process without tests' own methods."""
    code = "import trimtab as tt; assert 'LoRA' in tt.names(); print(tt.methods())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert any(line.startswith("LoRA ") for line in done.stdout.splitlines())
