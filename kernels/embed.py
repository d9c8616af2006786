"""A token's row of the embedding table becomes the residual stream."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vila_deploy.kernels.launch import Launch, next_power_of_2
from vila_deploy.kernels.pdl import wait
from vila_deploy.kernels.tile_config import TOKENS


@triton.jit
def embed_kernel(
    token, table, norm, residual, out, squares, columns,
    COLUMNS: tl.constexpr, TOKENS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        wait()
    place = tl.program_id(0)
    column = tl.arange(0, COLUMNS)
    inside = column < columns
    start = tl.load(token + place).to(tl.int64) * columns
    row = tl.load(table + start + column, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(norm + column, mask=inside, other=0.0)
    tl.store(residual + place * columns + column, row, mask=inside)
    tl.store(out + place * columns + column, (row * weight).to(tl.float16), mask=inside)
    tl.store(squares + place, tl.sum(row * row, 0))


def embed(
    token: Tensor, table: Tensor, norm: Tensor, stream: Tensor, out: Tensor, squares: Tensor
) -> Launch:
    """A launch that fills `stream`, `out` and `squares`, one program a token.

    Args:
        token: int32 [tokens].
        table: float16 [vocabulary, hidden]; may lie in pinned host memory.
        norm: float32 [hidden], the first norm's weight, divided by a power of two.
        stream, out, squares: as for `add_residual`, with `squares` [1, 8].
    """
    columns = table.shape[1]
    return Launch(
        embed_kernel,
        (token.shape[0],),
        {
            "token": token, "table": table, "norm": norm, "residual": stream, "out": out,
            "squares": squares, "columns": columns,
        },
        {"COLUMNS": next_power_of_2(columns), "TOKENS": TOKENS, "PDL": False},
        4,
    )  # fmt: skip


def embed_reference(token: Tensor, table: Tensor, norm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Stream, stream times norm, and the sum of squares [tokens], in float32."""
    stream = table[token.long()].float()
    return stream, stream * norm, (stream * stream).sum(1)
