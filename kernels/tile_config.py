"""Tile sizes per compute capability: the tables that a run on a GPU is there to improve.

label "roofline": chosen from bytes in flight and program counts (docs/kernels.md), not measured.
"""

from __future__ import annotations

from dataclasses import dataclass

LABEL = "roofline"
TOKENS = 8  # tokens of the narrowest tensor core product; one to eight cost the same


@dataclass(frozen=True)
class Device:
    """What tiles depend on: multiprocessors, and how many loads a program keeps in flight.

    `joined_programs` of `joined` share a multiprocessor, by their registers and shared memory.
    """

    processors: int
    gemv_stages: int
    gemm_stages: int
    attention_stages: int
    joined_programs: int = 1


# compute capability · 10 → the device of that kind that the project targets
DEVICES = {
    # A100
    80: Device(processors=108, gemv_stages=4, gemm_stages=4, attention_stages=3, joined_programs=2),
    # AGX Orin
    87: Device(processors=16, gemv_stages=4, gemm_stages=4, attention_stages=3, joined_programs=2),
    # The RTX 4090 has 99 KB of shared memory for a program; a third stage of attention is 100 KB.
    89: Device(processors=128, gemv_stages=4, gemm_stages=3, attention_stages=2),
    # H100, H200
    90: Device(processors=132, gemv_stages=4, gemm_stages=4, attention_stages=3, joined_programs=2),
}
# Triton's interpreter pays per operation, not per element: few large programs.
INTERPRETER = 0
NEAREST = {86: 89, 100: 90, 120: 89}


@dataclass(frozen=True)
class GemvTile:
    """`rows` output channels a program (16 or 32), input channels over `split` warps."""

    rows: int
    split: int
    stages: int


@dataclass(frozen=True)
class GemmTile:
    """`rows` output channels and `tokens` tokens a program."""

    rows: int
    tokens: int
    warps: int
    stages: int


def device(sm: int) -> Device:
    """The row for a compute capability (major · 10 + minor), or that of its nearest relative."""
    return DEVICES[NEAREST.get(sm, sm)] if NEAREST.get(sm, sm) in DEVICES else DEVICES[80]


def gemv_tile(sm: int, out_features: int) -> GemvTile:
    """32 rows where that still gives every multiprocessor two programs, else 16 and more warps."""
    if sm == INTERPRETER:
        return GemvTile(rows=_divisor(out_features), split=4, stages=1)
    found = device(sm)
    if out_features >= 2 * 32 * found.processors:
        return GemvTile(rows=32, split=4, stages=found.gemv_stages)
    return GemvTile(rows=16, split=8, stages=found.gemv_stages)


def gate_up_tile(sm: int, out_features: int) -> GemvTile:
    """Gate and up channels come in pairs of 16, so a program has 32 rows or more."""
    if sm == INTERPRETER:
        return GemvTile(rows=_divisor(out_features), split=4, stages=1)
    return GemvTile(rows=32, split=4, stages=device(sm).gemv_stages)


def _divisor(out_features: int) -> int:
    """The largest power of two up to 512 that divides the padded rows."""
    padded = -(-out_features // 32) * 32
    return min(512, padded & -padded)


def gemm_tile(sm: int, tokens: int, out_features: int) -> GemmTile:
    """The narrowest tile that holds all tokens, at most 64: weights are then read least often."""
    if sm == INTERPRETER:
        return GemmTile(_divisor(out_features), tokens=256, warps=4, stages=1)
    width = next(size for size in (16, 32, 64) if size >= min(tokens, 64))
    return GemmTile(rows=64, tokens=width, warps=4, stages=device(sm).gemm_stages)


def widest_gemm(sm: int) -> int:
    """Tokens up to which `gemm` is used; from there on dequantizing costs less than it saves.

    Writing and reading float16 weights takes as long as multiplying them by about 300 tokens on an
    H100 (2.8 TB/s, 700 Tflop/s).
    """
    return 1 << 30 if sm == INTERPRETER else 256


def attention_slots(sm: int) -> int:
    """Slots of the cache that a program takes at a time."""
    return 256 if sm == INTERPRETER else 64


def attention_splits(sm: int, kv_heads: int, max_seq_len: int) -> int:
    """Parts of the cache that programs take side by side: one program a multiprocessor."""
    if sm == INTERPRETER:
        return 1
    wanted = max(1, device(sm).processors // kv_heads)
    longest = max(1, max_seq_len // attention_slots(sm))
    splits = 1
    while splits * 2 <= min(wanted, longest, 16):
        splits *= 2
    return splits
