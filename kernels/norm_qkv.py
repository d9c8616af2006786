"""RMSNorm, then q, k and v in one product: the first kernel of a decoder layer."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vila_deploy.kernels.capability import ComputeCapability
from vila_deploy.kernels.launch import Launch
from vila_deploy.kernels.packed_dot import packed_dot
from vila_deploy.kernels.packed_linear import PackedLinear, unpack
from vila_deploy.kernels.pdl import wait_and_prefetch
from vila_deploy.kernels.rms_norm import (
    inverse_rms,
    load_squares,
    normed_launch,
    normed_reference,
)
from vila_deploy.kernels.tile_config import gemv_tile


@triton.jit
def norm_qkv_kernel(
    x_ptr: tl.tensor, squares_ptr: tl.tensor, words_ptr: tl.tensor, scale_zero_ptr: tl.tensor,
    bias_ptr: tl.tensor, y_ptr: tl.tensor, tokens: tl.tensor, columns: tl.tensor, rows: tl.tensor,
    count: tl.tensor, epsilon: tl.tensor, prescale: tl.tensor, next_weights: tl.tuple,
    HAS_BIAS: tl.constexpr, COUNT: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr, TOKENS: tl.constexpr,
    STAGES: tl.constexpr, EVEN_COLUMNS: tl.constexpr,
    EVEN_ROUNDS: tl.constexpr, NEXT_TILES: tl.constexpr,
    NEXT_LINES: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    tile = tl.program_id(0)
    if PDL:
        wait_and_prefetch(
            tile, words_ptr, scale_zero_ptr, columns, BITS, BLOCK, GROUP, ROWS
        )  # fmt: skip
    norm_qkv_rows(
        tile, x_ptr, squares_ptr, words_ptr, scale_zero_ptr, bias_ptr, y_ptr, tokens, columns,
        rows, count, epsilon, prescale, next_weights,
        HAS_BIAS, COUNT, BITS, BLOCK, GROUP, ROWS, SPLIT, TOKENS, STAGES, EVEN_COLUMNS, EVEN_ROUNDS,
        NEXT_TILES, NEXT_LINES,
    )  # fmt: skip


@triton.jit
def norm_qkv_rows(
    tile: tl.tensor, x_ptr: tl.tensor, squares_ptr: tl.tensor, words_ptr: tl.tensor,
    scale_zero_ptr: tl.tensor, bias_ptr: tl.tensor, y_ptr: tl.tensor, tokens: tl.tensor,
    columns: tl.tensor, rows: tl.tensor, count: tl.tensor, epsilon: tl.tensor, prescale: tl.tensor,
    next_weights: tl.tuple,
    HAS_BIAS: tl.constexpr, COUNT: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr, TOKENS: tl.constexpr,
    STAGES: tl.constexpr, EVEN_COLUMNS: tl.constexpr,
    EVEN_ROUNDS: tl.constexpr, NEXT_TILES: tl.constexpr,
    NEXT_LINES: tl.constexpr,
) -> None:  # fmt: skip
    """Write rows tile · ROWS and on of y."""
    row = tile * ROWS + tl.arange(0, ROWS)
    # Loaded before the weights and summed after them, so that nothing waits for it.
    squares = load_squares(squares_ptr, count, tokens, COUNT, TOKENS)
    total = packed_dot(
        x_ptr, words_ptr, scale_zero_ptr, tile, tokens, columns, next_weights,
        BITS, BLOCK, GROUP, ROWS, SPLIT, TOKENS, STAGES, EVEN_COLUMNS, EVEN_ROUNDS,
        NEXT_TILES, NEXT_LINES,
    )  # fmt: skip
    total *= (inverse_rms(squares, columns, epsilon) * prescale)[None, :]
    if HAS_BIAS:
        total += tl.load(bias_ptr + row, mask=row < rows, other=0.0)[:, None]
    token = tl.arange(0, TOKENS)[None, :]
    inside = (row[:, None] < rows) & (token < tokens)
    tl.store(y_ptr + token * rows + row[:, None], total.to(tl.float16), mask=inside)


def norm_qkv(
    x: Tensor, squares: Tensor, weight: PackedLinear, bias: Tensor | None, y: Tensor,
    epsilon: float, prescale: float, capability: ComputeCapability,
) -> Launch:  # fmt: skip
    """Return a launch that fills `y`.

    Args:
        x, squares, epsilon, prescale: as for `normed_launch`.
        bias: float32 [out] or None.
        y: float16 [tokens, out].
    """
    return normed_launch(
        norm_qkv_kernel, x, squares, weight, epsilon, prescale,
        gemv_tile(capability, weight.out_features, weight.blocks),
        {"bias_ptr": squares if bias is None else bias, "y_ptr": y},
        {"HAS_BIAS": bias is not None},
    )  # fmt: skip


def norm_qkv_reference(
    x: Tensor, squares: Tensor, weight: PackedLinear, bias: Tensor | None, epsilon: float,
    prescale: float,
) -> Tensor:  # fmt: skip
    """Return RMSNorm(x) Wᵀ + bias [tokens, out] in float32."""
    normed = normed_reference(x, squares, epsilon, prescale)
    return torch.nn.functional.linear(normed, unpack(weight), bias)
