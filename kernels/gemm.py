"""y = x Wᵀ + bias for many tokens (9 to 256 is what it is made for); W in 4, 8 or 16 bits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vila_deploy.kernels.launch import Launch
from vila_deploy.kernels.packed_dot import MANTISSA_UNIT, TILE, plane
from vila_deploy.kernels.packed_linear import PackedLinear, unpack
from vila_deploy.kernels.tile_config import gemm_tile


@triton.jit
def gemm_kernel(
    x, words, scale_zero, bias, y, tokens, columns, rows,
    HAS_BIAS: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    PLANES: tl.constexpr = 16 // BITS
    WORDS: tl.constexpr = BLOCK // PLANES
    INNER: tl.constexpr = BLOCK // GROUP if GROUP < BLOCK else 1
    OUTER: tl.constexpr = GROUP // BLOCK if GROUP > BLOCK else 1
    EACH: tl.constexpr = PLANES // INNER
    blocks = tl.cdiv(columns, BLOCK)
    groups = tl.cdiv(blocks * INNER, OUTER)
    # Programs that share a tile of weights run side by side, so that it is read once.
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[None, :]
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    # The last program may reach behind the padded rows; it then reads the last tile again.
    padded = tl.minimum(row, tl.cdiv(rows, 2 * TILE) * 2 * TILE - 1)
    start = (padded // TILE).to(tl.int64)
    word = tl.arange(0, WORDS)
    words += start * (blocks * TILE * WORDS) + padded % TILE * WORDS + word[None, :]
    scale_zero += start * (groups * TILE) + padded % TILE
    x += token.to(tl.int64) * columns + word[:, None]
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for block in tl.range(0, blocks, num_stages=STAGES):
        packed = tl.load(words + block * (TILE * WORDS))
        for inner in tl.static_range(INNER):
            minus_zero, scale = 0.0, 1.0
            if BITS < 16:
                both = tl.load(scale_zero + (block // OUTER * INNER + inner) * TILE)
                scale = both.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
                minus_zero = (both >> 16).to(tl.int16).to(tl.float16, bitcast=True)
                minus_zero = tl.broadcast_to(minus_zero, (ROWS, WORDS))
            part = tl.zeros((ROWS, TOKENS), tl.float32)
            for each in tl.static_range(EACH):
                channel = block * BLOCK + (inner * EACH + each) * WORDS
                inside = (channel + word[:, None] < columns) & (token < tokens)
                value = tl.load(x + channel, mask=inside, other=0.0)
                part = tl.dot(plane(packed, minus_zero, inner * EACH + each, BITS), value, part)
            total += part * scale
    if BITS < 16:
        total *= MANTISSA_UNIT
    if HAS_BIAS:
        total += tl.load(bias + row, mask=row < rows, other=0.0)
    inside = (row < rows) & (token < tokens)
    tl.store(y + token.to(tl.int64) * rows + row, total.to(tl.float16), mask=inside)


def gemm(x: Tensor, weight: PackedLinear, bias: Tensor | None, y: Tensor, sm: int) -> Launch:
    """A launch that fills `y`.

    Args:
        x: float16 [tokens, in].
        bias: float32 [out] or None.
        y: float16 [tokens, out].
    """
    tile = gemm_tile(sm, x.shape[0], weight.out_features)
    return Launch(
        gemm_kernel,
        (triton.cdiv(x.shape[0], tile.tokens), triton.cdiv(weight.out_features, tile.rows)),
        {
            "x": x, "words": weight.words, "scale_zero": weight.scale_zero,
            "bias": weight.scale_zero if bias is None else bias, "y": y,
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
    """The same in float32."""
    return torch.nn.functional.linear(x.float(), unpack(weight), bias)
