"""y = x Wᵀ + bias for one to eight tokens; W in 4, 8 or 16 bits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vila_deploy.kernels.capability import ComputeCapability
from vila_deploy.kernels.launch import Argument, Launch
from vila_deploy.kernels.packed_dot import packed_dot
from vila_deploy.kernels.packed_linear import PackedLinear, unpack
from vila_deploy.kernels.tile_config import TOKENS, gemv_tile


@triton.jit
def gemv_kernel(
    x_ptr: tl.tensor, words_ptr: tl.tensor, scale_zero_ptr: tl.tensor, bias_ptr: tl.tensor,
    y_ptr: tl.tensor, tokens: tl.tensor, columns: tl.tensor, rows: tl.tensor,
    HAS_BIAS: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, SPLIT: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr, EVEN_ROUNDS: tl.constexpr,
) -> None:  # fmt: skip
    tile = tl.program_id(0)
    total = packed_dot(
        x_ptr, words_ptr, scale_zero_ptr, tile, tokens, columns, (0,),
        BITS, BLOCK, GROUP, ROWS, SPLIT, TOKENS, STAGES, EVEN_COLUMNS, EVEN_ROUNDS, 0, 0,
    )  # fmt: skip
    row = tile * ROWS + tl.arange(0, ROWS)
    if HAS_BIAS:
        total += tl.load(bias_ptr + row, mask=row < rows, other=0.0)[:, None]
    token = tl.arange(0, TOKENS)[None, :]
    inside = (row[:, None] < rows) & (token < tokens)
    tl.store(y_ptr + token * rows + row[:, None], total.to(y_ptr.dtype.element_ty), mask=inside)


def gemv(
    x: Tensor, weight: PackedLinear, bias: Tensor | None, y: Tensor, capability: ComputeCapability
) -> Launch:
    """Return a launch that fills `y`.

    Args:
        x: float16 [tokens, in], at most 8 tokens.
        bias: float32 [out] or None.
        y: float16 or float32 [tokens, out].
        capability: the GPU's, for the tile.
    """
    tile = gemv_tile(capability, weight.out_features, weight.blocks)
    return Launch(
        gemv_kernel,
        (triton.cdiv(weight.out_features, tile.rows),),
        {
            **weight_arguments(x, weight),
            "bias_ptr": weight.scale_zero if bias is None else bias,
            "y_ptr": y,
        },
        {"HAS_BIAS": bias is not None, **weight_constants(weight, tile.rows, tile.split)}
        | {"STAGES": tile.stages},
        tile.split,
    )


def gemv_reference(x: Tensor, weight: PackedLinear, bias: Tensor | None) -> Tensor:
    """Return x Wᵀ + bias [tokens, out] in float32."""
    return torch.nn.functional.linear(x.float(), unpack(weight), bias)


def weight_arguments(x: Tensor, weight: PackedLinear) -> dict[str, Argument]:
    """Return the arguments for activations and weight of a kernel over `packed_dot`.

    Args:
        x: float16 [tokens, in], at most 8 tokens.
    """
    assert x.shape[1] == weight.in_features
    assert x.shape[0] <= TOKENS
    return {
        "x_ptr": x,
        "words_ptr": weight.words,
        "scale_zero_ptr": weight.scale_zero,
        "tokens": x.shape[0],
        "columns": weight.in_features,
        "rows": weight.out_features,
    }


def weight_constants(weight: PackedLinear, rows: int, split: int) -> dict[str, int | bool]:
    """Return the constants of `packed_dot`, STAGES excepted."""
    return {
        "BITS": weight.bits,
        "BLOCK": weight.block,
        "GROUP": weight.group,
        "ROWS": rows,
        "SPLIT": split,
        "TOKENS": TOKENS,
        "EVEN_COLUMNS": weight.in_features % weight.block == 0,
        "EVEN_ROUNDS": triton.cdiv(weight.in_features, weight.block) % split == 0,
    }
