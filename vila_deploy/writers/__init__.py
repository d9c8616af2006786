"""Writers of quantized checkpoints; `formats.registry` names those that are not the default."""
