"""A small LLaMA with its own tokenizer, trained here on public text: the base for tests, examples and benchmarks of decoders.

    from examples import tiny_lm
    model, tokenizer = tiny_lm.load()      # trains it first, if this machine has not done so yet
    folder = tiny_lm.folder()              # for `model: <folder>` in a configuration

``python -m examples.tiny_lm`` (``make tiny-lm``) trains it ahead and prints the folder.
"""

from examples.tiny_lm.build import LARGE, Recipe, folder, load

__all__ = ["LARGE", "Recipe", "folder", "load"]
