"""Adapters that huggingface/peft saved compute the same here, and those saved here compute the same there."""

from __future__ import annotations

import pytest
import torch
from peft_models import (
    BERT,
    CONV,
    GPT2,
    LLAMA,
    assert_same,
    base,
    config_of,
    edit,
    lora,
    lycoris,
    outputs,
    peft,
    rewrite,
    saved_by_peft,
    shake,
    trained,
)  # fmt: skip
from safetensors.torch import load_file
from torch import nn

import trimtab as tt
from trimtab.core.registry import entries

pytestmark = pytest.mark.filterwarnings("ignore")

PATTERNS = {"rank_pattern": {"v_proj": 2, "model.layers.1.mlp.down_proj": 6}, "alpha_pattern": {"down_proj": 5}}
# (base, peft's config, the method here)
CASES = {
    "LoRA": ("llama", lambda: lora(LLAMA), "LoRA"),
    "LoRA-bert": ("bert", lambda: lora(BERT), "LoRA"),
    "LoRA-gpt2": ("gpt2", lambda: lora(GPT2), "LoRA"),
    "LoRA-embedding": ("gpt2", lambda: lora(["wte", "c_attn"]), "LoRA"),
    "LoRA-conv": ("conv", lambda: lora(CONV), "LoRA"),
    "LoRA-patterns": ("llama", lambda: lora(LLAMA, **PATTERNS), "LoRA"),
    "LoRA-layers": ("llama", lambda: lora(LLAMA, layers_to_transform=[1]), "LoRA"),
    "LoRA-regex": ("llama", lambda: lora(r".*layers\.0.*(q_proj|up_proj)"), "LoRA"),
    "LoRA-exclude": ("llama", lambda: lora(LLAMA, exclude_modules=["layers.0.self_attn.q_proj"]), "LoRA"),
    "RsLoRA": ("llama", lambda: lora(LLAMA, use_rslora=True), "RsLoRA"),
    "RsLoRA-patterns": ("llama", lambda: lora(LLAMA, use_rslora=True, **PATTERNS), "RsLoRA"),
    "DoRA": ("llama", lambda: lora(LLAMA, use_dora=True), "DoRA"),
    "DoRA-gpt2": ("gpt2", lambda: lora([*GPT2, "wte"], use_dora=True), "DoRA"),
    "DoRA-conv": ("conv", lambda: lora(CONV, use_dora=True), "DoRA"),
    "DoRA-rslora": ("bert", lambda: lora(BERT, use_dora=True, use_rslora=True), "DoRA"),
    "LoHa": ("llama", lambda: lycoris(peft.LoHaConfig, LLAMA), "LoHa"),
    "LoHa-patterns": ("llama", lambda: lycoris(peft.LoHaConfig, LLAMA, **PATTERNS), "LoHa"),
    "LoHa-conv": ("conv", lambda: lycoris(peft.LoHaConfig, ["stem", "groups", "point", "line"]), "LoHa"),
    "LoHa-tucker": (
        "conv", lambda: lycoris(peft.LoHaConfig, ["stem", "groups", "line"], alpha=60, use_effective_conv2d=True), "LoHa",
    ),
    "LoKr": ("llama", lambda: lycoris(peft.LoKrConfig, LLAMA, r=1, decompose_factor=4), "LoKr"),
    "LoKr-full": ("bert", lambda: lycoris(peft.LoKrConfig, BERT, r=16), "LoKr"),
    "LoKr-both": ("llama", lambda: lycoris(peft.LoKrConfig, LLAMA, r=1, decompose_factor=8, decompose_both=True), "LoKr"),
    "LoKr-conv": ("conv", lambda: lycoris(peft.LoKrConfig, ["stem", "groups", "point", "line", "head"], r=1), "LoKr"),
    "LoKr-tucker": ("conv", lambda: lycoris(peft.LoKrConfig, ["stem", "groups"], r=1, alpha=60, use_effective_conv2d=True), "LoKr"),
    "VeRA": ("llama", lambda: peft.VeraConfig(r=8, target_modules=LLAMA, projection_prng_key=5), "VeRA"),
    "VeRA-seed": ("gpt2", lambda: peft.VeraConfig(r=8, target_modules=GPT2, save_projection=False), "VeRA"),
    "OFT": ("llama", lambda: peft.OFTConfig(oft_block_size=8, target_modules=LLAMA), "OFT"),
    "OFT-terms": ("llama", lambda: peft.OFTConfig(oft_block_size=8, target_modules=LLAMA, num_cayley_neumann_terms=3), "OFT"),
    "OFT-exact": ("bert", lambda: peft.OFTConfig(r=4, oft_block_size=0, target_modules=BERT, use_cayley_neumann=False), "OFT"),
    "OFT-adjusted": ("llama", lambda: peft.OFTConfig(oft_block_size=10, target_modules=["q_proj"]), "OFT"),
    "OFT-shared": ("llama", lambda: peft.OFTConfig(oft_block_size=8, target_modules=LLAMA, block_share=True), "OFT"),
    "COFT": ("llama", lambda: peft.OFTConfig(oft_block_size=8, target_modules=LLAMA, coft=True, eps=0.5), "OFT"),
    "OFT-embedding": ("llama", lambda: peft.OFTConfig(oft_block_size=8, target_modules=["embed_tokens", "v_proj"]), "OFT"),
    "BOFT": ("llama", lambda: peft.BOFTConfig(boft_block_size=8, target_modules=LLAMA), "BOFT"),
    "BOFT-bias": ("bert", lambda: peft.BOFTConfig(boft_block_size=0, boft_block_num=4, target_modules=BERT), "BOFT"),
    "FourierFT": ("llama", lambda: peft.FourierFTConfig(n_frequency=50, scaling=30, target_modules=LLAMA), "FourierFT"),
    "FourierFT-gpt2": (
        "gpt2", lambda: peft.FourierFTConfig(
            n_frequency=50, target_modules=GPT2, random_loc_seed=4, n_frequency_pattern={"mlp.c_proj": 20}
        ), "FourierFT",
    ),
    "MiSS": ("llama", lambda: peft.MissConfig(r=8, target_modules=LLAMA), "MiSS"),
    "MiSS-ragged": ("llama", lambda: peft.MissConfig(r=7, target_modules=LLAMA), "MiSS"),
    "MiSS-mini": ("llama", lambda: peft.MissConfig(r=8, mini_r=4, init_weights="mini", target_modules=LLAMA), "MiSS"),
    "Bat": ("llama", lambda: peft.MissConfig(r=8, init_weights="bat", target_modules=LLAMA), "Bat"),
    "AdaLoRA": ("llama", lambda: peft.AdaLoraConfig(init_r=6, lora_alpha=5, total_step=10, target_modules=LLAMA), "AdaLoRA"),
    "AdaLoRA-gpt2": ("gpt2", lambda: peft.AdaLoraConfig(init_r=6, total_step=10, target_modules=GPT2), "AdaLoRA"),
    "AdaLoRA-conv": ("conv", lambda: peft.AdaLoraConfig(init_r=4, total_step=10, target_modules=["stem", "head"]), "AdaLoRA"),
}  # fmt: skip


def methods_on(model: nn.Module) -> set[str]:
    from trimtab.core.contracts import Adapter

    return {type(m.config).__name__ for m in model.modules() if isinstance(m, Adapter)}


@pytest.mark.parametrize("case", CASES)
def test_both_ways(case, tmp_path) -> None:
    name, make, method = CASES[case]
    theirs = outputs(saved_by_peft(make(), name, tmp_path / "peft"), name)
    assert (theirs - outputs(base(name), name)).abs().max() > 5e-3
    model = base(name)
    assert tt.load(model, tmp_path / "peft") == "default"
    assert methods_on(model) == {method}
    assert_same(outputs(model, name), theirs)

    tt.save(model, tmp_path / "back", format="peft")
    assert config_of(tmp_path / "back")["peft_type"] == config_of(tmp_path / "peft")["peft_type"]
    assert_same(outputs(peft.PeftModel.from_pretrained(base(name), tmp_path / "back").eval(), name), theirs)
    again = base(name)
    tt.load(again, tmp_path / "back", name="again", trainable=True)
    assert_same(outputs(again, name), theirs)
    outputs(again, name, grad=True).square().sum().backward()
    assert all(p.grad is not None for p in tt.parameters(again))
    tt.save(again, tmp_path / "own")
    own = base(name)
    tt.load(own, tmp_path / "own")
    assert_same(outputs(own, name), theirs)


# -- what has no type of its own in peft


@pytest.mark.parametrize(
    ("name", "method", "targets"),
    [
        ("llama", tt.PiSSA(rank=3), "attn.q | mlp.down"),
        ("gpt2", tt.OLoRA(rank=3, alpha=5), "attn.qkv | mlp.up"),
        ("conv", tt.PiSSA(rank=3), ["stem", "head"]),
        ("llama", tt.Bone(rank=8), "attn.q | mlp.down"),
        ("gpt2", tt.Bone(rank=8), "mlp"),
        ("gpt2", tt.LoRA(rank=3), "attn.q | attn.v | mlp.down"),
        ("gpt2", tt.LoRA(rank=3), "attn.v"),
        ("gpt2", tt.LoHa(rank=2), "mlp"),
    ],
)  # fmt: skip
def test_exact_low_rank_export(name, method, targets, tmp_path) -> None:
    model = base(name)
    tt.attach(model, method, targets=targets, rng=torch.Generator().manual_seed(0))
    shake(model)
    mine = outputs(model, name)
    assert (mine - outputs(base(name), name)).abs().max() > 1e-3
    tt.save(model, tmp_path / "a", format="peft")
    assert config_of(tmp_path / "a")["peft_type"] in ("LORA", "MISS")
    assert_same(mine, outputs(peft.PeftModel.from_pretrained(base(name), tmp_path / "a").eval(), name))
    again = base(name)
    tt.load(again, tmp_path / "a")
    assert_same(mine, outputs(again, name))


def test_places_that_differ(tmp_path) -> None:
    """One config where peft has patterns; an exact LoRA where it has none; ends of other paths told apart."""
    model = base("llama")
    tt.attach(model, tt.LoRA(rank=2), targets="attention", overrides={"attn.q": tt.LoRA(rank=5, alpha=1.0)})
    shake(model)
    tt.save(model, tmp_path / "ranks", format="peft")
    config = config_of(tmp_path / "ranks")
    assert config["r"] == 2 and set(config["rank_pattern"].values()) == {5} and set(config["alpha_pattern"].values()) == {1.0}
    assert_same(outputs(model, "llama"), outputs(peft.PeftModel.from_pretrained(base("llama"), tmp_path / "ranks"), "llama"))

    pairs = (tt.LoRA(rank=2), tt.RsLoRA(rank=2)), (tt.VeRA(rank=4), tt.VeRA(rank=6)), (tt.Bone(rank=4), tt.Bone(rank=8))
    for first, second in pairs:
        model = base("llama")
        tt.attach(model, first, targets="attention", overrides={"attn.q": second})
        shake(model)
        tt.save(model, tmp_path / "mixed", format="peft")
        assert config_of(tmp_path / "mixed")["peft_type"] == "LORA"
        theirs = peft.PeftModel.from_pretrained(base("llama"), tmp_path / "mixed")
        assert_same(outputs(model, "llama"), outputs(theirs, "llama"))


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry.name)
def test_every_method_is_written_exactly_or_refused(entry, tmp_path) -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16, bias=False))

    x = torch.randn(3, 16)
    for i, options in enumerate(entry.tests or ({},)):
        model = net()
        loss = (lambda m: m(x).square().mean()) if entry.adapter.needs_gradient else None
        try:
            tt.attach(model, entry.config(**options), targets=["0", "2"], loss=loss, rng=torch.Generator().manual_seed(0))
        except tt.TrimtabError:
            continue  # acts on norms, blocks or tokens
        shake(model)
        try:
            tt.save(model, tmp_path / str(i), format="peft")
        except tt.Unsupported:
            continue
        y = model(x)
        if entry.name != "BOFT" or options["factors"] == 1:  # more factors need their CUDA kernel
            assert_same(y, peft.PeftModel.from_pretrained(net(), tmp_path / str(i)).eval()(x))
        again = net()
        tt.load(again, tmp_path / str(i))
        assert_same(y, again(x))


class Nested(nn.Module):
    """``0`` is the end of ``body.0`` and of ``body.body.0``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.ModuleDict({"0": nn.Linear(6, 6), "body": nn.ModuleDict({"0": nn.Linear(6, 6)})})
        self.add_module("0", nn.Linear(6, 6))

    def forward(self, x):
        return self.get_submodule("0")(self.body["body"]["0"](self.body["0"](x).tanh()).tanh())


@pytest.mark.parametrize(
    ("method", "others"), [(tt.LoRA(rank=2), tt.LoRA(rank=3)), (tt.LoRA(rank=2), None), (tt.MiSS(rank=2), None)]
)
def test_paths_that_end_alike(method, others, tmp_path) -> None:
    model = Nested()
    one = lambda path, module: path == "0"  # noqa: E731
    tt.attach(model, method, targets=one)
    if others is not None:
        tt.attach(model, others, targets=lambda path, module: path in ("body.0", "body.body.0"))
    shake(model)
    x = torch.randn(3, 6)
    tt.save(model, tmp_path / "a", format="peft")
    theirs = peft.PeftModel.from_pretrained(Nested(), tmp_path / "a")
    assert_same(model(x), theirs(x))
    again = Nested()
    tt.load(again, tmp_path / "a")
    assert_same(model(x), again(x))


@pytest.mark.parametrize(
    ("name", "method", "targets", "why"),
    [
        ("gpt2", tt.OFT(block_size=8), "mlp", "Conv1D"),
        ("llama", tt.OFT(block_size=8, neumann=3), "attn.q", "OFT"),
        ("conv", tt.LoRA(rank=2), ["groups"], r"Conv2d\*"),
        ("conv", tt.DoRA(rank=2), ["groups"], r"Conv2d\*"),
        ("gpt2", tt.DoRA(rank=2), "attn.v", "DoRA"),
        ("bert", tt.BitFit(), "attn.q", "whole modules"),
        ("llama", tt.Unfreeze(), "head", "replaces parameters"),
    ],
)  # fmt: skip
def test_what_peft_cannot_hold_is_refused(name, method, targets, why, tmp_path) -> None:
    model = base(name)
    tt.attach(model, method, targets=targets)
    with pytest.raises(tt.Unsupported, match=why):
        tt.save(model, tmp_path / "a", format="peft")
    assert not (tmp_path / "a").exists()


# -- special folders of peft's


@pytest.mark.parametrize("kind", ["pissa", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_starts_that_peft_computes_again(kind, rslora, tmp_path) -> None:
    """peft saves factors that belong to a residual, and finds that residual again at each load; so does the reader."""
    theirs = saved_by_peft(lora(LLAMA, init_lora_weights=kind, use_rslora=rslora), "llama", tmp_path / "a")
    model = base("llama")
    tt.load(model, tmp_path / "a")
    assert_same(outputs(model, "llama"), outputs(theirs, "llama"))
    assert_same(outputs(model, "llama"), outputs(peft.PeftModel.from_pretrained(base("llama"), tmp_path / "a"), "llama"))
    edit(tmp_path / "a", init_lora_weights="pissa_niter_4")
    with pytest.raises(tt.Unsupported, match="path_initial_model_for_weight_conversion"):
        tt.load(base("llama"), tmp_path / "a")


def test_adalora_after_pruning(tmp_path) -> None:
    config = peft.AdaLoraConfig(init_r=6, target_r=2, tinit=0, tfinal=1, total_step=4, target_modules=LLAMA)
    model = trained(config, "llama")
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ids = torch.arange(8)[None]
    for step in range(4):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    model.eval()
    model.save_pretrained(tmp_path / "a")
    shapes = {v.shape[0] for k, v in load_file(tmp_path / "a" / "adapter_model.safetensors").items() if k.endswith("lora_E")}
    assert min(shapes) < 6
    mine = base("llama")
    tt.load(mine, tmp_path / "a")
    assert_same(outputs(mine, "llama"), outputs(peft.PeftModel.from_pretrained(base("llama"), tmp_path / "a").eval(), "llama"))


def test_boft_with_several_factors(tmp_path, monkeypatch) -> None:
    """Their butterfly needs a CUDA kernel, which stacks blocks into matrices; here a plain one stands in for it."""
    layer = peft.tuners.boft.layer
    stack = lambda blocks: torch.stack([torch.block_diag(*factor) for factor in blocks])  # noqa: E731
    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(layer, "FastBlockDiag", type("FastBlockDiag", (), {"apply": staticmethod(stack)}))
    config = peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=3, target_modules=["q_proj", "v_proj"])
    theirs = saved_by_peft(config, "llama", tmp_path / "a")
    model = base("llama")
    tt.load(model, tmp_path / "a")
    assert_same(outputs(model, "llama"), outputs(theirs, "llama"))
    tt.save(model, tmp_path / "b", format="peft")
    assert_same(outputs(model, "llama"), outputs(peft.PeftModel.from_pretrained(base("llama"), tmp_path / "b"), "llama"))


@pytest.mark.parametrize(("start", "method"), [(True, "Bone"), ("bat", "Bat")])
def test_bone_of_older_versions(start, method, tmp_path) -> None:
    theirs = saved_by_peft(peft.MissConfig(r=8, init_weights=start, target_modules=LLAMA), "llama", tmp_path / "a")
    rewrite(tmp_path / "a", lambda t: {k.replace("miss_block", "bone_block"): v for k, v in t.items()})
    edit(tmp_path / "a", peft_type="BONE", miss_dropout=None, mini_r=None)
    model = base("llama")
    tt.load(model, tmp_path / "a")
    assert methods_on(model) == {method}
    assert_same(outputs(model, "llama"), outputs(theirs, "llama"))


@pytest.mark.parametrize("form", ["row", "left"])
def test_forms_of_bat_that_peft_lacks_are_not_written(form, tmp_path) -> None:
    model = base("llama")
    tt.attach(model, tt.Bat(rank=8, form=form), targets="attn.q")
    shake(model)
    with pytest.raises(tt.Unsupported, match="Bat"):
        tt.save(model, tmp_path, format="peft")


def test_miss_shared_by_outputs_is_written_as_an_exact_lora(tmp_path) -> None:
    model = base("llama")
    tt.attach(model, tt.MiSS(rank=5, shared="outputs"), targets="attn.q")
    shake(model)
    tt.save(model, tmp_path, format="peft")
    assert config_of(tmp_path)["peft_type"] == "LORA"
    assert_same(outputs(peft.PeftModel.from_pretrained(base("llama"), tmp_path).eval(), "llama"), outputs(model, "llama"))


def test_a_saved_classifier(tmp_path) -> None:
    """``modules_to_save`` become copies that learn beside the base, and come back as such."""
    theirs = saved_by_peft(lora(BERT, task_type="SEQ_CLS"), "bert", tmp_path / "a")
    model = base("bert")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tt.load(model, tmp_path / "a")
    assert methods_on(model) == {"LoRA", "Unfreeze"}
    assert_same(outputs(model, "bert"), outputs(theirs, "bert"))
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    tt.save(model, tmp_path / "b", format="peft")
    assert config_of(tmp_path / "b")["modules_to_save"] == ["classifier"]
    assert_same(outputs(model, "bert"), outputs(peft.PeftModel.from_pretrained(base("bert"), tmp_path / "b").eval(), "bert"))
    model = base("bert")
    tt.attach(model, tt.LoRA(rank=2), targets="attention")
    tt.attach(model, tt.BitFit(), targets="mlp.up")
    with pytest.raises(tt.Unsupported, match="whole modules"):
        tt.save(model, tmp_path / "c", format="peft")


def test_half_precision_and_pickles(tmp_path) -> None:
    saved_by_peft(lora(LLAMA), "llama", tmp_path / "a")
    rewrite(tmp_path / "a", lambda t: {k: v.bfloat16() for k, v in t.items()})
    theirs = outputs(peft.PeftModel.from_pretrained(base("llama"), tmp_path / "a"), "llama")
    model = base("llama")
    tt.load(model, tmp_path / "a")
    assert {p.dtype for p in tt.parameters(model)} <= {torch.float32}
    assert_same(outputs(model, "llama"), theirs)
    file = tmp_path / "a" / "adapter_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    model = base("llama")
    tt.load(model, tmp_path / "a")
    assert_same(outputs(model, "llama"), theirs)
