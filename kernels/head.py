"""Final RMSNorm, lm_head, and the best token of every program's share of the vocabulary."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vila_deploy.kernels.gemv import weight_arguments, weight_constants
from vila_deploy.kernels.launch import Launch, next_power_of_2
from vila_deploy.kernels.norm_qkv import normed
from vila_deploy.kernels.packed_dot import inverse_rms, load_squares, times_rows
from vila_deploy.kernels.packed_linear import PackedLinear, unpack
from vila_deploy.kernels.pdl import wait_with_rows
from vila_deploy.kernels.tile_config import gemv_tile


@triton.jit
def head_kernel(
    x, squares, words, scale_zero, logits, best, index, tokens, columns, rows, count, epsilon, unit,
    COUNT: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, SPLIT: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    if PDL:
        wait_with_rows(tile, words, scale_zero, columns, BITS, BLOCK, GROUP, ROWS)
    partial = load_squares(squares, count, tokens, COUNT, TOKENS)
    total = times_rows(
        x, words, scale_zero, tile, tokens, columns,
        BITS, BLOCK, GROUP, ROWS, SPLIT, TOKENS, STAGES,
    )  # fmt: skip
    total *= (inverse_rms(partial, columns, epsilon) * unit)[None, :]
    row = tile * ROWS + tl.arange(0, ROWS)[:, None]
    token = tl.arange(0, TOKENS)
    inside = (row < rows) & (token[None, :] < tokens)
    tl.store(logits + token[None, :] * rows + row, total, mask=inside)
    total = tl.where(row < rows, total, float("-inf"))
    tl.store(best + tile * TOKENS + token, tl.max(total, 0))
    tl.store(index + tile * TOKENS + token, tile * ROWS + tl.argmax(total, 0).to(tl.int32))


def head(
    x: Tensor, squares: Tensor, weight: PackedLinear, logits: Tensor, best: Tensor, index: Tensor,
    epsilon: float, unit: float, sm: int,
) -> Launch:  # fmt: skip
    """A launch that fills `logits`, `best` and `index`.

    Args:
        x, squares, epsilon, unit: as for `norm_qkv`.
        logits: float32 [tokens, vocabulary].
        best, index: float32 and int32 [parts(sm, vocabulary), 8]: the largest logit of each part of
            the vocabulary and its token, the lowest of equal ones.
    """
    tile = gemv_tile(sm, weight.out_features)
    return Launch(
        head_kernel,
        (triton.cdiv(weight.out_features, tile.rows),),
        {
            **weight_arguments(x, weight),
            "squares": squares,
            "count": squares.shape[0],
            "logits": logits,
            "best": best,
            "index": index,
            "rows": weight.out_features,
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


def head_reference(
    x: Tensor, squares: Tensor, weight: PackedLinear, epsilon: float, unit: float
) -> Tensor:
    """The logits in float32."""
    return torch.nn.functional.linear(normed(x, squares, epsilon, unit), unpack(weight))
