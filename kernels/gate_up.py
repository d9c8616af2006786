"""RMSNorm, gate and up projection, silu(gate) · up, in one kernel over one interleaved weight."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vila_deploy.kernels.capability import ComputeCapability
from vila_deploy.kernels.launch import Launch
from vila_deploy.kernels.packed_dot import packed_dot
from vila_deploy.kernels.packed_linear import ROWS, PackedLinear, unpack
from vila_deploy.kernels.pdl import wait_and_prefetch
from vila_deploy.kernels.rms_norm import (
    inverse_rms,
    load_squares,
    normed_launch,
    normed_reference,
)
from vila_deploy.kernels.tile_config import gate_up_tile


@triton.jit
def gate_up_kernel(
    x_ptr: tl.tensor, squares_ptr: tl.tensor, words_ptr: tl.tensor, scale_zero_ptr: tl.tensor,
    y_ptr: tl.tensor, tokens: tl.tensor, columns: tl.tensor, rows: tl.tensor, count: tl.tensor,
    epsilon: tl.tensor, prescale: tl.tensor, next_weights: tl.tuple,
    COUNT: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, SPLIT: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr, EVEN_ROUNDS: tl.constexpr, NEXT_TILES: tl.constexpr,
    NEXT_LINES: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    tile = tl.program_id(0)
    if PDL:
        wait_and_prefetch(
            tile, words_ptr, scale_zero_ptr, columns, BITS, BLOCK, GROUP, ROWS
        )  # fmt: skip
    gate_up_rows(
        tile, x_ptr, squares_ptr, words_ptr, scale_zero_ptr, y_ptr, tokens, columns, rows, count,
        epsilon, prescale, next_weights,
        COUNT, BITS, BLOCK, GROUP, ROWS, SPLIT, TOKENS, STAGES, EVEN_COLUMNS, EVEN_ROUNDS,
        NEXT_TILES, NEXT_LINES,
    )  # fmt: skip


@triton.jit
def gate_up_rows(
    tile: tl.tensor, x_ptr: tl.tensor, squares_ptr: tl.tensor, words_ptr: tl.tensor,
    scale_zero_ptr: tl.tensor, y_ptr: tl.tensor, tokens: tl.tensor, columns: tl.tensor,
    rows: tl.tensor, count: tl.tensor, epsilon: tl.tensor, prescale: tl.tensor,
    next_weights: tl.tuple,
    COUNT: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, SPLIT: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr, EVEN_ROUNDS: tl.constexpr, NEXT_TILES: tl.constexpr,
    NEXT_LINES: tl.constexpr,
) -> None:  # fmt: skip
    """Write the channels of y that rows tile · ROWS and on of the weight give."""
    squares = load_squares(squares_ptr, count, tokens, COUNT, TOKENS)
    total = packed_dot(
        x_ptr, words_ptr, scale_zero_ptr, tile, tokens, columns, next_weights,
        BITS, BLOCK, GROUP, ROWS, SPLIT, TOKENS, STAGES, EVEN_COLUMNS, EVEN_ROUNDS,
        NEXT_TILES, NEXT_LINES,
    )  # fmt: skip
    total *= (inverse_rms(squares, columns, epsilon) * prescale)[None, :]
    # 16 channels of gate, then the same 16 of up, and so on.
    pairs = total.reshape(ROWS // 32, 2, 16, TOKENS).permute(0, 2, 3, 1)
    gate, up = tl.split(pairs.reshape(ROWS // 2, TOKENS, 2))
    value = gate / (1.0 + tl.exp(-gate)) * up
    row = tile * (ROWS // 2) + tl.arange(0, ROWS // 2)[:, None]
    token = tl.arange(0, TOKENS)[None, :]
    inside = (row < rows) & (token < tokens)
    tl.store(y_ptr + token * rows + row, value.to(tl.float16), mask=inside)


def gate_up(
    x: Tensor, squares: Tensor, weight: PackedLinear, y: Tensor, epsilon: float, prescale: float,
    capability: ComputeCapability,
) -> Launch:  # fmt: skip
    """Return a launch that fills `y`.

    Args:
        x, squares, epsilon, prescale: as for `normed_launch`.
        weight: both projections, from `packed_linear.interleave`.
        y: float16 [tokens, intermediate].
    """
    return normed_launch(
        gate_up_kernel, x, squares, weight, epsilon, prescale,
        gate_up_tile(capability, weight.out_features, weight.blocks),
        {"y_ptr": y, "rows": y.shape[1]},
    )  # fmt: skip


def gate_up_reference(
    x: Tensor, squares: Tensor, weight: PackedLinear, intermediate: int, epsilon: float,
    prescale: float,
) -> Tensor:  # fmt: skip
    """Return silu(gate) · up of RMSNorm(x), float32 [tokens, intermediate]."""
    pairs = unpack(weight).unflatten(0, (-1, 2, ROWS))
    gate, up = (pairs[:, half].flatten(0, 1)[:intermediate] for half in (0, 1))
    normed = normed_reference(x, squares, epsilon, prescale)
    return torch.nn.functional.silu(normed @ gate.T) * (normed @ up.T)
