"""The parts of instruction tuning, one a file: rows, templates, encoding, packing, generation, readers, scores."""
