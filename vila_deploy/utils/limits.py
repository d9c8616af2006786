"""Limits of what is processed at a time, which bound the memory; the plan uses the same."""

from __future__ import annotations

# Tokens of whole sequences that go through a decoder layer at once.
CHUNK_TOKENS = 4096
# Larger matrices of activations lie in a file beside the output.
SPILL_BYTES = 1 << 30
# Output channels that are quantized at once; and, while their scales are refitted, so many that
# the equations stay in a processor's cache, or at least are not the peak of memory.
ROWS_AT_A_TIME = 4096
TILE_ROWS, SOLVE_BYTES = 512, 64 << 20
# Sequences of calibration and of evaluation data; tokens of a sequence besides its images.
MAX_CALIBRATION_SEQUENCES, MAX_EVALUATION_SEQUENCES = 128, 64
MAX_TOKENS = 512
# Tokens whose logits are compared at once; rows of the head that are multiplied at once.
LOGIT_ROWS, HEAD_ROWS = 128, 8192
# Tokens of calibration data on which the sensitivity of each linear is measured.
SENSITIVITY_TOKENS = 4096
