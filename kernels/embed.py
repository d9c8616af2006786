"""A token's row of the embedding table becomes the residual."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vila_deploy.kernels.launch import Launch, next_power_of_2
from vila_deploy.kernels.pdl import wait
from vila_deploy.kernels.tile_config import TOKENS


@triton.jit
def embed_kernel(
    token_ptr: tl.tensor, table_ptr: tl.tensor, norm_ptr: tl.tensor, residual_ptr: tl.tensor,
    out_ptr: tl.tensor, squares_ptr: tl.tensor, columns: tl.tensor,
    rows: tl.tensor,
    COLUMNS: tl.constexpr, TOKENS: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    if PDL:
        wait()
    token = tl.program_id(0)
    column = tl.arange(0, COLUMNS)
    inside = column < columns
    # A token that the vocabulary doesn't have, as `argmax` makes of NaN, reads nothing beyond it.
    index = tl.minimum(tl.maximum(tl.load(token_ptr + token), 0), rows - 1)
    start = index.to(tl.int64) * columns
    row = tl.load(table_ptr + start + column, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(norm_ptr + column, mask=inside, other=0.0)
    tl.store(residual_ptr + token * columns + column, row, mask=inside)
    tl.store(out_ptr + token * columns + column, (row * weight).to(tl.float16), mask=inside)
    tl.store(squares_ptr + token, tl.sum(row * row, 0))


def embed(
    token: Tensor, table: Tensor, norm: Tensor, residual: Tensor, out: Tensor, squares: Tensor
) -> Launch:
    """Return a launch that fills `residual`, `out` and `squares`, one program a token.

    Args:
        token: int32 [tokens].
        table: float16 [vocabulary, hidden]; may lie in pinned host memory.
        norm: float32 [hidden], the first norm's weight, divided by a power of two.
        residual: float32 [tokens, hidden].
        out: float16 [tokens, hidden], the residual times `norm`.
        squares: float32 [1, 8], the residual's sum of squares of each token.
    """
    rows, columns = table.shape
    return Launch(
        embed_kernel,
        (token.shape[0],),
        {
            "token_ptr": token, "table_ptr": table, "norm_ptr": norm, "residual_ptr": residual,
            "out_ptr": out, "squares_ptr": squares, "columns": columns,
            "rows": rows,
        },
        {"COLUMNS": next_power_of_2(columns), "TOKENS": TOKENS, "PDL": False},
        4,
    )  # fmt: skip


def embed_reference(token: Tensor, table: Tensor, norm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the residual, that times `norm`, and its sum of squares [tokens], in float32."""
    residual = table[token.long()].float()
    return residual, residual * norm, (residual * residual).sum(1)
