"""A transformers checkpoint of a model with adapters: what from_pretrained leaves out is beside it, and said."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors import safe_open

import trimtab as tt
from artifacts.bases import make
from artifacts.saved_adapters import shake

IDS = torch.arange(6)[None]
AGAIN = """
import sys, warnings, torch, transformers
import trimtab as tt
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
name = tt.load(model, sys.argv[1])
torch.save((name, model(torch.arange(6)[None]).logits.detach()), sys.argv[2])
"""


def attached(*names: str) -> torch.nn.Module:
    model = make("llama")
    for i, name in enumerate(names):
        tt.attach(model, tt.LoRA(rank=2), targets="attn.q", name=name, rng=torch.Generator().manual_seed(i))
        with torch.no_grad():
            for parameter in tt.parameters(model, name):
                parameter.add_(0.1 * (i + 1))
    return model


def test_a_saved_model_opens_again_with_its_adapter_in_a_new_process(tmp_path) -> None:
    model = attached("math")
    with pytest.warns(UserWarning, match=r"opens the bare base .* tt.load\(model, '.*m'\)"):
        model.save_pretrained(tmp_path / "m")
    subprocess.run([sys.executable, "-c", AGAIN, str(tmp_path / "m"), str(tmp_path / "out.pt")], check=True, capture_output=True)
    name, logits = torch.load(tmp_path / "out.pt")
    assert name == "math"
    torch.testing.assert_close(logits, model(IDS).logits)


def test_a_checkpoint_of_the_trainer_has_its_adapter_beside_and_resumes(tmp_path) -> None:
    import transformers as t

    def trainer(model, steps: int) -> t.Trainer:
        rows = [{"input_ids": torch.arange(6) + i, "labels": torch.arange(6) + i} for i in range(8)]
        how = t.TrainingArguments(
            str(tmp_path), max_steps=steps, save_steps=2, per_device_train_batch_size=2, report_to=[], disable_tqdm=True,
            use_cpu=True, learning_rate=0.05,
        )  # fmt: skip
        return t.Trainer(model, how, train_dataset=rows)

    model = attached("math")
    with pytest.warns(UserWarning, match="opens the bare base"):
        trainer(model, 4).train()
    opened = t.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4").eval()
    tt.load(opened, tmp_path / "checkpoint-4")
    torch.testing.assert_close(opened(IDS).logits, model.eval()(IDS).logits)
    again = attached("math")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(again, 4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    torch.testing.assert_close(again.eval()(IDS).logits, model(IDS).logits)


@pytest.mark.filterwarnings("ignore")
def test_several_are_told_apart_by_their_names(tmp_path) -> None:
    model = attached("math", "a.b/c")
    model.save_pretrained(tmp_path / "m")
    fresh = make("llama")
    with pytest.raises(tt.NoMatch, match="the adapters 'a.b/c', 'math' beside its weights; say which one"):
        tt.load(fresh, tmp_path / "m")
    for name in ("math", "a.b/c"):
        tt.load(fresh, tmp_path / "m", name=name)
    tt.activate(fresh, "math", "a.b/c")
    torch.testing.assert_close(fresh(IDS).logits, model(IDS).logits)


def test_merged_adapters_are_in_the_weights_and_the_hook_goes_with_the_last_adapter(tmp_path) -> None:
    model = attached("math")
    wanted = model(IDS).logits
    tt.merge(model, "math")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "m")
        assert not (tmp_path / "m" / "trimtab").exists()
        opened = type(make("llama")).from_pretrained(tmp_path / "m").eval()
        torch.testing.assert_close(opened(IDS).logits, wanted)
        tt.unmerge(model, "math")
        tt.detach(model, "math")
        assert "save_pretrained" not in model.__dict__
        model.save_pretrained(tmp_path / "n")
    with safe_open(tmp_path / "n" / "model.safetensors", "pt") as stream:
        assert not any("trimtab" in key for key in stream.keys())


def test_copies_save_their_own_adapter(tmp_path) -> None:
    model = attached("math")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        shake(twin, 3)
        with pytest.warns(UserWarning, match="opens the bare base"):
            twin.save_pretrained(tmp_path / "m")
        fresh = make("llama")
        tt.load(fresh, tmp_path / "m")
        torch.testing.assert_close(fresh(IDS).logits, twin(IDS).logits)
        assert not torch.equal(twin(IDS).logits, model(IDS).logits)


def test_what_cannot_be_saved_is_said_and_the_checkpoint_is_written(tmp_path) -> None:
    model = attached("math")
    with torch.no_grad():
        tt.parameters(model)[0].fill_(float("nan"))
    with pytest.warns(UserWarning, match="not the adapter 'math': .*NaN"):
        model.save_pretrained(tmp_path / "m")
    assert (tmp_path / "m" / "model.safetensors").is_file()
