"""A packed 4- or 8-bit weight as a plain float16 matrix, for prompts long enough for cuBLAS."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vila_deploy.kernels.launch import Launch
from vila_deploy.kernels.packed_dot import MANTISSA_UNIT, TILE, unpack_lane
from vila_deploy.kernels.packed_linear import ROWS, PackedLinear, unpack


@triton.jit
def dequantize_kernel(
    words_ptr: tl.tensor, scale_zero_ptr: tl.tensor, y_ptr: tl.tensor, columns: tl.tensor,
    rows: tl.tensor,
    BITS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
) -> None:  # fmt: skip
    PACK_FACTOR: tl.constexpr = 16 // BITS
    WORDS: tl.constexpr = BLOCK // PACK_FACTOR
    GROUPS_PER_BLOCK: tl.constexpr = BLOCK // GROUP if GROUP < BLOCK else 1
    BLOCKS_PER_GROUP: tl.constexpr = GROUP // BLOCK if GROUP > BLOCK else 1
    LANES_PER_GROUP: tl.constexpr = PACK_FACTOR // GROUPS_PER_BLOCK
    tile, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    blocks = tl.cdiv(columns, BLOCK)
    groups = tl.cdiv(blocks * GROUPS_PER_BLOCK, BLOCKS_PER_GROUP)
    row, word = tl.arange(0, TILE)[:, None], tl.arange(0, WORDS)[None, :]
    packed = tl.load(words_ptr + (tile * blocks + block) * (TILE * WORDS) + row * WORDS + word)
    y_ptr += (tile * TILE + row) * columns
    for lane in tl.static_range(PACK_FACTOR):
        group = block // BLOCKS_PER_GROUP * GROUPS_PER_BLOCK + lane // LANES_PER_GROUP
        scale_zero = tl.load(scale_zero_ptr + (tile * groups + group) * TILE + row)
        half_scale = scale_zero.to(tl.int16).to(tl.float16, bitcast=True)
        scale = half_scale.to(tl.float32) * MANTISSA_UNIT
        neg_zero_point = (scale_zero >> 16).to(tl.int16).to(tl.float16, bitcast=True)
        neg_zero_point = tl.broadcast_to(neg_zero_point, (TILE, WORDS))
        value = unpack_lane(packed, neg_zero_point, lane, BITS).to(tl.float32) * scale
        channel = block * BLOCK + lane * WORDS + word
        inside = (tile * TILE + row < rows) & (channel < columns)
        tl.store(y_ptr + channel, value.to(tl.float16), mask=inside)


def dequantize(weight: PackedLinear, y: Tensor) -> Launch:
    """Return a launch that fills `y`, float16 [out, in]; the weight has 4 or 8 bits."""
    tiles = triton.cdiv(weight.out_features, ROWS)
    return Launch(
        dequantize_kernel,
        (tiles, weight.words.shape[1]),
        {
            "words_ptr": weight.words, "scale_zero_ptr": weight.scale_zero, "y_ptr": y,
            "columns": weight.in_features, "rows": weight.out_features,
        },
        {"BITS": weight.bits, "BLOCK": weight.block, "GROUP": weight.group},
        4,
    )  # fmt: skip


def dequantize_reference(weight: PackedLinear) -> Tensor:
    """Return the weight, float16 [out, in]: exact products, rounded once."""
    return unpack(weight).half()
