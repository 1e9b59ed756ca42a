"""merge_checkpoint: saved adapters written into a base on disk, one tensor at a time, into a checkpoint that transformers loads.

Nothing is held but the tensor at work (``W``, its sum in float32, the result), whatever the size of the model; tensors without an
adapter are copied byte by byte. Finished files are kept when the work is interrupted, and the next call goes on behind them.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from trimtab.artifacts.combine import check_weights, common_base
from trimtab.artifacts.folder_base import local_folder, open_folder
from trimtab.artifacts.heads import check_heads, check_sizes, common_notes, head_value
from trimtab.artifacts.merged_tensors import Made, Merge, MergedTensor, add_rows, outputs_of
from trimtab.artifacts.rules import rule_entry
from trimtab.artifacts.saved import class_of, open_saved
from trimtab.artifacts.shards import Staging
from trimtab.artifacts.updates import Place, effects_of, whole_value
from trimtab.compat import ties
from trimtab.compat.head_file import HEAD, HEAD_TENSORS, head_entry
from trimtab.compat.pretrained import Pretrained, read_files
from trimtab.compat.weight_names import lacking
from trimtab.core.errors import CheckpointMismatch, NotMergeable, TrimtabError, raise_all
from trimtab.core.folders import absent, apart
from trimtab.core.host import BiasOf
from trimtab.core.merging import INTO, report_table
from trimtab.core.state import parameter_users
from trimtab.core.table import Table

__all__ = ["merge_checkpoint"]


def merge_checkpoint(
    adapters: Sequence[str | os.PathLike] | str | os.PathLike,
    base: str | os.PathLike,
    *,
    out: str | os.PathLike,
    weights: Sequence[float] | None = None,
    rule: str = "linear",
    into: str | None = None,
    max_error: float | None = None,
    untie: bool = False,
    seed: int = 0,
    heads: str = "average",
    **parameters: Any,
) -> Table:
    """Write ``W' = W + rule(D_1, ..., D_n)`` for all tensors that saved adapters change; ``trimtab merge A --base BASE --out OUT``.

    A head that adapters bring along makes the folder a model of their class, with their labels. Where transformers has no such
    class (a linear layer on the mean of an encoder's tokens), the folder is the encoder, the head stands in a file of its own
    beside it, and the report says how to load both.

    The folder ``out`` appears whole or not at all. An interrupted merge goes on where it was when it is called again with the same
    arguments; other arguments start anew. Config, tokenizer and all other small files are copied.

    Args:
        adapters: one or several, of any method and any format that ``tt.load`` reads.
        base: a folder of transformers with safetensors, a packaged model's name, or a Hub id.
        weights, rule, seed, parameters: as in ``tt.combine``; the merged update goes into the base as it is, at full rank.
        into: for a quantised base, said explicitly: ``"dequantised"`` writes a dense checkpoint, ``"requantised"`` quantises the
            changed weights again in the same format and leaves the others.
        max_error: refuse if any tensor's relative output error, from rounding to the base's dtype, is larger.
        heads: of several adapters; see ``tt.combine``.
        untie: give a tied tensor's other users the old values. The config written then says that nothing is tied, and every
            name that it tied has a tensor of its own.

    Returns:
        The report of ``tt.merge``, a row a tensor; it is also in ``trimtab_merge.json`` beside the weights.

    Raises:
        NotMergeable: a tensor cannot be written as asked, or ``out`` exists. CheckpointMismatch: damaged or foreign files, or
        another base. NoMatch, ShapeMismatch, Unsupported: the adapters do not fit. Nothing is left at ``out`` then.
    """
    paths = [adapters] if isinstance(adapters, str | os.PathLike) else list(adapters)
    out = apart(out, [*paths, base])
    if not absent(out):
        raise NotMergeable(f"{out} exists already; choose another folder for the merged model")
    if into not in INTO:
        raise NotMergeable(f"into= must be one of {INTO}, found {into!r}")
    entry = rule_entry(rule)
    values, factors = entry.bind(parameters), check_weights(paths, weights, entry)
    check_heads(heads)
    check_sizes(paths, heads)
    model = open_folder(local_folder(base), [class_of(Path(path)) for path in paths], paths)
    opened = [open_saved(path, model) for path in paths]
    common_base(opened)
    title = " + ".join(s.group.name for s in opened)
    notes = common_notes(opened, heads)
    work = Merge(model, opened, factors, entry, values, into, max_error, seed, report_table(title), heads, notes)
    work.tensors = _plan(work, untie)
    made = {
        "adapters": [{"name": s.group.name, "mark": s.mark} for s in opened], "weights": factors, "rule": rule,
        "parameters": values, "seed": seed, "into": into, "max_error": max_error, "untie": untie,
        "heads": heads,
    }  # fmt: skip
    with Staging(out, made, model.files) as stage:
        made_of = Made(work)
        outputs = outputs_of(work, made_of)
        metadata = {header.file.name: header.metadata for header in model.files} | {HEAD_TENSORS: {"format": "pt"}}
        if model.codec is not None and into == "dequantised":
            metadata = dict.fromkeys(metadata, {"format": "pt"})
        for name in [n for n in metadata if n != HEAD_TENSORS or any(o.file == n for o in outputs)]:
            if name in stage.done:
                add_rows(work.report, stage.done[name])
                continue
            before = len(work.report)
            stage.write(name, [output for output in outputs if output.file == name], metadata[name])
            stage.record(name, [list(row) for row in work.report.rows[before:]])
            made_of.forget()
        record = {**made, "base": str(base), "report": work.report.records()}
        alone = {o.name: o.shape for o in outputs if o.file == HEAD_TENSORS}
        if alone:
            name = opened[0].base["class"]
            stage.put(HEAD, head_entry(name, model.prefix.rstrip("."), notes, alone))
            work.report.notes.append(_how_to_load(work, name, list(alone), out))
        kept = [output for output in outputs if output.file != HEAD_TENSORS]
        stage.finish(model.folder, kept, _config(work), record, partial(_check_whole, work))
    return work.report


def _plan(work: Merge, untie: bool) -> list[MergedTensor]:
    """The tensors that change, after all checks that need no values."""
    found: dict[tuple[str, str], MergedTensor] = {}
    for number, effect in effects_of(work.opened):
        site = effect.site
        here = found.setdefault((site.path, site.tensor), MergedTensor(site, {}))
        here.chains.setdefault(number, []).append([effect])
    raise_all([problem for tensor in found.values() for problem in _place(work, tensor, untie)])
    tied = [tensor for tensor in found.values() if tensor.tied]
    raise_all(ties.never_called(work.base.root, [tensor.site for tensor in tied], prefix=work.base.prefix))
    if tied:
        _untie(work, tied)
    return [tensor for tensor in found.values() if tensor.group is not None or work.heads != "drop"]


def _place(work: Merge, tensor: MergedTensor, untie: bool) -> list[TrimtabError]:
    """Find the tensor in the checkpoint; what stands against it."""
    site, base = tensor.site, work.base
    tensor.name, *others = base.parameter_names(site.path, site.tensor)
    tensor.group = base.group(site.path, site.tensor)
    effects = [chain[0] for chains in tensor.chains.values() for chain in chains]
    if others and not untie:
        return [
            NotMergeable(
                f"{site.name} is tied to {others[0]}, so that the merge would change both; untie=True (--untie) gives the merged "
                "place a tensor of its own"
            )
        ]
    tensor.tied = tuple(others)
    if tensor.group is not None:
        stored = base.stored_shape(tensor.group)
        if stored is not None and stored != tuple(site.parameter().shape):
            needed = tuple(site.parameter().shape)
            return [CheckpointMismatch(f"{site.name} is {stored} in {base.folder}, and its config makes it {needed}")]
        if work.base.codec is not None and work.into is None and any(key in base.parts for key in tensor.group.keys):
            return [
                NotMergeable(
                    f'{site.name} is quantised in {base.folder}; say what it becomes: into="dequantised" or into="requantised"'
                )
            ]
        return []
    if all(isinstance(effect, BiasOf) for effect in effects):
        return [NotMergeable(f"{site.path} has no bias in this architecture, and {site.name} would need one; merge it in memory")]
    if any(whole_value(effect) is None for effect in effects):
        return [NotMergeable(f"{base.folder} holds no values for {site.name}, so that there is nothing to merge into")]
    place = Place(site, [(number, chains[0][0]) for number, chains in tensor.chains.items()])
    try:
        head_value(place, [whole_value(effect) for _, effect in place.effects], work.weights, work.heads)
    except TrimtabError as error:
        return [error]
    return []


def _untie(work: Merge, tensors: list[MergedTensor]) -> None:
    """Turn the flags off that tie ``tensors``, where they do nothing else, and note the names that need a tensor of their own.

    Raises:
        NotMergeable: they are tied whatever the config says.
    """
    base, names = work.base, [t.name for t in tensors]
    flags = ties.flag_paths(base.model, ties.flags(base.model, names))
    there = {*base.names.groups, *names}
    if ties.separable(base.model, flags, base.config):
        config = copy.deepcopy(base.model.config)
        for path in flags:
            setattr(functools.reduce(getattr, path, config), ties.FLAG, False)
        work.flags, work.model = flags, ties.twin(base.model, config)
        shared = {name: names for names in parameter_users(work.model).values() for name in names}
    else:  # transformers leaves tensors untied that a checkpoint holds, and that differ; then all of them must be there
        listed = {name for pairs in ties.tied_pairs(base.model).values() for pair in pairs for name in pair}
        shared = {name: [name] if name in listed else group for group in base.ties for name in group}
    if still := [name for name in names if len(shared[name]) > 1]:
        name, other = shared[still[0]][:2]
        raise NotMergeable(f"{name} and {other} are tied in {base.class_name} whatever its config says; merge it in memory")
    for name in [name for group in base.ties for name in group]:
        if not there.intersection(shared[name]) and base.group(*_at(base, name)) is not None:
            work.loose.append(name)
            there.add(name)


def _at(base: Pretrained, name: str) -> tuple[str, str]:
    """Path in ``root`` and tensor of a parameter of the model."""
    path, _, tensor = name.rpartition(".")
    return base.prefix + path, tensor


def _check_whole(work: Merge, folder: Path) -> None:
    """Refuse a checkpoint that lacks a tensor which the base had: transformers would start it at random.

    Raises:
        NotMergeable: with the names.
    """
    base = work.base
    keys = [key for header in read_files(folder) for key in header.entries]  # a head in a file of its own is not among them
    if base.codec is not None and work.into != "dequantised":
        inside = {part: name for name, parts in base.parts.items() for part in parts}
        keys = list(dict.fromkeys(inside.get(key, key) for key in keys))
    gone = lacking(work.model or base.model, keys)
    if "architectures" not in _config(work):  # else the class is another one than the base was saved from
        gone -= lacking(base.model, list(base.names.groups_by_key))
    if gone:
        raise NotMergeable(
            f"the merged checkpoint would lack {', '.join(sorted(gone)[:3])}{' ...' if len(gone) > 3 else ''}, which transformers "
            f"would start at random in a {base.class_name}; {base.folder} has no values for them, and the adapters bring none"
        )


def _config(work: Merge) -> dict[str, Any]:
    """What changes in ``config.json``."""
    base, config = work.base, {}
    if base.codec is not None and work.into == "dequantised":
        config["quantization_config"] = None
    for path in work.flags:
        here, stored = config, base.config
        for key in path:
            stored = stored.get(key, {})
            here = here.setdefault(key, dict(stored))
        here[ties.FLAG] = False
    heads = [t for t in work.tensors if t.group is None]
    if heads and not base.prefix:  # a head that the class has and the checkpoint had not
        config["architectures"] = [base.class_name]
    labels = work.notes.get("labels")
    if labels is None and heads and base.labels is not None:
        labels = [f"LABEL_{i}" for i in range(base.labels)]
    if labels is not None and not base.prefix:  # beside the prefix is a head that is no part of this config's model
        config["id2label"] = {str(i): label for i, label in enumerate(labels)}
        config["label2id"] = {label: i for i, label in enumerate(labels)}
        if "pad_token_id" in work.notes:
            config["pad_token_id"] = work.notes["pad_token_id"]
    return config


def _how_to_load(work: Merge, class_name: str, names: list[str], out: Path) -> str:
    """What to do with a folder that no class of transformers loads whole."""
    pooling = work.notes.get("pooling")
    how = f", on the {'first' if pooling == 'cls' else pooling} of its tokens" if pooling else ""
    use = "put them together as you did for training"
    if class_name == "PooledClassifier":
        use = f'trimtab.tasks.text_classification.PooledClassifier.from_merged("{out}") loads both'
    kind = work.base.class_name
    return (
        f"no class of transformers is this {class_name} ({', '.join(names)} beside a {kind}{how}): {out} is the merged {kind} for "
        f"transformers, and the head stands in {HEAD_TENSORS} with {HEAD}; {use}"
    )
