"""Rows of a packed weight times a few activations: the loop that every product of a step shares.

Weights are the left operand of the tensor core's 16 × 8 × 16 product and up to 8 tokens the right
one, so one to eight tokens cost the same. Each warp takes every SPLIT-th block of input channels;
the sums of the warps are added in one fixed order, so results repeat bit for bit.

Quantized values enter the product as the float16 numbers that have their bits: subnormal, and as
small as they are exact. The zero point of a group comes in behind it, by the sum of the group's
activations, which is a product with ones.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vila_deploy.kernels import interpreter
from vila_deploy.kernels.next_weights import prefetch_next

# Triton's interpreter has no inline assembly; there the same bits come from plain operators.
INTERPRETED = tl.constexpr(interpreter.INTERPRETED)
MANTISSA_UNIT = tl.constexpr(512.0)  # 1 / packed_linear.ZERO_UNIT
BITS_UNIT = tl.constexpr(2.0**24)  # a quantized value over the float16 number that has its bits
ZERO_SCALE = tl.constexpr(2.0**-15)  # from units of 2⁻⁹, in which zero points are stored, to 2⁻²⁴
HIGH_SCALE = tl.constexpr(2.0**-4)  # an odd lane's values lie 4 bits up
TILE = tl.constexpr(16)  # packed_linear.ROWS


# Two 16-bit words an instruction. Bits 8 to 11 of a float16 are no longer linear, hence the shift.
LOW_4 = tl.constexpr("and.b32 $0, $1, 0x000f000f;")
LOW_4_HIGH = tl.constexpr("and.b32 $0, $1, 0x00f000f0;")
HIGH_4 = tl.constexpr("{ .reg .b32 t; shr.b32 t, $1, 8; and.b32 $0, t, 0x000f000f; }")
HIGH_4_HIGH = tl.constexpr("{ .reg .b32 t; shr.b32 t, $1, 8; and.b32 $0, t, 0x00f000f0; }")
LOW_8 = tl.constexpr("and.b32 $0, $1, 0x00ff00ff;")
HIGH_8 = tl.constexpr("{ .reg .b32 t; shr.b32 t, $1, 8; and.b32 $0, t, 0x00ff00ff; }")


@triton.jit
def bits_as_half(
    words: tl.tensor, MASK: tl.constexpr, SHIFT: tl.constexpr, CODE: tl.constexpr
) -> tl.tensor:
    """Return float16 whose bits are (words >> SHIFT) & MASK; CODE does that for two words."""
    if INTERPRETED:
        return ((words >> SHIFT) & MASK).to(tl.float16, bitcast=True)
    else:
        return tl.inline_asm_elementwise(
            CODE, "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2
        )


@triton.jit
def lane_as_half(words: tl.tensor, LANE: tl.constexpr, BITS: tl.constexpr) -> tl.tensor:
    """Return q · 2⁻²⁴ of lane LANE of the words as float16, of odd lanes in 4 bits q · 2⁻²⁰."""
    if BITS == 8:
        if LANE == 0:
            return bits_as_half(words, 0xFF, 0, LOW_8)
        else:
            return bits_as_half(words, 0xFF, 8, HIGH_8)
    elif LANE == 0:
        return bits_as_half(words, 0x0F, 0, LOW_4)
    elif LANE == 1:
        return bits_as_half(words, 0xF0, 0, LOW_4_HIGH)
    elif LANE == 2:
        return bits_as_half(words, 0x0F, 8, HIGH_4)
    else:
        return bits_as_half(words, 0xF0, 8, HIGH_4_HIGH)


@triton.jit
def unpack_lane(
    words: tl.tensor, neg_zero_point: tl.tensor, LANE: tl.constexpr, BITS: tl.constexpr
) -> tl.tensor:
    """Return (q − zero point) · 2⁻⁹ of lane LANE of the words as float16, exact.

    In 16 bits the words are weights already and come back as they are.
    """
    if BITS == 16:
        return words
    elif BITS == 4 and LANE % 2 == 1:
        return lane_as_half(words, LANE, BITS) * 2048.0 + neg_zero_point
    else:
        return lane_as_half(words, LANE, BITS) * 32768.0 + neg_zero_point


@triton.jit
def packed_dot(
    x_ptr: tl.tensor, words_ptr: tl.tensor, scale_zero_ptr: tl.tensor,
    tile: tl.tensor, tokens: tl.tensor, columns: tl.tensor, next_weights: tl.tuple,
    BITS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    SPLIT: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr, EVEN_COLUMNS: tl.constexpr,
    EVEN_ROUNDS: tl.constexpr, NEXT_TILES: tl.constexpr, NEXT_LINES: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return float32 [ROWS, TOKENS]: rows tile · ROWS and on of the weight times every token.

    Args:
        x_ptr: float16 [tokens, columns]; tokens ≤ TOKENS.
        words_ptr, scale_zero_ptr: the tensors of a PackedLinear with `columns` input channels.
        EVEN_COLUMNS: they fill their last block.
        EVEN_ROUNDS: every warp has as many blocks.
        next_weights, NEXT_TILES, NEXT_LINES: of `prefetch_next`, when all of its own are here.
    """
    PACK_FACTOR: tl.constexpr = 16 // BITS
    WORDS: tl.constexpr = BLOCK // PACK_FACTOR
    # A block holds whole groups, or a group whole blocks: one of the two is 1.
    GROUPS_PER_BLOCK: tl.constexpr = BLOCK // GROUP if GROUP < BLOCK else 1
    BLOCKS_PER_GROUP: tl.constexpr = GROUP // BLOCK if GROUP > BLOCK else 1
    LANES_PER_GROUP: tl.constexpr = PACK_FACTOR // GROUPS_PER_BLOCK
    blocks = tl.cdiv(columns, BLOCK)
    groups = tl.cdiv(blocks * GROUPS_PER_BLOCK, BLOCKS_PER_GROUP)
    warp = tl.arange(0, SPLIT)[:, None, None]
    row = tile * ROWS + tl.arange(0, ROWS)[None, :, None]
    start = (row // TILE).to(tl.int64)
    word = tl.arange(0, WORDS)
    words_ptr += start * (blocks * TILE * WORDS) + row % TILE * WORDS + word[None, None, :]
    scale_zero_ptr += start * (groups * TILE) + row % TILE
    token = tl.arange(0, TOKENS)[None, None, :]
    x_ptr += token * columns + word[None, :, None]
    total = tl.zeros((SPLIT, ROWS, TOKENS), tl.float32)
    for first in tl.range(0, blocks, SPLIT, num_stages=STAGES):
        block = first + warp
        if not EVEN_ROUNDS:
            # A warp without a block in the last round takes the last one again, at a scale of 0.
            has_block = block < blocks
            block = tl.minimum(block, blocks - 1)
        packed = tl.load(words_ptr + block * (TILE * WORDS))
        for group in tl.static_range(GROUPS_PER_BLOCK):
            low, sums = lanes_dot(
                packed, x_ptr, block * BLOCK, word, token, tokens, columns,
                group * LANES_PER_GROUP, LANES_PER_GROUP, BITS, TOKENS, EVEN_COLUMNS,
            )  # fmt: skip
            if BITS == 16:
                total += low if EVEN_ROUNDS else tl.where(has_block, low, 0.0)
            else:
                scale_zero = tl.load(
                    scale_zero_ptr + (block // BLOCKS_PER_GROUP * GROUPS_PER_BLOCK + group) * TILE
                )
                scale = scale_zero.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
                neg_zero_point = (scale_zero >> 16).to(tl.int16).to(tl.float16, bitcast=True)
                if not EVEN_ROUNDS:
                    scale = tl.where(has_block, scale, 0.0)
                total += (low + neg_zero_point.to(tl.float32) * ZERO_SCALE * sums) * scale
    prefetch_next(next_weights, tile, tl.num_programs(0), NEXT_TILES, NEXT_LINES)
    total = tl.sum(total, 0)
    return total * BITS_UNIT if BITS < 16 else total


@triton.jit
def lanes_dot(
    packed: tl.tensor, x_ptr: tl.tensor, channel: tl.tensor, word: tl.tensor, token: tl.tensor,
    tokens: tl.tensor, columns: tl.tensor,
    FIRST: tl.constexpr, LANES: tl.constexpr, BITS: tl.constexpr, TOKENS: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """Return lanes FIRST and on of a block times every token, and their sums of activations.

    Both [warps, rows, tokens]; quantized values are in units of 2⁻²⁴, sums the same for every row.

    Args:
        channel: the block's first input channel.
    """
    SPLIT: tl.constexpr = packed.shape[0]
    ROWS: tl.constexpr = packed.shape[1]
    WORDS: tl.constexpr = packed.shape[2]
    low = tl.zeros((SPLIT, ROWS, TOKENS), tl.float32)
    high = tl.zeros((SPLIT, ROWS, TOKENS), tl.float32)
    sums = tl.zeros((SPLIT, TILE, TOKENS), tl.float32)
    ones = tl.full((SPLIT, TILE, WORDS), 1.0, tl.float16)
    for lane in tl.static_range(FIRST, FIRST + LANES):
        inside = token < tokens
        if not EVEN_COLUMNS:
            inside &= channel + lane * WORDS + word[None, :, None] < columns
        value = tl.load(x_ptr + channel + lane * WORDS, mask=inside, other=0.0)
        if BITS == 16:
            low = tl.dot(packed, value, low)
        else:
            weight = lane_as_half(packed, lane, BITS)
            if BITS == 4 and lane % 2 == 1:
                high = tl.dot(weight, value, high)
            else:
                low = tl.dot(weight, value, low)
            sums = tl.dot(ones, value, sums)
    if BITS == 4:
        low += high * HIGH_SCALE
    sums = tl.broadcast_to(sums[:, None], (SPLIT, ROWS // TILE, TILE, TOKENS))
    return low, sums.reshape(SPLIT, ROWS, TOKENS)
