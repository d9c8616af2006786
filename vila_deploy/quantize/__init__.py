"""Quantize the language model of a checkpoint, one decoder layer in memory at a time."""
