"""Predicted tokens/s of the native backend on GPUs that are not here.

A decoding step is a row of kernels. One that reads weights takes the longer of two times, that of
its bytes and that of its instructions on the multiprocessor with the most programs, and what a
kernel costs besides: the gap before it, filling its pipeline, draining it. Programs beyond the
first wave come after it; where they are few, the latency of DRAM limits them, and they fill their
pipeline anew. Attention is limited by the latency of one program's instructions. Up to 8 sequences
decoded together share the products' time; their attention is as many programs more.

None of this was measured on a GPU of ours: constants come from data sheets, from the machine code
of the kernels for capability 9.0 (docs/kernels.md), or are assumptions, and each says which.
Expect 15%; ratios of two predictions are better than that.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from vila_deploy.checkpoint.llm_config import LlmConfig
from vila_deploy.checkpoint.presets import preset
from vila_deploy.formats.module_dtypes import FP16, INT4, INT8
from vila_deploy.kernels import tile_config
from vila_deploy.kernels.capability import ComputeCapability
from vila_deploy.kernels.launch_mode import (
    AUTOMATIC,
    SEPARATE,
    LaunchMode,
    get_launch_mode,
    mode_name,
    possible_modes,
)


@dataclass(frozen=True)
class Gpu:
    """A GPU as the model sees it.

    Args:
        bandwidth: bytes a second that a kernel can read.
        clock_hz: of its multiprocessors.
        shared_bytes: of shared memory on a multiprocessor (CUDA C++ Programming Guide, table of
            technical specifications).
    """

    capability: ComputeCapability
    bandwidth: float
    clock_hz: float
    shared_bytes: int

    @property
    def processors(self) -> int:
        return tile_config.device(self.capability).processors


# Assumed where no copy was timed: of the published bandwidth.
READABLE_SHARE = 0.9
KB = 1024
# Bandwidth: what published copies reach on an H100 and an H200 (docs/kernels.md); else
# READABLE_SHARE of the data sheet's. Clocks: the data sheets' boost clocks.
GPUS = {
    "a100": Gpu(ComputeCapability(8, 0), READABLE_SHARE * 1.555e12, 1.41e9, 164 * KB),
    "rtx4090": Gpu(ComputeCapability(8, 9), READABLE_SHARE * 1.008e12, 2.52e9, 100 * KB),
    "orin": Gpu(ComputeCapability(8, 7), READABLE_SHARE * 2.048e11, 1.3e9, 164 * KB),
    "h100": Gpu(ComputeCapability(9, 0), 2.8e12, 1.98e9, 228 * KB),
    "h200": Gpu(ComputeCapability(9, 0), 4.3e12, 1.98e9, 228 * KB),
}

# Seconds between two kernels of a CUDA graph, and with programmatic dependent launch: published
# measurements begin at 1.3 and 0.6 µs; assumed.
GAP_S, PDL_GAP_S = 1.15e-6, 0.55e-6
# Until a kernel's first bytes are there: a DRAM access, a barrier, the first product; with PDL the
# first weights were asked for before. Assumed from DRAM's latency.
FILL_S, PDL_FILL_S = 1.0e-6, 0.5e-6
DRAIN_S = 0.45e-6  # from the last byte to the last store: assumed
DRAM_LATENCY_S = 0.8e-6  # under load: published measurements of an H100
L2_SPEEDUP = 1.5  # of reads from the L2 over those from memory: published measurements of an H100
STREAM_OVERHEAD = 1.05  # of DRAM refresh and uneven channels: assumed
ISSUE_PER_CYCLE = 4  # warp instructions of a multiprocessor: one of each scheduler
ISSUE_SHARE = 0.8  # of issue slots that such a loop fills: assumed
WARP = 32
BLOCK = 128  # input channels that a warp takes at a time, in 4 bits

# Machine instructions for a weight of a thread in the loop over blocks, by bits and rows of a tile:
# counted in the code for 9.0 (docs/kernels.md); of 8 bits and of 16 rows in 16 bits assumed.
INSTRUCTIONS = {
    (4, 16): 2.39,
    (4, 32): 1.88,
    (8, 16): 3.5,
    (8, 32): 2.5,
    (16, 16): 2.2,
    (16, 32): 1.45,
}
# Shared memory of a program, by the same: from the compiler. In 4 bits the tile says it.
PROGRAM_SHARED_BYTES = {
    (8, 16): 75 * KB, (8, 32): 74 * KB, (16, 16): 72 * KB, (16, 32): 60 * KB,
}  # fmt: skip
STAGE_BYTES = 8 * KB  # of weights: 128 channels of 16 rows in 4 bits for 8 warps

CYCLES_AN_INSTRUCTION = 2.44  # of a warp that mostly waits for itself: assumed
SMALL_KERNEL_S = 0.55e-6  # one that reads a few kilobytes, besides its gap: assumed
MAX_SEQ_LEN = 1024
BITS = {FP16: 16, INT8: 8, INT4: 4}
# Bits a weight with a 32-bit scale and zero point for every 128.
STORED_BITS = {16: 16.0, 8: 8.25, 4: 4.25}


@dataclass(frozen=True)
class AttentionCode:
    """Attention as compiled: the instructions that a warp of one program goes through.

    Args:
        ahead: of its loop.
        loop: for 64 positions.
        behind: the loop, merging included but for what each split adds to that.
        split: for each split that is merged.
    """

    warps: int
    ahead: int
    loop: int
    behind: int
    split: int


# From the code for 9.0 (docs/kernels.md), alike in all models.
ATTENTION = AttentionCode(tile_config.ATTENTION_WARPS, ahead=372, loop=215, behind=163, split=24)


def issued_rounds(tile: tile_config.GemvTile, blocks: int) -> float:
    """Return the rounds that warps go through over those for which they have a block."""
    return -(-blocks // tile.split) * tile.split / blocks


@dataclass(frozen=True)
class StepModel:
    """A decoding step of one model on one GPU.

    Args:
        mode: how its kernels follow each other; fused layers are not modelled.
        weight_bits: of the decoder's products, `head_bits` of the output head.
        cache_bits: of a number in the key/value cache.
    """

    llm: LlmConfig
    gpu: Gpu
    mode: LaunchMode
    weight_bits: int
    head_bits: int
    cache_bits: int

    def seconds(self, context: int, sequences: int = 1) -> float:
        """Return seconds of a step with `context` tokens in the cache of each sequence, 1 to 8."""
        parts = self.layer_seconds(context, sequences)
        layer = sum(parts.values())
        # The embedding and the choice of the token.
        small = 2 * (self._gap + SMALL_KERNEL_S)
        return layer * self.llm.num_layers + self.head_seconds() + small

    @property
    def _next_bytes(self) -> float:
        """Bytes that come from memory while one kernel ends and the next one begins."""
        if not self.mode.prefetch_next:
            return 0.0
        most = tile_config.device(self.gpu.capability).next_bytes
        return min(most, (self._boundary - DRAM_LATENCY_S) * self.gpu.bandwidth)

    def layer_seconds(self, context: int, sequences: int = 1) -> dict[str, float]:
        """Return seconds of each product of a layer, and of its attention."""
        llm = self.llm
        hidden, inner, queries = (
            llm.hidden_size,
            llm.intermediate_size,
            llm.num_heads * llm.head_dim,
        )
        width = queries + 2 * llm.num_kv_heads * llm.head_dim
        attention = self.attention_seconds(context, sequences)
        return {
            "qkv": self._product(width, hidden),
            "attention": attention,
            # Asked for when attention begins.
            "o": self._product(hidden, queries, early=attention),
            "gate_up": self._product(2 * inner, hidden, pairs=True),
            "down": self._product(hidden, inner),
        }

    def head_seconds(self) -> float:
        """Return seconds of the output head."""
        return self._product(self.llm.vocab_size, self.llm.hidden_size, bits=self.head_bits)

    def attention_seconds(
        self,
        context: int,
        sequences: int = 1,
        code: AttentionCode | None = None,
        splits: int | None = None,
    ) -> float:
        """Return seconds of attention, with the merge as the mode has it.

        Args:
            code, splits: of a form other than today's.
        """
        llm, gpu, code = self.llm, self.gpu, code or ATTENTION
        kv_heads, capability = llm.num_kv_heads, gpu.capability
        splits = splits or tile_config.attention_splits(capability, kv_heads, MAX_SEQ_LEN)
        blocks = -(-(context + 1) // tile_config.attention_block(capability))
        rounds = -(-blocks // splits)
        # Splits without positions end at once.
        busiest = -(-sequences * kv_heads * -(-blocks // rounds) // gpu.processors)
        instructions = code.ahead + code.loop * rounds
        # One warp waits for itself; all that a multiprocessor has share its issue slots.
        cycles = max(
            -(-busiest // self._attention_resident) * instructions * CYCLES_AN_INSTRUCTION,
            busiest * code.warps * instructions / ISSUE_PER_CYCLE / ISSUE_SHARE,
        )
        cycles += (code.behind + code.split * splits) * CYCLES_AN_INSTRUCTION
        latency = cycles / gpu.clock_hz
        values = 2 * sequences * (context + 1) * llm.num_kv_heads * llm.head_dim
        stream = values * self.cache_bits / 8 / gpu.bandwidth * STREAM_OVERHEAD
        seconds = max(latency, stream) + self._boundary
        if not self.mode.merge_attention:
            seconds += self._gap + SMALL_KERNEL_S
        return seconds

    @property
    def _attention_resident(self) -> int:
        """Programs of attention that a multiprocessor holds: two, by registers, if they fit."""
        room = tile_config.attention_shared_bytes(self.gpu.capability)
        room += tile_config.RESERVED_SHARED_BYTES
        return min(2, max(1, self.gpu.shared_bytes // room))

    @property
    def _gap(self) -> float:
        return PDL_GAP_S if self.mode.pdl else GAP_S

    @property
    def _boundary(self) -> float:
        """Seconds that a kernel costs besides its work."""
        return self._gap + (PDL_FILL_S if self.mode.pdl else FILL_S) + DRAIN_S

    def _product(
        self, rows: int, columns: int, *, pairs: bool = False, bits: int | None = None,
        early: float = 0.0,
    ) -> float:  # fmt: skip
        """Return seconds of a product whose first weights were asked for so much `early`."""
        gpu, bits = self.gpu, bits or self.weight_bits
        choose = tile_config.gate_up_tile if pairs else tile_config.gemv_tile
        blocks = -(-columns // BLOCK)
        tile = choose(gpu.capability, rows, blocks)
        kind = bits, tile.rows
        programs = -(-rows // tile.rows)
        program_weights = tile.rows * columns
        program_bytes = program_weights * STORED_BITS[bits] / 8
        shared = tile_config.shared_bytes(tile) if bits == 4 else PROGRAM_SHARED_BYTES[kind]
        room = shared + tile_config.RESERVED_SHARED_BYTES
        first = min(programs, gpu.processors * max(1, gpu.shared_bytes // room))
        there = self._next_bytes
        if there:
            most = tile_config.device(gpu.capability).next_bytes
            there = min(first * program_bytes, most, there + early * gpu.bandwidth)
        # The rest comes from memory meanwhile.
        stream = (first * program_bytes - there) / gpu.bandwidth * STREAM_OVERHEAD
        stream = max(stream, first * program_bytes / gpu.bandwidth / L2_SPEEDUP)
        busiest = -(-first // gpu.processors)
        per_weight = INSTRUCTIONS[kind] * issued_rounds(tile, blocks)
        slots = busiest * program_weights / WARP * per_weight / ISSUE_PER_CYCLE
        seconds = max(stream, slots / gpu.clock_hz / ISSUE_SHARE)
        return (
            seconds
            + self._boundary
            + self._later_waves(programs - first, first, program_bytes, tile.stages)
        )

    def _later_waves(
        self, programs: int, places: int, program_bytes: float, stages: int
    ) -> float:  # fmt: skip
        """Return seconds of the programs for which the first wave had no place."""
        seconds = 0.0
        while programs > 0:
            wave = min(programs, places)
            most = wave * (stages - 1) * STAGE_BYTES / DRAM_LATENCY_S
            reachable = self.gpu.bandwidth / STREAM_OVERHEAD
            seconds += wave * program_bytes / min(most, reachable)
            if most < reachable:
                seconds += FILL_S
            programs -= wave
        return seconds


def step_model(
    llm: LlmConfig,
    target: str,
    launch_mode: str = SEPARATE,
    lm_head: str = FP16,
    kv_cache: str = FP16,
) -> StepModel:
    """Return the model of a step on a target of GPUS."""
    weight_bits = 4 if llm.quantization else 16
    return StepModel(
        llm, GPUS[target], get_launch_mode(launch_mode), weight_bits, BITS[lm_head], BITS[kv_cache]
    )


@cache
def predicted(model: str, precision: str, target: str, context: int) -> float:
    """Return tokens/s of a released model in the native backend as it builds engines by default.

    In the launch mode that such an engine prefers; it takes it where its bytes are the same.
    """
    mode = mode_name(possible_modes(AUTOMATIC, GPUS[target].capability)[-1])
    return 1 / step_model(preset(model, precision).llm, target, mode).seconds(context)
