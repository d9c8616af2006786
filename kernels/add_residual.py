"""stream += x Wᵀ: o_proj and down_proj, each with the residual and half of the next norm.

Besides the stream it writes what the next kernel needs of it: the stream times that norm's weight
in float16, and a sum of squares for each program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vila_deploy.kernels.gemv import weight_arguments, weight_constants
from vila_deploy.kernels.launch import Launch
from vila_deploy.kernels.packed_dot import times_rows
from vila_deploy.kernels.packed_linear import PackedLinear, unpack
from vila_deploy.kernels.pdl import wait_with_rows
from vila_deploy.kernels.tile_config import gemv_tile


@triton.jit
def add_residual_kernel(
    x, words, scale_zero, norm, residual, out, squares, tokens, columns, rows,
    BITS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    SPLIT: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    if PDL:
        wait_with_rows(tile, words, scale_zero, columns, BITS, BLOCK, GROUP, ROWS)
    add_residual_rows(
        tile, x, words, scale_zero, norm, residual, out, squares, tokens, columns, rows,
        BITS, BLOCK, GROUP, ROWS, SPLIT, TOKENS, STAGES,
    )  # fmt: skip


@triton.jit
def add_residual_rows(
    tile, x, words, scale_zero, norm, residual, out, squares, tokens, columns, rows,
    BITS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    SPLIT: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Rows tile · ROWS and on of the stream, and their sum of squares."""
    row = tile * ROWS + tl.arange(0, ROWS)[:, None]
    token = tl.arange(0, TOKENS)[None, :]
    inside = (row < rows) & (token < tokens)
    place = token * rows + row
    before = tl.load(residual + place, mask=inside, other=0.0)
    weight = tl.load(norm + row, mask=row < rows, other=0.0)
    total = before + times_rows(
        x, words, scale_zero, tile, tokens, columns,
        BITS, BLOCK, GROUP, ROWS, SPLIT, TOKENS, STAGES,
    )  # fmt: skip
    tl.store(residual + place, total, mask=inside)
    tl.store(out + place, (total * weight).to(tl.float16), mask=inside)
    parts = tl.sum(tl.where(inside, total * total, 0.0), 0)
    tl.store(squares + tile * TOKENS + tl.arange(0, TOKENS), parts)


def add_residual(
    x: Tensor, weight: PackedLinear, norm: Tensor, stream: Tensor, out: Tensor, squares: Tensor,
    sm: int,
) -> Launch:  # fmt: skip
    """A launch that adds to `stream` and fills `out` and `squares`.

    Args:
        x: float16 [tokens, in].
        norm: float32 [out], the next norm's weight, divided by a power of two.
        stream: float32 [tokens, out].
        out: float16 [tokens, out], the new stream times `norm`.
        squares: float32 [parts(sm, out), 8].
    """
    tile = gemv_tile(sm, weight.out_features)
    programs = parts(sm, weight.out_features)
    assert squares.shape[0] == programs
    return Launch(
        add_residual_kernel,
        (programs,),
        {
            **weight_arguments(x, weight),
            "norm": norm,
            "residual": stream,
            "out": out,
            "squares": squares,
            "rows": weight.out_features,
        },
        {
            **weight_constants(weight, tile.rows, tile.split),
            "STAGES": tile.stages,
            "PDL": False,
        },
        tile.split,
    )


def parts(sm: int, out_features: int) -> int:
    """Rows of `squares`: one for each program."""
    return triton.cdiv(out_features, gemv_tile(sm, out_features).rows)


def add_residual_reference(
    x: Tensor, weight: PackedLinear, norm: Tensor, stream: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """New stream, stream times norm, and the whole sum of squares [tokens], in float32."""
    new = stream + torch.nn.functional.linear(x.float(), unpack(weight))
    return new, new * norm, (new * new).sum(1)
