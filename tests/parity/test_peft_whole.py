"""What a peft folder holds beside its adapter's tensors counts as the file has it: modules, biases, embeddings, rows of tokens."""

from __future__ import annotations

import pytest
import torch
from peft_models import (
    BERT,
    GPT2,
    LLAMA,
    VOCABULARY,
    WIDTH,
    assert_same,
    base,
    config_of,
    edit,
    lora,
    outputs,
    peft,
    rewrite,
    saved_by_peft,
    trained,
)  # fmt: skip

import trimtab as tt

pytestmark = pytest.mark.filterwarnings("ignore")

# (base, config): small changes of whole parameters are changes, too
WHOLE = {
    "norm, by the end of the path": ("llama", lambda: lora(LLAMA, modules_to_save=["norm"])),
    "one norm of each layer": ("llama", lambda: lora(LLAMA, modules_to_save=["input_layernorm"])),
    "a head": ("llama", lambda: lora(LLAMA, modules_to_save=["lm_head"])),
    "embedding": ("llama", lambda: lora(LLAMA, modules_to_save=["embed_tokens"])),
    "a container": ("bert", lambda: lora(["query"], modules_to_save=["output"])),
    "a whole layer": ("llama", lambda: lora(["layers.0.self_attn.q_proj"], modules_to_save=["layers.1"])),
    "ln_f of a tied model": ("gpt2", lambda: lora(GPT2, modules_to_save=["ln_f"])),
    "embedding of a tied model": ("gpt2", lambda: lora(GPT2, modules_to_save=["wte"])),
    "biases": ("bert", lambda: lora(BERT, bias="all")),
    "biases of places": ("bert", lambda: lora(BERT, bias="lora_only")),
    "biases of Conv1D": ("gpt2", lambda: lora(GPT2, bias="lora_only")),
    "all biases of gpt2": ("gpt2", lambda: lora(GPT2, bias="all")),
    "biases beside OFT": ("bert", lambda: peft.OFTConfig(oft_block_size=8, target_modules=BERT, bias="oft_only")),
    "norms": ("llama", lambda: peft.LNTuningConfig(target_modules=["input_layernorm"])),
    "norms with biases": ("gpt2", lambda: peft.LNTuningConfig(target_modules=["ln_1", "ln_f"])),
    "norms and a head": ("bert", lambda: peft.LNTuningConfig(target_modules=["LayerNorm"], modules_to_save=["classifier"])),
    "rows": ("llama", lambda: lora(LLAMA, trainable_token_indices=[1, 7, 3])),
    "rows of two tables": ("llama", lambda: lora(LLAMA, trainable_token_indices={"embed_tokens": [1, 7], "lm_head": [2]})),
    "rows of a tie": ("gpt2", lambda: lora(GPT2, trainable_token_indices=[1, 7, 3])),
    "rows of a tie named twice": ("gpt2", lambda: lora(GPT2, trainable_token_indices={"wte": [1, 7], "lm_head": [1, 7]})),
    "rows alone": ("llama", lambda: peft.TrainableTokensConfig(token_indices=[5, 0, 39], target_modules=["embed_tokens"])),
    "rows alone, tied": ("gpt2", lambda: peft.TrainableTokensConfig(token_indices=[5, 0], target_modules=["wte"])),
    "rows alone, named by default": ("llama", lambda: peft.TrainableTokensConfig(token_indices=[5, 0, 39])),
    "a tie kept": ("gpt2", lambda: lora(GPT2, modules_to_save=["wte"], ensure_weight_tying=True)),
    "rows of a tie kept": ("gpt2", lambda: lora(GPT2, trainable_token_indices=[4, 5], ensure_weight_tying=True)),
}


@pytest.mark.parametrize("size", [0.2, 2e-3], ids=["", "small"])
@pytest.mark.parametrize("case", WHOLE)
def test_read_as_the_file_has_it(case, size, tmp_path) -> None:
    name, make = WHOLE[case]
    other = trained(make(), name, size=size)
    other.save_pretrained(tmp_path / "a")
    want = outputs(other, name)
    moved = (want - outputs(base(name), name)).abs().max()
    model = base(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tt.load(model, tmp_path / "a", trainable=True)
    assert (outputs(model, name) - want).abs().max() < min(1e-5 + 1e-3 * moved, 0.01 * moved + 2e-6)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if "trimtab" not in k)
    outputs(model, name, grad=True).square().sum().backward()
    assert all(p.grad is not None for p in tt.parameters(model))
    tt.save(model, tmp_path / "own")
    own = base(name)
    tt.load(own, tmp_path / "own")
    assert torch.equal(outputs(own, name), outputs(model, name))


# peft has no config for these: biases and rows beside LoRA alone, no norms beside a head; or stores more than was trained
UNWRITTEN = {"a container", "biases beside OFT", "norms and a head", "one norm of each layer", "ln_f of a tied model"}


@pytest.mark.parametrize("case", [case for case in WHOLE if case not in UNWRITTEN])
def test_written_so_that_peft_reads_the_same(case, tmp_path) -> None:
    name, make = WHOLE[case]
    want = outputs(saved_by_peft(make(), name, tmp_path / "a"), name)
    model = base(name)
    tt.load(model, tmp_path / "a")
    tt.save(model, tmp_path / "b", format="peft")
    assert_same(outputs(peft.PeftModel.from_pretrained(base(name), tmp_path / "b").eval(), name), want)
    again = base(name)
    tt.load(again, tmp_path / "b")
    assert_same(outputs(again, name), want)


@pytest.mark.parametrize("case", sorted(UNWRITTEN))
def test_what_peft_has_no_config_for(case, tmp_path) -> None:
    name, make = WHOLE[case]
    want = outputs(saved_by_peft(make(), name, tmp_path / "a"), name)
    model = base(name)
    tt.load(model, tmp_path / "a")
    try:
        tt.save(model, tmp_path / "b", format="peft")
    except tt.Unsupported as error:
        assert "trimtab's own format" in str(error)
    else:
        assert_same(outputs(peft.PeftModel.from_pretrained(base(name), tmp_path / "b").eval(), name), want)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("share", [1e-4, 1e-2, 1.0])
def test_a_base_copy_with_other_values_is_what_the_file_says(name, share, tmp_path) -> None:
    """peft loads it into the base; here it acts below the adapter, at every end of a tie, and the base stays as it is."""
    targets = ["embed_tokens", "q_proj"] if name == "llama" else ["wte", "c_attn"]
    saved_by_peft(lora(targets), name, tmp_path / "a")
    same = base(name)
    tt.load(same, tmp_path / "a")
    assert not any(type(a.config).__name__ == "Unfreeze" for a in adapters(same))
    rewrite(tmp_path / "a", lambda t: {k: v * (1 + share) if "base_layer" in k else v for k, v in t.items()})
    want = outputs(peft.PeftModel.from_pretrained(base(name), tmp_path / "a").eval(), name)
    model = base(name)
    tt.load(model, tmp_path / "a")
    assert_same(outputs(model, name), want)
    with tt.disabled(model):
        assert torch.equal(outputs(model, name), outputs(base(name), name))
    tt.save(model, tmp_path / "own")
    own = base(name)
    tt.load(own, tmp_path / "own")
    assert_same(outputs(own, name), want)
    tt.save(model, tmp_path / "back", format="peft")
    assert_same(outputs(peft.PeftModel.from_pretrained(base(name), tmp_path / "back").eval(), name), want)


def adapters(model):
    return tt.core.state.state_of(model).groups["default"].adapters


@pytest.mark.parametrize("targets", [["q_proj", "embed_tokens"], ["q_proj"]])
def test_a_vocabulary_that_grew(targets, tmp_path) -> None:
    def grown():
        model = base("llama")
        torch.manual_seed(8)
        model.resize_token_embeddings(VOCABULARY + 5, mean_resizing=False)
        return model

    torch.manual_seed(1)
    other = peft.get_peft_model(grown(), lora(targets)).eval()
    with torch.no_grad():
        for p in other.parameters():
            if p.requires_grad:
                p.add_(0.1)
    other.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    with pytest.raises(tt.ShapeMismatch, match=r"resized before training; call model.resize_token_embeddings\(45\)|45"):
        tt.load(base("llama"), tmp_path / "a")
    model = grown()
    with torch.no_grad():  # its new rows are others; those of an untied head are in the file only if it is no target
        model.model.embed_tokens.weight[VOCABULARY:].add_(1.0)
        if len(targets) == 1:
            model.lm_head.weight[VOCABULARY:].add_(1.0)
    tt.load(model, tmp_path / "a")
    ids = torch.tensor([[1, 44, 42, 3]])
    assert_same(model(input_ids=ids).logits, other(input_ids=ids).logits)


# -- names


def renamed(change):
    return lambda tensors: {change(key): value for key, value in tensors.items()}


PREFIXES = {
    "module": lambda k: f"module.{k}",
    "module inside": lambda k: k.replace("base_model.model.", "base_model.model.module."),
    "fsdp": lambda k: k.replace("layers.1.", "layers.1._fsdp_wrapped_module."),
    "fsdp root": lambda k: f"_fsdp_wrapped_module.{k}",
    "checkpoint": lambda k: k.replace("self_attn.", "_checkpoint_wrapped_module.self_attn."),
    "compiled": lambda k: k.replace("base_model.model.", "base_model.model._orig_mod."),
    "adapter name": lambda k: k.replace(".weight", ".default.weight").replace("norm.default.", "norm.modules_to_save.default."),
    "no prefix": lambda k: k.removeprefix("base_model.model."),
    "bare backbone": lambda k: k.replace("base_model.model.model.", "base_model.model."),
    "another wrapper": lambda k: k.replace("base_model.model.", "base_model.model.policy."),
    "all at once": lambda k: "module._orig_mod." + k.replace("layers.0.", "layers.0._fsdp_wrapped_module._orig_mod."),
}


@pytest.mark.parametrize("case", PREFIXES)
def test_words_that_wrappers_leave_in_names(case, tmp_path) -> None:
    targets = ["layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"]
    want = outputs(saved_by_peft(lora(targets, modules_to_save=["norm"]), "llama", tmp_path / "a"), "llama")
    rewrite(tmp_path / "a", renamed(PREFIXES[case]))
    model = base("llama")
    tt.load(model, tmp_path / "a")
    assert_same(outputs(model, "llama"), want)


def test_a_folder_of_the_whole_model_on_its_backbone(tmp_path) -> None:
    other = saved_by_peft(lora(LLAMA), "llama", tmp_path / "a")
    model = base("llama").model
    tt.load(model, tmp_path / "a")
    ids = torch.arange(6)[None]
    want = other.base_model.model.model(input_ids=ids).last_hidden_state
    assert_same(model(input_ids=ids).last_hidden_state, want)


def test_names_that_could_be_two_places_are_refused(tmp_path) -> None:
    saved_by_peft(lora(LLAMA), "llama", tmp_path / "a")
    prefix = "base_model.model."
    for other, match in ((f"module.{prefix}", "one tensor by two names"), (f"{prefix}module.", "both mean model.layers")):
        saved_by_peft(lora(LLAMA), "llama", tmp_path / "a")
        rewrite(tmp_path / "a", lambda t, other=other: t | {k.replace(prefix, other): v + 0 for k, v in t.items()})
        with pytest.raises(tt.CheckpointMismatch, match=match):
            tt.load(base("llama"), tmp_path / "a")
    saved_by_peft(lora(LLAMA), "llama", tmp_path / "b")
    rewrite(tmp_path / "b", lambda t: {k.replace(".weight", ".a.weight"): v for k, v in t.items()}
            | {k.replace(".weight", ".b.weight"): v + 0 for k, v in t.items()})  # fmt: skip
    with pytest.raises(tt.CheckpointMismatch, match=r"several adapters \(a, b\)"):
        tt.load(base("llama"), tmp_path / "b")


def test_a_config_with_a_byte_order_mark(tmp_path) -> None:
    want = outputs(saved_by_peft(lora(LLAMA), "llama", tmp_path / "a"), "llama")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    model = base("llama")
    tt.load(model, tmp_path / "a")
    assert_same(outputs(model, "llama"), want)


def test_a_dump_of_the_whole_model(tmp_path) -> None:
    """Every tensor of peft's model, as FSDP and accelerate write it: what is the base's own needs nothing."""
    other = trained(lora(LLAMA, modules_to_save=["norm"], trainable_token_indices=[2, 5]), "llama")
    other.save_pretrained(tmp_path / "a")
    from safetensors.torch import save_file

    whole = {k: v.clone() for k, v in other.state_dict().items()}
    save_file(whole, tmp_path / "a" / "adapter_model.safetensors")
    model = base("llama")
    tt.load(model, tmp_path / "a")
    assert_same(outputs(model, "llama"), outputs(other, "llama"))
    kinds = [type(a.config).__name__ for a in adapters(model)]
    assert kinds.count("Unfreeze") == 5 and kinds.count("TokenRows") == 1


# -- contradictions


@pytest.mark.parametrize(
    ("make", "fields", "change", "match"),
    [
        (lambda: lora(LLAMA), {"trainable_token_indices": [1, 2]}, None, r"missing \(1\)"),
        (lambda: lora(LLAMA), {"target_parameters": ["experts.gate_up_proj"]}, None, r"experts.gate_up_proj"),
        (lambda: lora(LLAMA), {"modules_to_save": ["norm"]}, None, r"missing \(5\)"),
        (lambda: lora(LLAMA, modules_to_save=["norm"]), {}, lambda t: without(t, "layers.1.input"), r"missing \(1\)"),
        (lambda: lora(LLAMA, trainable_token_indices=[1, 2]), {"trainable_token_indices": [1, 2, 3]}, None, "2 rows.*names 3"),
        (lambda: lora(LLAMA, trainable_token_indices=[1, 2]), {"trainable_token_indices": [1, 99]}, None, "40 rows.*99"),
        (lambda: lora(LLAMA, trainable_token_indices=[1, 2]), {"trainable_token_indices": None}, None, "names none"),
        (lambda: lora(LLAMA, use_dora=True), {"use_dora": False}, None, r"unused \(6\)"),
        (lambda: lora(LLAMA), {"use_dora": True}, None, r"missing \(6\)"),
        (lambda: lora(LLAMA), {"rank_pattern": {"q_proj": 2}}, None, r"lora_A.weight is \(4, 32\)"),
        (lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
         {"feedforward_modules": []}, None, "feedforward_modules"),
        (lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
         {"feedforward_modules": ["k_proj", "down_proj"]}, None, "feedforward_modules"),
        (lambda: peft.OFTConfig(oft_block_size=8, target_modules=LLAMA), {"oft_block_size": 4}, None, "oft_block_size"),
        (lambda: peft.OFTConfig(r=4, oft_block_size=0, target_modules=["q_proj"]), {"r": 8}, None, "r=8"),
        (lambda: peft.BOFTConfig(boft_block_size=8, target_modules=LLAMA), {"boft_block_size": 4}, None, "boft_block_size"),
    ],
)  # fmt: skip
def test_a_config_that_contradicts_its_tensors_is_refused(make, fields, change, match, tmp_path) -> None:
    saved_by_peft(make(), "llama", tmp_path / "a")
    edit(tmp_path / "a", **fields)
    if change:
        rewrite(tmp_path / "a", change)
    with pytest.raises((tt.CheckpointMismatch, tt.ShapeMismatch), match=match):
        tt.load(base("llama"), tmp_path / "a")


def without(tensors, part):
    return {k: v for k, v in tensors.items() if part not in k}


def tied():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2}
    more = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **more, tie_word_embeddings=True))


@pytest.mark.parametrize("keep", [False, True], ids=["", "ensure_weight_tying"])
@pytest.mark.parametrize(
    "fields",
    [
        {"modules_to_save": ["embed_tokens"]}, {"modules_to_save": ["lm_head"]}, {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["embed_tokens", "q_proj"]}, {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens", "lm_head"]}, {"trainable_token_indices": [3, 4]},
    ],
)  # fmt: skip
def test_ties(fields, keep, tmp_path, monkeypatch) -> None:
    """Both ends are in the file where peft trains both."""
    import peft_models

    monkeypatch.setitem(peft_models.BASES, "tied", tied)
    config = lora(**{"targets": fields.get("target_modules", ["q_proj"]), **fields, "ensure_weight_tying": keep})
    want = outputs(saved_by_peft(config, "tied", tmp_path / "a"), "tied")
    model = base("tied")
    tt.load(model, tmp_path / "a")
    assert_same(outputs(model, "tied"), want)
    if keep and "trainable_token_indices" not in fields:
        with pytest.raises(tt.Unsupported, match="would learn apart here"):
            tt.load(base("tied"), tmp_path / "a", trainable=True)
    else:
        tt.load(base("tied"), tmp_path / "a", trainable=True)


def test_missing_biases_are_missing(tmp_path) -> None:
    saved_by_peft(lora(BERT, bias="all"), "bert", tmp_path / "a")
    rewrite(tmp_path / "a", lambda t: without(t, "layer.1.intermediate.dense.base_layer.bias"))
    with pytest.raises(tt.CheckpointMismatch, match=r"missing \(1\)"):
        tt.load(base("bert"), tmp_path / "a")
    saved_by_peft(lora(BERT, bias="lora_only"), "bert", tmp_path / "b")
    rewrite(tmp_path / "b", lambda t: without(t, "layer.1.intermediate.dense.base_layer.bias"))
    with pytest.raises(tt.CheckpointMismatch, match=r"missing \(1\)"):
        tt.load(base("bert"), tmp_path / "b")


# -- the base


def test_the_base_of_a_folder_is_checked_where_it_can_be(tmp_path) -> None:
    base("llama").save_pretrained(tmp_path / "base")
    other = peft.get_peft_model(type(base("llama")).from_pretrained(tmp_path / "base"), lora(LLAMA))
    other.save_pretrained(tmp_path / "a")
    assert config_of(tmp_path / "a")["base_model_name_or_path"] == str(tmp_path / "base")
    tt.load(base("llama"), tmp_path / "a")
    tt.load(base("llama").bfloat16(), tmp_path / "a")
    with pytest.raises(tt.CheckpointMismatch, match="another base.*rounding"):
        tt.load(base("llama", seed=5), tmp_path / "a")
    tt.load(base("llama", seed=5), tmp_path / "a", check_base=False)
    edit(tmp_path / "a", base_model_name_or_path="someone/elses")
    with pytest.warns(UserWarning, match="only its name, 'someone/elses'.*not checked"):
        tt.load(base("llama", seed=5), tmp_path / "a")


def test_what_trimtab_writes_for_peft_carries_its_base(tmp_path) -> None:
    model = base("llama")
    tt.attach(model, tt.LoRA(rank=2))
    tt.save(model, tmp_path / "a", format="peft")
    tt.load(base("llama").half(), tmp_path / "a")
    with pytest.raises(tt.CheckpointMismatch, match="another base"):
        tt.load(base("llama", seed=5), tmp_path / "a")
    tt.load(base("llama", seed=5), tmp_path / "a", check_base=False)
    peft.PeftModel.from_pretrained(base("llama"), tmp_path / "a")
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
