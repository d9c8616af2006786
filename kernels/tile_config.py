"""Tile sizes by compute capability: the tables that a run on a GPU is there to improve.

All of them are of label "roofline": chosen from bytes in flight and numbers of programs
(docs/kernels.md), not measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from vila_deploy.kernels.capability import INTERPRETER, ComputeCapability

TOKENS = 8  # tokens of the narrowest tensor core product; one to eight cost the same
LEAST_STAGES = 3  # of a product's loads
ROW_BYTES = 68  # of a row's int4 words and scale in a block
# Of a warp's blocks in each stage but one, by rows: words, scales, activations (compiled size).
SHARED_BYTES = {16: 3136, 32: 4224}
RESERVED_SHARED_BYTES = 1024  # of each program, by CUDA
# Warps → programs on a multiprocessor, as registers allow (80 and 92 a thread).
RESIDENT = {4: 6, 8: 2}
ATTENTION_WARPS = 8
MOST_SPLITS = 16  # that the last program of a key head merges
# Of attention: a key or value of a head, and what a program has besides its loads (compiled size).
HEAD_BYTES, ATTENTION_BYTES = 2 * 128, 6 << 10
WIDEST_GEMM = 256  # tokens up to which `gemm` is used on a GPU
GEMM_TOKENS = (16, 32, 64)  # of one of its programs


@dataclass(frozen=True)
class Device:
    """A GPU as tiles depend on it: multiprocessors, and stages of loads in flight by kernel.

    Of a multiprocessor: `shared_kib` of shared memory, and the `bytes_in_flight` that keep the
    device's memory busy, its bytes/s · 800 ns / processors.
    `next_bytes` are what the memory can give between two kernels: its bytes/s · 2 µs.
    `fused_layer_programs` of a fused layer share a multiprocessor, by registers and shared memory.
    """

    processors: int
    bytes_in_flight: int
    shared_kib: int
    next_bytes: int
    gemv_stages: int
    gemm_stages: int
    attention_stages: int
    fused_layer_programs: int = 1


# The GPU of each compute capability that the project targets.
DEVICES = {
    # A100, 2.0 TB/s
    ComputeCapability(8, 0): Device(
        processors=108, bytes_in_flight=15 << 10, shared_kib=164,
        next_bytes=4 << 20,
        gemv_stages=4, gemm_stages=4, attention_stages=3, fused_layer_programs=2,
    ),
    # AGX Orin, 0.2 TB/s
    ComputeCapability(8, 7): Device(
        processors=16, bytes_in_flight=10 << 10, shared_kib=164, next_bytes=400 << 10,
        gemv_stages=4, gemm_stages=4, attention_stages=3, fused_layer_programs=2,
    ),
    # The RTX 4090 (1.0 TB/s) has 99 KB of shared memory for a program; a third stage of attention
    # is 100 KB.
    ComputeCapability(8, 9): Device(
        processors=128, bytes_in_flight=7 << 10, shared_kib=100, next_bytes=2 << 20,
        gemv_stages=4, gemm_stages=3, attention_stages=2,
    ),
    # H100, H200: 4.3 TB/s
    ComputeCapability(9, 0): Device(
        processors=132, bytes_in_flight=26 << 10, shared_kib=228, next_bytes=8 << 20,
        gemv_stages=4, gemm_stages=4, attention_stages=3, fused_layer_programs=2,
    ),
}  # fmt: skip
# Other capabilities → the one whose tiles they take.
NEAREST = {
    ComputeCapability(8, 6): ComputeCapability(8, 9),
    ComputeCapability(10, 0): ComputeCapability(9, 0),
    ComputeCapability(12, 0): ComputeCapability(8, 9),
}


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


def device(capability: ComputeCapability) -> Device:
    """Return the row for a compute capability, or that of its nearest relative."""
    known = NEAREST.get(capability, capability)
    return DEVICES.get(known, DEVICES[ComputeCapability(8, 0)])


def gemv_tile(capability: ComputeCapability, out_features: int, blocks: int) -> GemvTile:
    """Return the tile of a product whose input channels make `blocks` blocks."""
    # Triton's interpreter pays per operation, not per element: few large programs.
    if capability == INTERPRETER:
        return GemvTile(rows=_divisor(out_features), split=4, stages=1)
    rows = _gemv_rows(device(capability), out_features)
    return _with_warps(device(capability), rows, -(-out_features // rows), blocks)


def gemv_programs(capability: ComputeCapability, out_features: int) -> int:
    """Return how many programs a product over `gemv_tile` has."""
    if capability == INTERPRETER:
        return -(-out_features // _divisor(out_features))
    return -(-out_features // _gemv_rows(device(capability), out_features))


def gate_up_tile(capability: ComputeCapability, out_features: int, blocks: int) -> GemvTile:
    """Return the tile of `gate_up`: its channels come in pairs of 16, so it has 32 rows or more."""
    if capability == INTERPRETER:
        return GemvTile(rows=_divisor(out_features), split=4, stages=1)
    return _with_warps(device(capability), 32, -(-out_features // 32), blocks)


def shared_bytes(tile: GemvTile) -> int:
    """Return the shared memory of a program of an int4 product."""
    return SHARED_BYTES[tile.rows] * tile.split * (tile.stages - 1)


def _gemv_rows(gpu: Device, out_features: int) -> int:
    """Return 32 rows where that leaves few multiprocessors without a program, else 16.

    Activations and their sums are shared by all rows of a program. 16 rows for twice as many
    programs help no more where the busiest multiprocessor has two of those.
    """
    return 32 if out_features >= 0.6 * 32 * gpu.processors else 16


def _with_warps(gpu: Device, rows: int, programs: int, blocks: int) -> GemvTile:
    """Return the tile of 4 or 8 warps that lacks least.

    Lacks, the worst first: too few bytes on their way; a last wave less than half full; warps with
    unequal numbers of blocks, of which some then wait; fewer than two warps for each of a
    multiprocessor's schedulers; stages that leave the next kernel no room.
    """

    def lacks(tile: GemvTile) -> tuple[bool, bool, bool, bool, int, int]:
        on_their_way = (tile.stages - 1) * tile.split
        in_flight = on_their_way * rows * ROW_BYTES * programs
        room = gpu.shared_kib * 1024 // (shared_bytes(tile) + RESERVED_SHARED_BYTES)
        resident = min(RESIDENT[tile.split], room)
        waves = programs / (gpu.processors * max(resident, 1))
        return (
            in_flight < gpu.bytes_in_flight * gpu.processors and on_their_way < blocks,
            waves > 1 and 0 < waves % 1 < 0.5,
            blocks % tile.split != 0,
            programs * tile.split < 8 * gpu.processors,
            tile.stages,
            tile.split,
        )

    tiles = (
        GemvTile(rows, split, stages)
        for split in RESIDENT
        for stages in range(LEAST_STAGES, gpu.gemv_stages + 1)
    )
    return min(tiles, key=lacks)


def _divisor(out_features: int) -> int:
    """Return the largest power of two up to 512 that divides the padded rows."""
    padded = -(-out_features // 32) * 32
    return min(512, padded & -padded)


def gemm_tile(capability: ComputeCapability, tokens: int, out_features: int) -> GemmTile:
    """Return the narrowest tile that holds all tokens, at most 64: it reads weights least often."""
    if capability == INTERPRETER:
        return GemmTile(_divisor(out_features), tokens=256, warps=4, stages=1)
    width = next(size for size in GEMM_TOKENS if size >= min(tokens, GEMM_TOKENS[-1]))
    return GemmTile(rows=64, tokens=width, warps=4, stages=device(capability).gemm_stages)


def widest_gemm(capability: ComputeCapability) -> int:
    """Return the most tokens that `gemm` takes; from there on dequantizing costs less.

    Writing and reading float16 weights takes as long as multiplying them by about 300 tokens on an
    H100 (2.8 TB/s, 700 Tflop/s).
    """
    return 1 << 30 if capability == INTERPRETER else WIDEST_GEMM


def attention_block(capability: ComputeCapability) -> int:
    """Return how many positions of the cache a program of attention takes at a time."""
    return 256 if capability == INTERPRETER else 64


def attention_shared_bytes(capability: ComputeCapability) -> int:
    """Return the shared memory of a program of attention over a float16 cache, as compiled."""
    loads = 2 * attention_block(capability) * HEAD_BYTES
    return (device(capability).attention_stages - 1) * loads + ATTENTION_BYTES


def attention_splits(
    capability: ComputeCapability, kv_heads: int, max_seq_len: int, programs: int = 1
) -> int:
    """Return into how many splits the cache is cut at most.

    Args:
        programs: for each multiprocessor.
    """
    if capability == INTERPRETER:
        return 1
    longest = -(-max_seq_len // attention_block(capability))
    wanted = programs * device(capability).processors // kv_heads
    return max(1, min(wanted, longest, MOST_SPLITS))
