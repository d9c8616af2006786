"""RMSNorm, then q, k and v in one product: the first kernel of a decoder layer.

The kernel that wrote the residual stream also left x = stream · norm weight in float16 and partial
sums of squares. The norm's factor is one number a token, so it multiplies the product instead of
the input, and no program reads the stream twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vila_deploy.kernels.gemv import weight_arguments, weight_constants
from vila_deploy.kernels.launch import Launch, next_power_of_2
from vila_deploy.kernels.packed_dot import inverse_rms, load_squares, times_rows
from vila_deploy.kernels.packed_linear import PackedLinear, unpack
from vila_deploy.kernels.pdl import wait_with_rows
from vila_deploy.kernels.tile_config import gemv_tile


@triton.jit
def norm_qkv_kernel(
    x, squares, words, scale_zero, bias, y, tokens, columns, rows, count, epsilon, unit,
    HAS_BIAS: tl.constexpr, COUNT: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr, TOKENS: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    if PDL:
        wait_with_rows(tile, words, scale_zero, columns, BITS, BLOCK, GROUP, ROWS)
    norm_qkv_rows(
        tile, x, squares, words, scale_zero, bias, y, tokens, columns, rows, count, epsilon, unit,
        HAS_BIAS, COUNT, BITS, BLOCK, GROUP, ROWS, SPLIT, TOKENS, STAGES,
    )  # fmt: skip


@triton.jit
def norm_qkv_rows(
    tile, x, squares, words, scale_zero, bias, y, tokens, columns, rows, count, epsilon, unit,
    HAS_BIAS: tl.constexpr, COUNT: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr, TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Rows tile · ROWS and on of `y`."""
    row = tile * ROWS + tl.arange(0, ROWS)
    # Loaded before the weights and summed after them, so that nothing waits for it.
    partial = load_squares(squares, count, tokens, COUNT, TOKENS)
    total = times_rows(
        x, words, scale_zero, tile, tokens, columns,
        BITS, BLOCK, GROUP, ROWS, SPLIT, TOKENS, STAGES,
    )  # fmt: skip
    total *= (inverse_rms(partial, columns, epsilon) * unit)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + row, mask=row < rows, other=0.0)[:, None]
    token = tl.arange(0, TOKENS)[None, :]
    inside = (row[:, None] < rows) & (token < tokens)
    tl.store(y + token * rows + row[:, None], total.to(tl.float16), mask=inside)


def norm_qkv(
    x: Tensor, squares: Tensor, weight: PackedLinear, bias: Tensor | None, y: Tensor,
    epsilon: float, unit: float, sm: int,
) -> Launch:  # fmt: skip
    """A launch that fills `y`.

    Args:
        x: float16 [tokens, hidden], the residual stream times norm weight / unit.
        squares: float32 [parts, 8], sums of squares of the stream that add up to the whole.
        bias: float32 [out] or None.
        y: float16 [tokens, out].
        unit: a power of two that the norm weight was divided by, so that x can't overflow.
    """
    tile = gemv_tile(sm, weight.out_features)
    return Launch(
        norm_qkv_kernel,
        (triton.cdiv(weight.out_features, tile.rows),),
        {
            **weight_arguments(x, weight),
            "squares": squares,
            "count": squares.shape[0],
            "bias": squares if bias is None else bias,
            "y": y,
            "rows": weight.out_features,
            "epsilon": epsilon,
            "unit": unit,
        },
        {
            **weight_constants(weight, tile.rows, tile.split),
            "HAS_BIAS": bias is not None,
            "COUNT": next_power_of_2(squares.shape[0]),
            "STAGES": tile.stages,
            "PDL": False,
        },
        tile.split,
    )


def norm_qkv_reference(
    x: Tensor, squares: Tensor, weight: PackedLinear, bias: Tensor | None, epsilon: float,
    unit: float,
) -> Tensor:  # fmt: skip
    """The same in float32."""
    return torch.nn.functional.linear(normed(x, squares, epsilon, unit), unpack(weight), bias)


def normed(x: Tensor, squares: Tensor, epsilon: float, unit: float) -> Tensor:
    """The output of RMSNorm in float32 from what the previous kernel left."""
    mean = squares.sum(0)[: x.shape[0], None] / x.shape[1]
    return x.float() * unit * torch.rsqrt(mean + epsilon)
