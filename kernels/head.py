"""Final RMSNorm, lm_head, and the best token of every program's share of the vocabulary."""

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
def head_kernel(
    x_ptr: tl.tensor, squares_ptr: tl.tensor, words_ptr: tl.tensor, scale_zero_ptr: tl.tensor,
    logits_ptr: tl.tensor, best_ptr: tl.tensor, index_ptr: tl.tensor, tokens: tl.tensor,
    columns: tl.tensor, rows: tl.tensor, count: tl.tensor, epsilon: tl.tensor, prescale: tl.tensor,
    next_weights: tl.tuple,
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
    squares = load_squares(squares_ptr, count, tokens, COUNT, TOKENS)
    total = packed_dot(
        x_ptr, words_ptr, scale_zero_ptr, tile, tokens, columns, next_weights,
        BITS, BLOCK, GROUP, ROWS, SPLIT, TOKENS, STAGES, EVEN_COLUMNS, EVEN_ROUNDS,
        NEXT_TILES, NEXT_LINES,
    )  # fmt: skip
    total *= (inverse_rms(squares, columns, epsilon) * prescale)[None, :]
    row = tile * ROWS + tl.arange(0, ROWS)[:, None]
    token = tl.arange(0, TOKENS)
    inside = (row < rows) & (token[None, :] < tokens)
    tl.store(logits_ptr + token[None, :] * rows + row, total, mask=inside)
    total = tl.where(row < rows, total, float("-inf"))
    tl.store(best_ptr + tile * TOKENS + token, tl.max(total, 0))
    tl.store(index_ptr + tile * TOKENS + token, tile * ROWS + tl.argmax(total, 0).to(tl.int32))


def head(
    x: Tensor, squares: Tensor, weight: PackedLinear, logits: Tensor, best: Tensor, index: Tensor,
    epsilon: float, prescale: float, capability: ComputeCapability,
) -> Launch:  # fmt: skip
    """Return a launch that fills `logits`, `best` and `index`.

    Args:
        x, squares, epsilon, prescale: as for `normed_launch`.
        logits: float32 [tokens, vocabulary].
        best, index: float32 and int32 [gemv_programs(capability, vocabulary), 8]: the largest logit
            of each program's share of the vocabulary and its token, the lowest of equal ones.
    """
    return normed_launch(
        head_kernel, x, squares, weight, epsilon, prescale,
        gemv_tile(capability, weight.out_features, weight.blocks),
        {"logits_ptr": logits, "best_ptr": best, "index_ptr": index},
    )  # fmt: skip


def head_reference(
    x: Tensor, squares: Tensor, weight: PackedLinear, epsilon: float, prescale: float
) -> Tensor:
    """Return the logits [tokens, vocabulary] in float32."""
    normed = normed_reference(x, squares, epsilon, prescale)
    return torch.nn.functional.linear(normed, unpack(weight))
