"""y = x Wᵀ + bias for one to eight tokens; W in 4, 8 or 16 bits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vila_deploy.kernels.launch import Launch
from vila_deploy.kernels.packed_dot import times_rows
from vila_deploy.kernels.packed_linear import PackedLinear, unpack
from vila_deploy.kernels.tile_config import TOKENS, gemv_tile


@triton.jit
def gemv_kernel(
    x, words, scale_zero, bias, y, tokens, columns, rows,
    HAS_BIAS: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, SPLIT: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    total = times_rows(
        x, words, scale_zero, tile, tokens, columns,
        BITS, BLOCK, GROUP, ROWS, SPLIT, TOKENS, STAGES,
    )  # fmt: skip
    row = tile * ROWS + tl.arange(0, ROWS)
    if HAS_BIAS:
        total += tl.load(bias + row, mask=row < rows, other=0.0)[:, None]
    token = tl.arange(0, TOKENS)[None, :]
    inside = (row[:, None] < rows) & (token < tokens)
    tl.store(y + token * rows + row[:, None], total.to(tl.float16), mask=inside)


def gemv(x: Tensor, weight: PackedLinear, bias: Tensor | None, y: Tensor, sm: int) -> Launch:
    """A launch that fills `y`.

    Args:
        x: float16 [tokens, in], at most 8 tokens.
        bias: float32 [out] or None.
        y: float16 [tokens, out].
        sm: compute capability · 10, for the tile.
    """
    tile = gemv_tile(sm, weight.out_features)
    return Launch(
        gemv_kernel,
        (triton.cdiv(weight.out_features, tile.rows),),
        {
            **weight_arguments(x, weight),
            "bias": weight.scale_zero if bias is None else bias,
            "y": y,
            "rows": weight.out_features,
        },
        {"HAS_BIAS": bias is not None, **weight_constants(weight, tile.rows, tile.split)}
        | {"STAGES": tile.stages},
        tile.split,
    )


def gemv_reference(x: Tensor, weight: PackedLinear, bias: Tensor | None) -> Tensor:
    """The same in float32."""
    return torch.nn.functional.linear(x.float(), unpack(weight), bias)


def weight_arguments(x: Tensor, weight: PackedLinear) -> dict[str, Tensor | int]:
    """What every kernel over `times_rows` takes for its activations and its weight."""
    assert x.shape[1] == weight.in_features
    assert x.shape[0] <= TOKENS
    return {
        "x": x,
        "words": weight.words,
        "scale_zero": weight.scale_zero,
        "tokens": x.shape[0],
        "columns": weight.in_features,
    }


def weight_constants(weight: PackedLinear, rows: int, split: int) -> dict[str, int | bool]:
    """The constants of `times_rows` but for STAGES."""
    return {
        "BITS": weight.bits,
        "BLOCK": weight.block,
        "GROUP": weight.group,
        "ROWS": rows,
        "SPLIT": split,
        "TOKENS": TOKENS,
    }
