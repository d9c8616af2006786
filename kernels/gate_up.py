"""RMSNorm, gate and up projection, silu(gate) · up, in one kernel over one interleaved weight."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vila_deploy.kernels.gemv import weight_arguments, weight_constants
from vila_deploy.kernels.launch import Launch, next_power_of_2
from vila_deploy.kernels.norm_qkv import normed
from vila_deploy.kernels.packed_dot import inverse_rms, load_squares, times_rows
from vila_deploy.kernels.packed_linear import ROWS, PackedLinear, unpack
from vila_deploy.kernels.pdl import wait_with_rows
from vila_deploy.kernels.tile_config import gate_up_tile


@triton.jit
def gate_up_kernel(
    x, squares, words, scale_zero, y, tokens, columns, rows, count, epsilon, unit,
    COUNT: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, SPLIT: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    if PDL:
        wait_with_rows(tile, words, scale_zero, columns, BITS, BLOCK, GROUP, ROWS)
    gate_up_rows(
        tile, x, squares, words, scale_zero, y, tokens, columns, rows, count, epsilon, unit,
        COUNT, BITS, BLOCK, GROUP, ROWS, SPLIT, TOKENS, STAGES,
    )  # fmt: skip


@triton.jit
def gate_up_rows(
    tile, x, squares, words, scale_zero, y, tokens, columns, rows, count, epsilon, unit,
    COUNT: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, SPLIT: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What rows tile · ROWS and on of the weight make of `y`."""
    partial = load_squares(squares, count, tokens, COUNT, TOKENS)
    total = times_rows(
        x, words, scale_zero, tile, tokens, columns,
        BITS, BLOCK, GROUP, ROWS, SPLIT, TOKENS, STAGES,
    )  # fmt: skip
    total *= (inverse_rms(partial, columns, epsilon) * unit)[None, :]
    # 16 channels of gate, then the same 16 of up, and so on.
    pairs = total.reshape(ROWS // 32, 2, 16, TOKENS).permute(0, 2, 3, 1)
    gate, up = tl.split(pairs.reshape(ROWS // 2, TOKENS, 2))
    value = gate / (1.0 + tl.exp(-gate)) * up
    row = tile * (ROWS // 2) + tl.arange(0, ROWS // 2)[:, None]
    token = tl.arange(0, TOKENS)[None, :]
    inside = (row < rows) & (token < tokens)
    tl.store(y + token * rows + row, value.to(tl.float16), mask=inside)


def gate_up(
    x: Tensor, squares: Tensor, weight: PackedLinear, y: Tensor, epsilon: float, unit: float,
    sm: int,
) -> Launch:  # fmt: skip
    """A launch that fills `y`.

    Args:
        x, squares, epsilon, unit: as for `norm_qkv`.
        weight: both projections, from `layout.interleave`.
        y: float16 [tokens, intermediate].
    """
    tile = gate_up_tile(sm, weight.out_features)
    return Launch(
        gate_up_kernel,
        (triton.cdiv(weight.out_features, tile.rows),),
        {
            **weight_arguments(x, weight),
            "squares": squares,
            "count": squares.shape[0],
            "y": y,
            "rows": y.shape[1],
            "epsilon": epsilon,
            "unit": unit,
        },
        {
            **weight_constants(weight, tile.rows, tile.split),
            "COUNT": next_power_of_2(squares.shape[0]),
            "STAGES": tile.stages,
            "PDL": False,
        },
        tile.split,
    )


def gate_up_reference(
    x: Tensor, squares: Tensor, weight: PackedLinear, intermediate: int, epsilon: float,
    unit: float,
) -> Tensor:  # fmt: skip
    """The same in float32, [tokens, intermediate]."""
    both = unpack(weight).unflatten(0, (-1, 2, ROWS))
    gate, up = (both[:, half].flatten(0, 1)[:intermediate] for half in (0, 1))
    x = normed(x, squares, epsilon, unit)
    return torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
