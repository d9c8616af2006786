"""RMSNorm folded into the product behind it, as `norm_qkv`, `gate_up` and `head` have it.

The kernel that wrote the residual also left x = residual · norm weight in float16 and partial sums
of squares. The norm's factor is one number a token, so it multiplies the product instead of the
input, and no program reads the residual twice.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vila_deploy.kernels.gemv import weight_arguments, weight_constants
from vila_deploy.kernels.launch import Argument, Launch, next_power_of_2
from vila_deploy.kernels.next_weights import NO_NEXT, NO_NEXT_CONSTANTS
from vila_deploy.kernels.packed_linear import PackedLinear
from vila_deploy.kernels.tile_config import GemvTile


@triton.jit
def load_squares(
    squares_ptr: tl.tensor, count: tl.tensor, tokens: tl.tensor, COUNT: tl.constexpr,
    TOKENS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return partial sums of squares [COUNT, TOKENS], 0 from row `count` on."""
    index, token = tl.arange(0, COUNT)[:, None], tl.arange(0, TOKENS)[None, :]
    inside = (index < count) & (token < tokens)
    return tl.load(squares_ptr + index * TOKENS + token, mask=inside, other=0.0)


@triton.jit
def inverse_rms(squares: tl.tensor, columns: tl.tensor, epsilon: tl.tensor) -> tl.tensor:
    """Return 1 / √(mean square + epsilon) [TOKENS] of what `load_squares` gives."""
    return tl.rsqrt(tl.sum(squares, 0) / columns + epsilon)


def normed_launch(
    kernel: Any, x: Tensor, squares: Tensor, weight: PackedLinear, epsilon: float, prescale: float,
    tile: GemvTile, args: dict[str, Argument], constants: dict[str, Any] | None = None,
) -> Launch:  # fmt: skip
    """Return the launch of a kernel that multiplies normed activations by `weight`.

    Args:
        x: float16 [tokens, hidden], residual times norm weight / prescale.
        squares: float32 [count, 8], sums of squares of the residual that add up to the whole.
        prescale: the power of two that the norm weight was divided by, so that x can't overflow.
        args, constants: what this kernel takes besides.
    """
    return Launch(
        kernel,
        (triton.cdiv(weight.out_features, tile.rows),),
        {
            **weight_arguments(x, weight),
            "squares_ptr": squares,
            "count": squares.shape[0],
            "epsilon": epsilon,
            "prescale": prescale,
            **NO_NEXT,
            **args,
        },
        {
            **weight_constants(weight, tile.rows, tile.split),
            "COUNT": next_power_of_2(squares.shape[0]),
            "STAGES": tile.stages,
            **NO_NEXT_CONSTANTS,
            "PDL": False,
            **(constants or {}),
        },
        tile.split,
    )


def normed_reference(x: Tensor, squares: Tensor, epsilon: float, prescale: float) -> Tensor:
    """Return the output of RMSNorm [tokens, hidden] in float32; arguments as `normed_launch`."""
    mean = squares.sum(0)[: x.shape[0], None] / x.shape[1]
    return x.float() * prescale * torch.rsqrt(mean + epsilon)
