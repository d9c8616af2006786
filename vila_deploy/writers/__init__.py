"""What writes a checkpoint: a module for each on-disk format, listed in `registry`."""
