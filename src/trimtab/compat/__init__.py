"""Everything that knows another library: quantised storages, peft's checkpoints, transformers' oddities."""
