"""What stands between kernels: how a kernel begins while the one before it still runs.

With programmatic dependent launch a kernel's programs come to a multiprocessor as soon as all those
of the kernel before have begun and left room. Until `wait` they may only touch what no kernel
writes: they ask for their first weights, so that those are in the L2 when the activations are
ready. A prefetch can't bring stale bytes, since every load passes through the L2.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from vila_deploy.kernels.packed_dot import INTERPRETED, TILE
from vila_deploy.kernels.tile_config import INTERPRETER
from vila_deploy.utils.errors import VilaDeployError

LEAST_SM = 90  # compute capability · 10 from which kernels can be launched so
LINE_BITS = tl.constexpr(1024)
TOP_BIT = tl.constexpr(-(2**31))
# Lines of 128 bytes: of 16 rows of words, and of their scales. A program of an H100 asks for 16 to
# 32 KB, so the 2 to 4 that a multiprocessor holds ask for 5 to 17 MB in all, of 50 MB.
WORD_LINES = tl.constexpr(128)
SCALE_LINES = tl.constexpr(16)


@dataclass(frozen=True)
class Boundaries:
    """How the kernels of a step follow each other; the default is one launch after another.

    Args:
        overlap: by programmatic dependent launch.
        merge: the last program of a key head adds the parts of attention up: a launch less.
        join: what stands between two layers' attention in one launch of programs that stay.
    """

    overlap: bool = False
    merge: bool = False
    join: bool = False

    def check(self, sm: int) -> None:
        """Raises VilaDeployError where compute capability sm / 10 can't do that."""
        if self.overlap and sm != INTERPRETER and sm < LEAST_SM:
            raise VilaDeployError(
                "programmatic dependent launch needs compute capability 9.0, this is "
                f"{sm // 10}.{sm % 10}",
                fix="run the step without it",
            )
        if self.overlap and self.join:
            raise VilaDeployError(
                "a kernel of several phases can't be launched dependently", fix="choose one of both"
            )


@triton.jit
def wait():
    """Lets the next kernel begin, then waits for the end of the one before. Not interpreted."""
    if not INTERPRETED:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def wait_with_rows(
    tile, words, scale_zero, columns,
    BITS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`wait`, after it asked for the first weights of rows tile · ROWS and on."""
    if not INTERPRETED:
        gdc_launch_dependents()
        prefetch_rows(tile, words, scale_zero, columns, BITS, BLOCK, GROUP, ROWS)
        gdc_wait()


@triton.jit
def prefetch_rows(
    tile, words, scale_zero, columns,
    BITS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Asks for the first words and scales of rows tile · ROWS and on."""
    WORDS: tl.constexpr = BLOCK * BITS // 16
    blocks = tl.cdiv(columns, BLOCK)
    groups = tl.cdiv(blocks * BLOCK, GROUP)
    for part in tl.static_range(ROWS // TILE):
        start = (tile * (ROWS // TILE) + part).to(tl.int64)
        each = blocks * (TILE * WORDS)
        prefetch(words + start * each, each, WORD_LINES)
        if BITS < 16:
            prefetch(scale_zero + start * (groups * TILE), groups * TILE, SCALE_LINES)


@triton.jit
def prefetch(first, count, LINES: tl.constexpr):
    """Asks the L2 for LINES lines from the pointer `first` on, at most `count` elements."""
    if not INTERPRETED:
        EACH: tl.constexpr = LINE_BITS // first.dtype.element_ty.primitive_bitwidth
        at = tl.minimum(tl.arange(0, LINES) * EACH, count - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; // $0", "=r,l", [first + at], dtype=tl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def meet(arrived):
    """Waits until all programs of the grid are here, and sees what they wrote. Not interpreted.

    All of them must be on the device at once. The first adds 2³¹ − (programs − 1) to `arrived`,
    every other 1, so its top bit turns when the last one comes, and nobody has to set it back.
    """
    programs = tl.num_programs(0)
    one = tl.where(tl.program_id(0) == 0, (1 - programs) ^ TOP_BIT, 1)
    tl.debug_barrier()
    before = tl.atomic_add(arrived, one, sem="acq_rel", scope="gpu")
    now = before
    while (before ^ now) >= 0:
        now = tl.inline_asm_elementwise(
            "ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [arrived], dtype=tl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip
    tl.debug_barrier()
