"""The prediction head that adapter-hub's ``adapters`` saves beside an adapter: ``head_config.json`` and its tensors.

The head of a class of transformers (``config`` null) has that class' own names and is put in the place of this model's, as
``tt.Unfreeze`` would learn it. A head of ``adapters``' own classes (``heads.<name>.<i>...``) is a stack of layers that
no class of transformers has; it is refused unless it is left out on purpose. Facts: adapter-hub/adapters src/adapters/loading.py
(PredictionHeadLoader), src/adapters/utils.py, src/adapters/heads/base.py.
"""

from __future__ import annotations

from pathlib import Path

from trimtab.compat.foreign import Filling, read_tensors
from trimtab.core.errors import CheckpointMismatch, ShapeMismatch, Unsupported
from trimtab.core.reading import read_json
from trimtab.core.registry import get

__all__ = ["read_head"]

CONFIG = "head_config.json"
EMBEDDINGS = "embedding.pt"
FILES = ("model_head.safetensors", "pytorch_model_head.bin")
_WITHOUT = "load it with head=False (--no-head) to leave the head out"


def read_head(filling: Filling, path: Path) -> None:
    """Add the head in the folder ``path``, if there is one, to what is read; what does not fit is noted.

    Raises:
        CheckpointMismatch: one of its two files lacks, or is damaged.
    """
    if (path / EMBEDDINGS).exists():
        filling.problems.append(
            Unsupported(f"{path} holds embeddings beside the adapter ({EMBEDDINGS}), which are not read; put them into the base")
        )
    file = next((path / name for name in FILES if (path / name).is_file()), None)
    config = path / CONFIG
    if file is None and not config.exists():
        return
    if file is None:
        raise CheckpointMismatch(f"{path} holds a prediction head without its tensors: it lacks {' and '.join(FILES)}; {_WITHOUT}")
    about = read_json(config) if config.exists() else {}
    if not isinstance(about, dict):
        raise CheckpointMismatch(f"{config} is damaged: it is no JSON object")
    stored = read_tensors(file)
    if about.get("config") or any(key.startswith("heads.") for key in stored):
        kind = about["config"].get("head_type", "unknown") if isinstance(about.get("config"), dict) else "unknown"
        filling.problems.append(
            Unsupported(
                f"{file} holds a prediction head of adapters' own ({kind}, of {about.get('model_class', 'an unknown class')}), "
                f"whose layers a {type(filling.root).__name__} does not have; {_WITHOUT}"
            )
        )
        return
    filling.keys += stored
    for key, value in stored.items():
        module, _, tensor = key.rpartition(".")
        if module not in filling.modules or filling.modules[module]._parameters.get(tensor) is None:
            filling.problems.append(
                Unsupported(
                    f"{file} holds {key} of a {about.get('model_class', 'head')}, which a {type(filling.root).__name__} does not "
                    f"have; load the base with that class, or {_WITHOUT}"
                )
            )
            continue
        site = filling.site(module, tensor)
        own = site.parameter()
        if tuple(own.shape) != tuple(value.shape):
            filling.problems.append(
                ShapeMismatch(
                    f"{key} is {tuple(value.shape)} in {file}, {tuple(own.shape)} in this model; load the base with as many labels "
                    f"({about.get('num_labels', value.shape[0] if value.dim() else 1)}), or {_WITHOUT}"
                )
            )
            continue
        filling.put(site, get("Unfreeze")(), {"value": site.matrix(value)}, [key])
