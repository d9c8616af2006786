"""VILA checkpoints, plain or quantized, under vLLM: a plugin, and the command that starts it."""
