"""residual += x Wᵀ: o_proj and down_proj, each with the residual and half of the next norm.

Besides the residual it writes what the next kernel needs of it: the residual times that norm's
weight in float16, and a sum of squares for each program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vila_deploy.kernels.capability import ComputeCapability
from vila_deploy.kernels.gemv import weight_arguments, weight_constants
from vila_deploy.kernels.launch import Launch
from vila_deploy.kernels.next_weights import NO_NEXT, NO_NEXT_CONSTANTS
from vila_deploy.kernels.packed_dot import packed_dot
from vila_deploy.kernels.packed_linear import PackedLinear, unpack
from vila_deploy.kernels.pdl import wait_and_prefetch
from vila_deploy.kernels.tile_config import gemv_programs, gemv_tile


@triton.jit
def add_residual_kernel(
    x_ptr: tl.tensor, words_ptr: tl.tensor, scale_zero_ptr: tl.tensor, norm_ptr: tl.tensor,
    residual_ptr: tl.tensor, out_ptr: tl.tensor, squares_ptr: tl.tensor, tokens: tl.tensor,
    columns: tl.tensor, rows: tl.tensor, next_weights: tl.tuple,
    BITS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    SPLIT: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr, EVEN_COLUMNS: tl.constexpr,
    EVEN_ROUNDS: tl.constexpr, NEXT_TILES: tl.constexpr,
    NEXT_LINES: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    tile = tl.program_id(0)
    if PDL:
        wait_and_prefetch(
            tile, words_ptr, scale_zero_ptr, columns, BITS, BLOCK, GROUP, ROWS
        )  # fmt: skip
    add_residual_rows(
        tile, x_ptr, words_ptr, scale_zero_ptr, norm_ptr, residual_ptr, out_ptr, squares_ptr,
        tokens, columns, rows, next_weights,
        BITS, BLOCK, GROUP, ROWS, SPLIT, TOKENS, STAGES, EVEN_COLUMNS, EVEN_ROUNDS,
        NEXT_TILES, NEXT_LINES,
    )  # fmt: skip


@triton.jit
def add_residual_rows(
    tile: tl.tensor, x_ptr: tl.tensor, words_ptr: tl.tensor, scale_zero_ptr: tl.tensor,
    norm_ptr: tl.tensor, residual_ptr: tl.tensor, out_ptr: tl.tensor, squares_ptr: tl.tensor,
    tokens: tl.tensor, columns: tl.tensor, rows: tl.tensor, next_weights: tl.tuple,
    BITS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    SPLIT: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr, EVEN_COLUMNS: tl.constexpr,
    EVEN_ROUNDS: tl.constexpr, NEXT_TILES: tl.constexpr,
    NEXT_LINES: tl.constexpr,
) -> None:  # fmt: skip
    """Write rows tile · ROWS and on of the residual, and their sum of squares."""
    row = tile * ROWS + tl.arange(0, ROWS)[:, None]
    token = tl.arange(0, TOKENS)[None, :]
    inside = (row < rows) & (token < tokens)
    offset = token * rows + row
    before = tl.load(residual_ptr + offset, mask=inside, other=0.0)
    weight = tl.load(norm_ptr + row, mask=row < rows, other=0.0)
    total = before + packed_dot(
        x_ptr, words_ptr, scale_zero_ptr, tile, tokens, columns, next_weights,
        BITS, BLOCK, GROUP, ROWS, SPLIT, TOKENS, STAGES, EVEN_COLUMNS, EVEN_ROUNDS,
        NEXT_TILES, NEXT_LINES,
    )  # fmt: skip
    tl.store(residual_ptr + offset, total, mask=inside)
    tl.store(out_ptr + offset, (total * weight).to(tl.float16), mask=inside)
    squares = tl.sum(tl.where(inside, total * total, 0.0), 0)
    tl.store(squares_ptr + tile * TOKENS + tl.arange(0, TOKENS), squares)


def add_residual(
    x: Tensor, weight: PackedLinear, norm: Tensor, residual: Tensor, out: Tensor, squares: Tensor,
    capability: ComputeCapability,
) -> Launch:  # fmt: skip
    """Return a launch that adds to `residual` and fills `out` and `squares`.

    Args:
        x: float16 [tokens, in].
        norm: float32 [out], the next norm's weight, divided by a power of two.
        residual: float32 [tokens, out].
        out: float16 [tokens, out], the new residual times `norm`.
        squares: float32 [gemv_programs(capability, out), 8].
    """
    tile, programs = gemv_tile(capability, weight.out_features, weight.blocks), squares.shape[0]
    assert programs == gemv_programs(capability, weight.out_features)
    return Launch(
        add_residual_kernel,
        (programs,),
        {
            **weight_arguments(x, weight),
            "norm_ptr": norm,
            "residual_ptr": residual,
            "out_ptr": out,
            "squares_ptr": squares,
            **NO_NEXT,
        },
        {
            **weight_constants(weight, tile.rows, tile.split),
            "STAGES": tile.stages,
            **NO_NEXT_CONSTANTS,
            "PDL": False,
        },
        tile.split,
    )


def add_residual_reference(
    x: Tensor, weight: PackedLinear, norm: Tensor, residual: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the new residual, that times `norm`, and its sum of squares [tokens], in float32."""
    new = residual + torch.nn.functional.linear(x.float(), unpack(weight))
    return new, new * norm, (new * new).sum(1)
