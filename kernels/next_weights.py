"""Bring the next product's first weights into the L2 while this kernel ends.

Between two kernels nothing reads from memory; what was asked for before comes in meanwhile. A
prefetch holds no register and changes no result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from vila_deploy.kernels import interpreter
from vila_deploy.kernels.capability import ComputeCapability
from vila_deploy.kernels.launch import Argument, Launch, next_power_of_2
from vila_deploy.kernels.packed_linear import ROWS
from vila_deploy.kernels.tile_config import device

BULK_CAPABILITY = ComputeCapability(9, 0)  # the first with one instruction for many bytes
INTERPRETED = tl.constexpr(interpreter.INTERPRETED)
LINE_BYTES, WARP = 128, 32
LINE_BITS = tl.constexpr(8 * 128)
# Of a launch that asks for nothing; tuples of a kernel aren't empty.
NO_NEXT: dict[str, Argument] = {"next_weights": (0,)}
NO_NEXT_CONSTANTS = {"NEXT_TILES": 0, "NEXT_LINES": 0}


@triton.jit
def prefetch_next(
    next_weights: tl.tuple, program: tl.tensor, programs: tl.tensor,
    NEXT_TILES: tl.constexpr, NEXT_LINES: tl.constexpr,
) -> None:  # fmt: skip
    """Prefetch this program's share of what `with_next_weights` says; not interpreted."""
    if NEXT_TILES > 0 and not INTERPRETED:
        # Scales are a sixteenth of the words.
        FEWER: tl.constexpr = 16 if NEXT_LINES > 16 else max(NEXT_LINES, 1)
        prefetch_tiles(
            next_weights[0], next_weights[3], next_weights[4], next_weights[2], program, programs,
            NEXT_TILES, NEXT_LINES,
        )  # fmt: skip
        if next_weights[6] > 0:
            prefetch_tiles(
                next_weights[1], next_weights[5], next_weights[6], next_weights[2], program,
                programs, NEXT_TILES * FEWER, NEXT_LINES // FEWER,
            )  # fmt: skip


@triton.jit
def prefetch_tiles(
    first_ptr: tl.tensor, stride: tl.tensor, count: tl.tensor, tiles: tl.tensor,
    program: tl.tensor, programs: tl.tensor, TILES: tl.constexpr, LINES: tl.constexpr,
) -> None:  # fmt: skip
    """Prefetch `count` elements of every tile of this program: in one piece, or in LINES.

    A thread that has no tile, or line, of its own would prefetch what another does.
    """
    WIDTH: tl.constexpr = first_ptr.dtype.element_ty.primitive_bitwidth
    tile = program + tl.arange(0, TILES) * programs
    wanted = (tile < tiles).to(tl.int32)
    first_ptr += tile.to(tl.int64) * stride
    if LINES == 0:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $2, 0; "
            "@p cp.async.bulk.prefetch.L2.global [$1], $3; } // $0",
            "=r,l,r,r", [first_ptr, wanted, count * (WIDTH // 8)], dtype=tl.int32, is_pure=False,
            pack=1,
        )  # fmt: skip
    else:
        element = tl.minimum(tl.arange(0, LINES) * (LINE_BITS // WIDTH), count - 1)
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p prefetch.global.L2 [$1]; } // $0",
            "=r,l,r", [first_ptr[:, None] + element[None, :], wanted[:, None]], dtype=tl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip


def link_weights(launches: Sequence[Launch], capability: ComputeCapability) -> list[Launch]:
    """Return the launches, each asking for the weights of the product that follows it."""
    linked, following = list[Launch](), None
    for launch in launches[::-1]:
        product = launch if "words_ptr" in launch.args else following
        if following is not None and "next_weights" in launch.args:
            launch = with_next_weights(launch, following, capability)
        linked.append(launch)
        following = product
    return linked[::-1]


def with_next_weights(launch: Launch, product: Launch, capability: ComputeCapability) -> Launch:
    """Return the launch so that it brings the first bytes of every tile of a product into the L2.

    As many bytes in all as the memory can give between two kernels.
    """
    words, scale_zero = product.args["words_ptr"], product.args["scale_zero_ptr"]
    assert isinstance(words, Tensor)
    assert isinstance(scale_zero, Tensor)
    tiles, blocks, *block = words.shape
    numbers = math.prod(block)
    block_bytes = numbers * words.element_size()
    asked = max(1, min(blocks, device(capability).next_bytes // (tiles * block_bytes)))
    scales = scale_zero[0].numel() if product.constants["BITS"] < 16 else 0
    next_weights = (
        words, scale_zero, tiles, blocks * numbers, asked * numbers, scales,
        -(-asked * scales // blocks // ROWS) * ROWS,
    )  # fmt: skip
    bulk = capability >= BULK_CAPABILITY
    lines = 0 if bulk else next_power_of_2(asked * block_bytes // LINE_BYTES)
    threads, mine = WARP * launch.warps, -(-tiles // math.prod(launch.grid))
    constants = {
        "NEXT_TILES": next_power_of_2(max(mine, threads // max(lines, 1))),
        "NEXT_LINES": lines,
    }
    args = launch.args | {"next_weights": next_weights}
    return replace(launch, args=args, constants=launch.constants | constants)
