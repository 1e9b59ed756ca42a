"""``python -m examples.tiny_lm``: train the small LLaMA, unless it is there, and print where it is and how well it fits."""

from __future__ import annotations

import argparse
import dataclasses
import json

import torch

from examples.tiny_lm.build import LARGE, RECORD, Recipe, folder


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.split(":", 1)[1].strip())
    parser.add_argument("--large", action="store_true", help="about 50 million parameters; needs an accelerator")
    parser.add_argument("--steps", type=int, help="optimizer steps, instead of the recipe's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own choice if left out")
    given = parser.parse_args()
    if given.large and not torch.accelerator.is_available():
        parser.error("--large takes days on a CPU, and this machine has no accelerator; leave it out")
    if given.threads:
        torch.set_num_threads(given.threads)
    recipe = dataclasses.replace(LARGE if given.large else Recipe(), seed=given.seed)
    if given.steps:
        recipe = dataclasses.replace(recipe, steps=given.steps)
    path = folder(recipe, show=True)
    print(json.dumps(json.loads((path / RECORD).read_text("utf-8")), indent=1))
    print(path)


if __name__ == "__main__":
    main()
