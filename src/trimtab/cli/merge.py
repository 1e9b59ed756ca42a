"""trimtab merge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["command"]


def command(
    adapters: Annotated[list[Path] | None, typer.Argument(help="Saved adapters: folders or files.")] = None,
    base: Annotated[str | None, typer.Option("--base", help="all-minilm-l6-v2, a model folder, or a Hub id.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The folder to write; it must not exist.")] = None,
    kind: Annotated[
        str | None, typer.Option("--as", help="model or adapter; the default is a model where --base is given, else an adapter.")
    ] = None,
    rule: Annotated[str, typer.Option("--rule", help="How several become one; see --rules.")] = "linear",
    weights: Annotated[str | None, typer.Option("--weights", help="One an adapter, as 0.7,-0.3; default 1/n each.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="A parameter of the rule, as density=0.3.")] = None,
    rank: Annotated[int | None, typer.Option("--rank", help="Of an adapter's places; default: exact.")] = None,
    max_error: Annotated[
        float | None,
        typer.Option("--max-error", help="Adapter: what the rank may cost at a place. Model: what rounding may cost there."),
    ] = None,
    into: Annotated[str | None, typer.Option("--into", help="For a quantised base: dequantised or requantised.")] = None,
    untie: Annotated[bool, typer.Option("--untie", help="Give a tied tensor's other users the old values.")] = False,
    name: Annotated[str | None, typer.Option("--name", help="Of the new adapter; default: the names joined with +.")] = None,
    format: Annotated[str, typer.Option("--format", help="Of the new adapter: trimtab or peft.")] = "trimtab",
    seed: Annotated[int, typer.Option("--seed", help="Of rules that draw.")] = 0,
    heads: Annotated[
        str, typer.Option("--heads", help="Heads that the base has no values for: average, first (the first adapter's) or drop.")
    ] = "average",
    rules: Annotated[bool, typer.Option("--rules", help="List the rules, and stop.")] = False,
) -> None:
    """Merge adapters: into the base (a model folder that transformers loads), or several into one adapter.

    An interrupted merge into a base goes on where it was when the same command is run again.
    """
    from trimtab.artifacts.combine import combine
    from trimtab.artifacts.merge_base import merge_checkpoint
    from trimtab.artifacts.rules import merge_rules
    from trimtab.compat.sketch_folder import is_sketch
    from trimtab.core.errors import ShapeMismatch, Unsupported
    from trimtab.training.models import resolve
    from trimtab.training.strict import assignments

    if rules:
        print(merge_rules())
        return
    if not adapters or out is None:
        raise Unsupported("trimtab merge needs at least one adapter and --out DIR; trimtab merge --help shows the forms")
    kind = kind or ("adapter" if base is None else "model")
    if kind not in ("adapter", "model"):
        raise Unsupported(f"--as is adapter or model; found {kind!r}")
    if kind == "model" and base is None:
        raise Unsupported("a merged model needs its base: --base MODEL")
    try:
        numbers = None if weights is None else [float(w) for w in weights.split(",")]
    except ValueError:
        raise ShapeMismatch(f"weights are numbers with commas between them, as 0.7,-0.3; found {weights!r}") from None
    more = assignments(settings or (), "density=0.3")
    _unfit({"--rank": rank, "--name": name, "--format": None if format == "trimtab" else format}, kind == "adapter", kind)
    _unfit({"--into": into, "--untie": untie or None}, kind == "model", kind)
    common: dict[str, Any] = {"weights": numbers, "rule": rule, "max_error": max_error, "seed": seed, "heads": heads, **more}
    if kind == "model" and len(adapters) == 1 and is_sketch(resolve(base)):
        print(_merge_modules(adapters[0], base, out, into=into, max_error=max_error, untie=untie))
    elif kind == "model":
        print(merge_checkpoint(adapters, base, out=out, into=into, untie=untie, **common))
    else:
        if out.exists():
            raise Unsupported(f"{out} exists already; choose another folder for the merged adapter")
        print(combine(adapters, out, rank=rank, base=base, name=name, format=format, **common))
    print(f"wrote {out}")


def _merge_modules(adapter: Path, base: str, out: Path, *, into: str | None, max_error: float | None, untie: bool) -> Any:
    """Merge in memory, into a base that is a sketch."""
    import transformers

    import trimtab as tt
    from trimtab.compat.sketched import dense_
    from trimtab.core.checkpoint import inspect
    from trimtab.core.errors import NotMergeable
    from trimtab.schedules.restoration import load
    from trimtab.training.files import new_directory
    from trimtab.training.models import load_pretrained, resolve

    if out.exists():
        raise NotMergeable(f"{out} exists already; choose another folder for the merged model")
    cls = getattr(transformers, inspect(adapter)["base"]["class"], transformers.AutoModel)
    model = load_pretrained(cls.from_pretrained, base)
    report = tt.merge(model, load(model, adapter, mode="mask"), into=into, max_error=max_error, untie=untie, permanent=True)
    if into == "requantised":
        tt.save_base(model, resolve(base), out)
        return report
    with new_directory(out) as draft:
        dense_(model).save_pretrained(draft)
        load_pretrained(transformers.AutoTokenizer.from_pretrained, base).save_pretrained(draft)
    return report


def _unfit(options: dict[str, Any], fits: bool, kind: str) -> None:
    """Refuse options that say nothing about what is made: they would be ignored."""
    from trimtab.core.errors import Unsupported

    given = [name for name, value in options.items() if value is not None]
    if given and not fits:
        other = "model" if kind == "adapter" else "adapter"
        raise Unsupported(f"{', '.join(given)} is about a merged {other}; what is made here is the {kind} (--as)")
