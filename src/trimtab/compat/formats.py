"""All formats of saved adapters besides trimtab's own. Importing this module fills ``trimtab.core.checkpoint.FORMATS``.

A format is an object with

- ``test(path) -> bool``: whether what is there, a folder or a file, is of this format; ``CheckpointMismatch`` for a damaged file;
- ``read(root, path, *, trainable=False, **options) -> (name, adapters, values)``: adapters with shapes only on the modules of
  ``root``, and their tensors by ``<path>.<slot>.<name>``; strict: every stored tensor is used, every needed one is there;
- ``load(root, path, *, name, trainable, active, check_base=True) -> str``: the same, attached; ``check_base``: whether what the
  file tells of its base's values is compared with ``root``'s;
- ``save(root, path, name, **options) -> Path``: writes the adapter ``name`` of ``root``, or raises ``Unsupported``;
- ``inspect(path) -> dict``: its manifest, if it has one, or raises ``Unsupported``;
- ``places(path) -> list[dict]``: entries as a manifest's, so that it can be read without a base, or raises ``Unsupported``.
"""

from __future__ import annotations

import trimtab.artifacts.packed
import trimtab.compat.adapterhub
import trimtab.compat.diffusers_write
import trimtab.compat.kohya
import trimtab.compat.mlx
import trimtab.compat.peft
import trimtab.compat.torchtune  # noqa: F401

__all__: list[str] = []
