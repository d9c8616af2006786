"""y = x Wᵀ + bias for many tokens (9 to 256 is what it is made for); W in 4, 8 or 16 bits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vila_deploy.kernels.capability import ComputeCapability
from vila_deploy.kernels.launch import Launch
from vila_deploy.kernels.packed_dot import MANTISSA_UNIT, TILE, unpack_lane
from vila_deploy.kernels.packed_linear import PackedLinear, unpack
from vila_deploy.kernels.tile_config import gemm_tile


# Prompts of every length share one compiled kernel.
@triton.jit(do_not_specialize=["tokens"])
def gemm_kernel(
    x_ptr: tl.tensor, words_ptr: tl.tensor, scale_zero_ptr: tl.tensor, bias_ptr: tl.tensor,
    y_ptr: tl.tensor, tokens: tl.tensor, columns: tl.tensor, rows: tl.tensor,
    HAS_BIAS: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
) -> None:  # fmt: skip
    PACK_FACTOR: tl.constexpr = 16 // BITS
    WORDS: tl.constexpr = BLOCK // PACK_FACTOR
    GROUPS_PER_BLOCK: tl.constexpr = BLOCK // GROUP if GROUP < BLOCK else 1
    BLOCKS_PER_GROUP: tl.constexpr = GROUP // BLOCK if GROUP > BLOCK else 1
    LANES_PER_GROUP: tl.constexpr = PACK_FACTOR // GROUPS_PER_BLOCK
    blocks = tl.cdiv(columns, BLOCK)
    groups = tl.cdiv(blocks * GROUPS_PER_BLOCK, BLOCKS_PER_GROUP)
    # Programs that share a tile of weights run side by side, so that it is read once.
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[None, :]
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    # The last program may reach behind the padded rows; it then reads the last tile again.
    padded = tl.minimum(row, tl.cdiv(rows, 2 * TILE) * 2 * TILE - 1)
    start = (padded // TILE).to(tl.int64)
    word = tl.arange(0, WORDS)
    words_ptr += start * (blocks * TILE * WORDS) + padded % TILE * WORDS + word[None, :]
    scale_zero_ptr += start * (groups * TILE) + padded % TILE
    x_ptr += token.to(tl.int64) * columns + word[:, None]
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for block in tl.range(0, blocks, num_stages=STAGES):
        packed = tl.load(words_ptr + block * (TILE * WORDS))
        for group in tl.static_range(GROUPS_PER_BLOCK):
            neg_zero_point, scale = 0.0, 1.0
            if BITS < 16:
                scale_zero = tl.load(
                    scale_zero_ptr + (block // BLOCKS_PER_GROUP * GROUPS_PER_BLOCK + group) * TILE
                )
                scale = scale_zero.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
                neg_zero_point = (scale_zero >> 16).to(tl.int16).to(tl.float16, bitcast=True)
                neg_zero_point = tl.broadcast_to(neg_zero_point, (ROWS, WORDS))
            partial = tl.zeros((ROWS, TOKENS), tl.float32)
            for index in tl.static_range(LANES_PER_GROUP):
                channel = block * BLOCK + (group * LANES_PER_GROUP + index) * WORDS
                inside = (channel + word[:, None] < columns) & (token < tokens)
                value = tl.load(x_ptr + channel, mask=inside, other=0.0)
                weight = unpack_lane(packed, neg_zero_point, group * LANES_PER_GROUP + index, BITS)
                partial = tl.dot(weight, value, partial)
            total += partial * scale
    if BITS < 16:
        total *= MANTISSA_UNIT
    if HAS_BIAS:
        total += tl.load(bias_ptr + row, mask=row < rows, other=0.0)
    inside = (row < rows) & (token < tokens)
    tl.store(y_ptr + token.to(tl.int64) * rows + row, total.to(y_ptr.dtype.element_ty), mask=inside)


def gemm(
    x: Tensor, weight: PackedLinear, bias: Tensor | None, y: Tensor, capability: ComputeCapability
) -> Launch:
    """Return a launch that fills `y`.

    Args:
        x: float16 [tokens, in].
        bias: float32 [out] or None.
        y: float16 or float32 [tokens, out].
    """
    tile = gemm_tile(capability, x.shape[0], weight.out_features)
    return Launch(
        gemm_kernel,
        (triton.cdiv(x.shape[0], tile.tokens), triton.cdiv(weight.out_features, tile.rows)),
        {
            "x_ptr": x, "words_ptr": weight.words, "scale_zero_ptr": weight.scale_zero,
            "bias_ptr": weight.scale_zero if bias is None else bias, "y_ptr": y,
            "tokens": x.shape[0], "columns": weight.in_features, "rows": weight.out_features,
        },
        {
            "HAS_BIAS": bias is not None, "BITS": weight.bits, "BLOCK": weight.block,
            "GROUP": weight.group, "ROWS": tile.rows, "TOKENS": tile.tokens,
            "STAGES": tile.stages,
        },
        tile.warps,
    )  # fmt: skip


def gemm_reference(x: Tensor, weight: PackedLinear, bias: Tensor | None) -> Tensor:
    """Return x Wᵀ + bias [tokens, out] in float32."""
    return torch.nn.functional.linear(x.float(), unpack(weight), bias)
