"""A packed 4- or 8-bit weight as a plain float16 matrix, for prompts long enough for cuBLAS."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vila_deploy.kernels.launch import Launch
from vila_deploy.kernels.packed_dot import MANTISSA_UNIT, TILE, plane
from vila_deploy.kernels.packed_linear import ROWS, PackedLinear, unpack


@triton.jit
def dequantize_kernel(
    words, scale_zero, y, columns, rows,
    BITS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    PLANES: tl.constexpr = 16 // BITS
    WORDS: tl.constexpr = BLOCK // PLANES
    INNER: tl.constexpr = BLOCK // GROUP if GROUP < BLOCK else 1
    OUTER: tl.constexpr = GROUP // BLOCK if GROUP > BLOCK else 1
    EACH: tl.constexpr = PLANES // INNER
    tile, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    blocks = tl.cdiv(columns, BLOCK)
    groups = tl.cdiv(blocks * INNER, OUTER)
    row, word = tl.arange(0, TILE)[:, None], tl.arange(0, WORDS)[None, :]
    packed = tl.load(words + (tile * blocks + block) * (TILE * WORDS) + row * WORDS + word)
    y += (tile * TILE + row) * columns
    for number in tl.static_range(PLANES):
        group = block // OUTER * INNER + number // EACH
        both = tl.load(scale_zero + (tile * groups + group) * TILE + row)
        scale = both.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * MANTISSA_UNIT
        minus_zero = (both >> 16).to(tl.int16).to(tl.float16, bitcast=True)
        minus_zero = tl.broadcast_to(minus_zero, (TILE, WORDS))
        value = plane(packed, minus_zero, number, BITS).to(tl.float32) * scale
        channel = block * BLOCK + number * WORDS + word
        inside = (tile * TILE + row < rows) & (channel < columns)
        tl.store(y + channel, value.to(tl.float16), mask=inside)


def dequantize(weight: PackedLinear, y: Tensor) -> Launch:
    """A launch that fills `y`, float16 [out, in]; the weight has 4 or 8 bits."""
    tiles = triton.cdiv(weight.out_features, ROWS)
    return Launch(
        dequantize_kernel,
        (tiles, weight.words.shape[1]),
        {
            "words": weight.words, "scale_zero": weight.scale_zero, "y": y,
            "columns": weight.in_features, "rows": weight.out_features,
        },
        {"BITS": weight.bits, "BLOCK": weight.block, "GROUP": weight.group},
        4,
    )  # fmt: skip


def dequantize_reference(weight: PackedLinear) -> Tensor:
    """The same: exact products, rounded once."""
    return unpack(weight).half()
