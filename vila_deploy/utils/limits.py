"""How much is worked on at a time: what bounds the memory, for those who do it and for the plan."""

from __future__ import annotations

# Tokens of whole sequences that go through a decoder layer at once.
CHUNK_TOKENS = 4096
# Larger matrices of activations lie in a file beside the output.
SPILL_BYTES = 1 << 30
# Output channels that are rounded at once, and so many of them that what the equations of their
# scales take stays in a processor's cache, or at least is not the most memory of all.
ROWS_AT_A_TIME = 4096
TILE_ROWS, SOLVE_BYTES = 512, 64 << 20
# Of the calibration data, of the evaluation's, and tokens of a sequence besides its pictures.
MAX_CALIBRATION_SEQUENCES, MAX_EVALUATION_SEQUENCES = 128, 64
MAX_TOKENS = 512
# Rows of logits that are compared at once, by rows of the head's weight.
LOGIT_ROWS, HEAD_ROWS = 128, 8192
