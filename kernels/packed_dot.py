"""The loop that all of them share: rows of a packed weight times a few activations.

Weights are the left operand of the tensor core's 16 × 8 × 16 product and up to 8 tokens the right
one, so one to eight tokens cost the same. Each warp takes every SPLIT-th block of input channels;
the sums of the warps are added in one fixed order, so results repeat bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vila_deploy.kernels import interpreter

# Triton's interpreter has no inline assembly; there the same bits come from plain operators.
INTERPRETED = tl.constexpr(interpreter.INTERPRETED)
MANTISSA_UNIT = tl.constexpr(512.0)  # 1 / layout.ZERO_UNIT
TILE = tl.constexpr(16)  # layout.ROWS


# Two 16-bit words an instruction. Bits 8 to 11 of a float16 are no longer linear, hence the shift.
LOW_4 = tl.constexpr("and.b32 $0, $1, 0x000f000f;")
LOW_4_HIGH = tl.constexpr("and.b32 $0, $1, 0x00f000f0;")
HIGH_4 = tl.constexpr("{ .reg .b32 t; shr.b32 t, $1, 8; and.b32 $0, t, 0x000f000f; }")
HIGH_4_HIGH = tl.constexpr("{ .reg .b32 t; shr.b32 t, $1, 8; and.b32 $0, t, 0x00f000f0; }")
LOW_8 = tl.constexpr("and.b32 $0, $1, 0x00ff00ff;")
HIGH_8 = tl.constexpr("{ .reg .b32 t; shr.b32 t, $1, 8; and.b32 $0, t, 0x00ff00ff; }")


@triton.jit
def bits_as_half(words, MASK: tl.constexpr, SHIFT: tl.constexpr, CODE: tl.constexpr):
    """float16 whose bits are (words >> SHIFT) & MASK; CODE does that for two words at once."""
    if INTERPRETED:
        return ((words >> SHIFT) & MASK).to(tl.float16, bitcast=True)
    else:
        return tl.inline_asm_elementwise(
            CODE, "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2
        )


@triton.jit
def plane(words, minus_zero, PLANE: tl.constexpr, BITS: tl.constexpr):
    """(level − zero) · 2⁻⁹ of plane PLANE as float16, exact; 16 bits are weights already."""
    if BITS == 16:
        return words
    elif BITS == 8:
        if PLANE == 0:
            return bits_as_half(words, 0xFF, 0, LOW_8) * 32768.0 + minus_zero
        else:
            return bits_as_half(words, 0xFF, 8, HIGH_8) * 32768.0 + minus_zero
    elif PLANE == 0:
        return bits_as_half(words, 0x0F, 0, LOW_4) * 32768.0 + minus_zero
    elif PLANE == 1:
        return bits_as_half(words, 0xF0, 0, LOW_4_HIGH) * 2048.0 + minus_zero
    elif PLANE == 2:
        return bits_as_half(words, 0x0F, 8, HIGH_4) * 32768.0 + minus_zero
    else:
        return bits_as_half(words, 0xF0, 8, HIGH_4_HIGH) * 2048.0 + minus_zero


@triton.jit
def times_rows(
    x, words, scale_zero, tile, tokens, columns,
    BITS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    SPLIT: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """float32 [ROWS, TOKENS]: rows tile · ROWS and on of the weight times every token.

    Args:
        x: float16 [tokens, columns]; tokens ≤ TOKENS.
        words, scale_zero: of a PackedLinear with `columns` input channels.
    """
    PLANES: tl.constexpr = 16 // BITS
    WORDS: tl.constexpr = BLOCK // PLANES
    # Groups within a block, and blocks within a group: one of them is 1.
    INNER: tl.constexpr = BLOCK // GROUP if GROUP < BLOCK else 1
    OUTER: tl.constexpr = GROUP // BLOCK if GROUP > BLOCK else 1
    EACH: tl.constexpr = PLANES // INNER
    blocks = tl.cdiv(columns, BLOCK)
    groups = tl.cdiv(blocks * INNER, OUTER)
    warp = tl.arange(0, SPLIT)[:, None, None]
    row = tile * ROWS + tl.arange(0, ROWS)[None, :, None]
    start = (row // TILE).to(tl.int64)
    word = tl.arange(0, WORDS)
    words += start * (blocks * TILE * WORDS) + row % TILE * WORDS + word[None, None, :]
    scale_zero += start * (groups * TILE) + row % TILE
    token = tl.arange(0, TOKENS)[None, None, :]
    x += token * columns + word[None, :, None]
    total = tl.zeros((SPLIT, ROWS, TOKENS), tl.float32)
    for first in tl.range(0, blocks, SPLIT, num_stages=STAGES):
        block = first + warp
        packed = tl.load(words + block * (TILE * WORDS), mask=block < blocks, other=0)
        for inner in tl.static_range(INNER):
            minus_zero, scale = 0.0, 1.0
            if BITS < 16:
                both = tl.load(
                    scale_zero + (block // OUTER * INNER + inner) * TILE,
                    mask=block < blocks, other=0,
                )  # fmt: skip
                scale = both.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
                minus_zero = (both >> 16).to(tl.int16).to(tl.float16, bitcast=True)
                minus_zero = tl.broadcast_to(minus_zero, (SPLIT, ROWS, WORDS))
            part = tl.zeros((SPLIT, ROWS, TOKENS), tl.float32)
            for each in tl.static_range(EACH):
                channel = block * BLOCK + (inner * EACH + each) * WORDS
                inside = (channel + word[None, :, None] < columns) & (token < tokens)
                value = tl.load(x + channel, mask=inside, other=0.0)
                part = tl.dot(plane(packed, minus_zero, inner * EACH + each, BITS), value, part)
            total += part * scale
    total = tl.sum(total, 0)
    return total * MANTISSA_UNIT if BITS < 16 else total


@triton.jit
def inverse_rms(squares, columns, epsilon):
    """1 / √(mean square + epsilon) [TOKENS] from what `load_squares` gives."""
    return tl.rsqrt(tl.sum(squares, 0) / columns + epsilon)


@triton.jit
def load_squares(squares, count, tokens, COUNT: tl.constexpr, TOKENS: tl.constexpr):
    """Partial sums of squares [COUNT, TOKENS], zero behind `count`; stored [count, TOKENS]."""
    index, token = tl.arange(0, COUNT)[:, None], tl.arange(0, TOKENS)[None, :]
    inside = (index < count) & (token < tokens)
    return tl.load(squares + index * TOKENS + token, mask=inside, other=0.0)
