"""convert: to peft and back for every method that peft holds, as a LoRA with its error for the others."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from bases import make, save
from saved_adapters import X, adapter, dense_sum, merged_update, net
from torch import nn

import trimtab as tt

pytestmark = pytest.mark.filterwarnings("ignore")
Q = "layers.0.attn.q_proj"

# what peft has itself: (method, peft's type)
NATIVE = [
    (tt.LoRA(rank=2, dropout=0.1), "LORA"), (tt.RsLoRA(rank=2), "LORA"), (tt.DoRA(rank=2), "LORA"), (tt.PiSSA(rank=2), "LORA"),
    (tt.OLoRA(rank=2), "LORA"), (tt.AdaLoRA(rank=2), "ADALORA"), (tt.LoHa(rank=2), "LOHA"), (tt.LoKr(rank=2), "LOKR"),
    (tt.OFT(block_size=4), "OFT"), (tt.BOFT(block_size=4, factors=1), "BOFT"), (tt.VeRA(rank=4), "VERA"),
    (tt.FourierFT(coefficients=20), "FOURIERFT"), (tt.MiSS(rank=4), "MISS"), (tt.Bone(rank=4), "MISS"), (tt.Bat(rank=4), "MISS"),
    (tt.IA3(), "IA3"), (tt.NormTuning(), "LN_TUNING"),
]  # fmt: skip
NAMES = [type(method).__name__ for method, _ in NATIVE]


@pytest.mark.parametrize(("method", "kind"), NATIVE, ids=NAMES)
@pytest.mark.parametrize("base", ["none", "live"])
def test_to_peft_and_back(method, kind, base, tmp_path) -> None:
    targets = None if kind in ("IA3", "LN_TUNING") else "attn.q | mlp.down"
    source = adapter(tmp_path / "a", method, 1, targets)
    mine = net()
    tt.load(mine, source)
    expected = mine(X)
    assert (expected - net()(X)).abs().max() > 1e-3
    report = tt.convert(source, tmp_path / "p", to="peft", base=net() if base == "live" else None)
    assert set(report.column("becomes")) == {kind} and set(report.column("error")) == {0.0}
    assert json.loads((tmp_path / "p" / "adapter_config.json").read_text())["peft_type"] == kind
    theirs = peft.PeftModel.from_pretrained(net(), tmp_path / "p").eval()(X)
    torch.testing.assert_close(theirs, expected, atol=1e-5, rtol=1e-5)
    if base == "none" and kind not in ("LORA", "ADALORA"):
        with pytest.raises(tt.Unsupported, match="say which base"):
            tt.convert(tmp_path / "p", tmp_path / "b")
        return
    tt.convert(tmp_path / "p", tmp_path / "b", base=net() if base == "live" else None, name="again")
    model = net()
    assert tt.load(model, tmp_path / "b") == "again"
    torch.testing.assert_close(model(X), expected, atol=1e-5, rtol=1e-5)
    if base == "live" and kind != "LN_TUNING":  # it now knows its base; all new norms are alike
        with pytest.raises(tt.CheckpointMismatch, match="another base"):
            tt.load(net(seed=5), tmp_path / "b")


def test_a_base_folder_of_shapes_serves_all(tmp_path) -> None:
    """From a checkpoint's headers: no weight is read where none is needed, and PiSSA's start is computed where it is."""
    base = save(make("llama"), tmp_path / "base")
    for start in (True, "pissa"):
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=start)
        theirs = peft.get_peft_model(make("llama"), config)
        with torch.no_grad():
            for parameter in theirs.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        theirs.save_pretrained(tmp_path / str(start))
        tt.convert(tmp_path / str(start), tmp_path / f"t{start}", base=base)
        model = make("llama")
        tt.load(model, tmp_path / f"t{start}")
        ids = torch.arange(8)[None]
        torch.testing.assert_close(model(ids).logits, theirs.eval()(input_ids=ids).logits, atol=1e-5, rtol=1e-4)
        tt.convert(tmp_path / f"t{start}", tmp_path / f"p{start}", to="peft", base=base)
        again = peft.PeftModel.from_pretrained(make("llama"), tmp_path / f"p{start}").eval()
        torch.testing.assert_close(again(input_ids=ids).logits, model(ids).logits, atol=1e-5, rtol=1e-4)
    with pytest.raises(tt.Unsupported, match="starts from the base's weights"):
        tt.convert(tmp_path / "pissa", tmp_path / "x")


@pytest.mark.parametrize("to", ["peft", "trimtab"])
@pytest.mark.parametrize(
    "method", [tt.OFT(block_size=4), tt.SoKA(), tt.HUT(rank=2, affine=False), tt.LoHa(rank=4)], ids=lambda m: type(m).__name__
)
def test_as_a_lora_at_a_rank_or_an_error(method, to, tmp_path) -> None:
    """The error is that of the best approximation, from an exact SVD, and is kept in the file."""
    source = adapter(tmp_path / "a", method, 1)
    exact = dense_sum([source], [1.0], Q)
    s = torch.linalg.svdvals(exact)
    for options in ({"rank": 3}, {"max_error": 0.25}):
        out = tmp_path / "-".join(options)
        report = tt.convert(source, out, to=to, base=net(), **options)
        row = next(row for row in report if row["path"] == Q)
        k = row["rank"]
        assert row["error"] == pytest.approx((s[k:].norm() / s.norm()).item(), abs=1e-6)
        if "rank" in options:
            assert k == 3
        else:
            assert row["error"] <= 0.25 and (k == 1 or s[k - 1 :].norm() / s.norm() > 0.25)
        u, sv, vh = torch.linalg.svd(exact)
        best = (u[:, :k] * sv[:k]) @ vh[:k]
        torch.testing.assert_close(merged_update(out, Q), best, atol=1e-5, rtol=1e-4)
        if to == "peft":
            assert json.loads((out / "adapter_config.json").read_text())["peft_type"] == "LORA"
        else:
            assert json.loads((out / "manifest.json").read_text())["made"]["errors"][Q] == row["error"]


def test_what_peft_cannot_hold_says_so(tmp_path) -> None:
    source = adapter(tmp_path / "a", tt.HUT(rank=2), 1)
    with pytest.raises(tt.Unsupported, match=r"Or store it as a LoRA: rank=\.\.\. \(--rank\), or max_error"):
        tt.convert(source, tmp_path / "p", to="peft", base=net())
    with pytest.raises(tt.Unsupported, match="say which base"):
        tt.convert(source, tmp_path / "p", to="peft", rank=4)
    with pytest.raises(tt.Unsupported, match="nearest: peft"):
        tt.convert(source, tmp_path / "p", to="peftt")
    assert not (tmp_path / "p").exists()
    (tmp_path / "p").mkdir()
    with pytest.raises(tt.NotMergeable, match="exists already"):
        tt.convert(source, tmp_path / "p")


class Convs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.stem(x).mean((2, 3)))


def test_a_kernel_needs_the_base(tmp_path) -> None:
    source = adapter(tmp_path / "a", tt.LoRA(rank=2), 1, ["stem", "head"], model=Convs())
    with pytest.raises(tt.Unsupported, match="stem is a convolution, whose kernel's shape the base alone knows"):
        tt.convert(source, tmp_path / "p", to="peft")
    tt.convert(source, tmp_path / "p", to="peft", base=Convs())
    model, x = Convs(), torch.randn(2, 3, 6, 6)
    tt.load(model, source)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(Convs(), tmp_path / "p").eval()(x), model(x))
    with pytest.raises(tt.Unsupported, match="does not tell its layer"):
        tt.convert(tmp_path / "p", tmp_path / "b")


def test_peft_folders_are_checked_without_a_base(tmp_path) -> None:
    source = adapter(tmp_path / "a", tt.LoRA(rank=2), 1)
    tt.convert(source, tmp_path / "p", to="peft")
    file = tmp_path / "p" / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-7])
    with pytest.raises(
        tt.CheckpointMismatch, match=rf"adapter_model\.safetensors is truncated: .* ends at byte {len(whole) - 7:,}"
    ):
        tt.convert(tmp_path / "p", tmp_path / "b")
    for path, match in ((tmp_path / "nothing", "does not exist"), (tmp_path, "holds no trimtab adapter")):
        with pytest.raises(tt.CheckpointMismatch, match=match):
            tt.convert(path, tmp_path / "b")


def test_norms_that_do_not_fit_are_listed(tmp_path) -> None:
    source = adapter(tmp_path / "a", tt.NormTuning(), 1, None)
    tt.convert(source, tmp_path / "p", to="peft")
    from safetensors.torch import load_file, save_file

    file = tmp_path / "p" / "adapter_model.safetensors"
    good = load_file(file)
    key = "base_model.model.layers.0.norm.ln_tuning_layers.weight"
    for change, error, match in (
        (lambda t: {k: v for k, v in t.items() if k != key}, tt.CheckpointMismatch, r"missing \(1\)"),
        (lambda t: t | {"base_model.model.x": torch.zeros(1)}, tt.CheckpointMismatch, r"unused \(1\)"),
        (lambda t: t | {key: torch.zeros(3)}, tt.ShapeMismatch, "is .3,. in"),
        (lambda t: t | {key.replace("0", "7"): torch.zeros(16)}, tt.NoMatch, r"layers\.7\.norm"),
    ):
        save_file(change(good), file)
        with pytest.raises(error, match=match):
            tt.load(net(), tmp_path / "p")
