"""Programmatic dependent launch (PDL) and grid barriers: device functions between kernels.

With PDL a kernel's programs come to a multiprocessor as soon as all those of the kernel before have
begun and left room. Until `wait` they may only touch what no kernel writes: they prefetch their
first weights into the L2, so that those are there when the activations are ready. A prefetch can't
bring stale bytes, since every load passes through the L2.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from vila_deploy.kernels.packed_dot import INTERPRETED, TILE

LINE_BITS = tl.constexpr(1024)
TOP_BIT = tl.constexpr(-(2**31))
# Lines of 128 bytes: of 16 rows of words, and of their scales. A program of an H100 asks for 16 to
# 32 KB, so the 2 to 4 that a multiprocessor holds ask for 5 to 17 MB in all, of 50 MB.
WORD_LINES = tl.constexpr(128)
SCALE_LINES = tl.constexpr(16)


@triton.jit
def wait() -> None:
    """Let the next kernel begin, then wait for the end of the one before. Not interpreted."""
    if not INTERPRETED:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def wait_and_prefetch(
    tile: tl.tensor, words_ptr: tl.tensor, scale_zero_ptr: tl.tensor, columns: tl.tensor,
    BITS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
) -> None:  # fmt: skip
    """Prefetch the first weights of rows tile · ROWS and on, and `wait`."""
    if not INTERPRETED:
        gdc_launch_dependents()
        prefetch_weights(tile, words_ptr, scale_zero_ptr, columns, BITS, BLOCK, GROUP, ROWS)
        gdc_wait()


@triton.jit
def prefetch_weights(
    tile: tl.tensor, words_ptr: tl.tensor, scale_zero_ptr: tl.tensor, columns: tl.tensor,
    BITS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
) -> None:  # fmt: skip
    """Prefetch the first words and scales of rows tile · ROWS and on."""
    WORDS: tl.constexpr = BLOCK * BITS // 16
    blocks = tl.cdiv(columns, BLOCK)
    groups = tl.cdiv(blocks * BLOCK, GROUP)
    for index in tl.static_range(ROWS // TILE):
        start = (tile * (ROWS // TILE) + index).to(tl.int64)
        tile_words = blocks * (TILE * WORDS)
        prefetch(words_ptr + start * tile_words, tile_words, WORD_LINES)
        if BITS < 16:
            prefetch(scale_zero_ptr + start * (groups * TILE), groups * TILE, SCALE_LINES)


@triton.jit
def prefetch(first_ptr: tl.tensor, count: tl.tensor, LINES: tl.constexpr) -> None:
    """Prefetch LINES lines from `first_ptr` on into the L2, at most `count` elements."""
    if not INTERPRETED:
        LINE: tl.constexpr = LINE_BITS // first_ptr.dtype.element_ty.primitive_bitwidth
        element = tl.minimum(tl.arange(0, LINES) * LINE, count - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; // $0", "=r,l", [first_ptr + element], dtype=tl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def grid_barrier(arrivals_ptr: tl.tensor) -> None:
    """Wait until all programs of the grid are here, and see what they wrote. Not interpreted.

    All of them must be on the device at once. The first adds 2³¹ − (programs − 1) to the counter,
    every other 1, so its top bit turns when the last one comes, and nobody has to set it back.
    """
    programs = tl.num_programs(0)
    arrival = tl.where(tl.program_id(0) == 0, (1 - programs) ^ TOP_BIT, 1)
    tl.debug_barrier()
    before = tl.atomic_add(arrivals_ptr, arrival, sem="acq_rel", scope="gpu")
    now = before
    while (before ^ now) >= 0:
        now = tl.inline_asm_elementwise(
            "ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [arrivals_ptr], dtype=tl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip
    tl.debug_barrier()
