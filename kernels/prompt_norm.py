"""A prompt's tokens: what a product gives is added to the residual, and RMSNorm of the sum."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vila_deploy.kernels.capability import INTERPRETER, ComputeCapability
from vila_deploy.kernels.launch import Launch, next_power_of_2

INTERPRETED_TOKENS = 64  # of a program, where a program costs more than its tokens


@triton.jit(do_not_specialize=["tokens"])
def prompt_norm_kernel(
    residual_ptr: tl.tensor, added_ptr: tl.tensor, scale_ptr: tl.tensor, norm_ptr: tl.tensor,
    out_ptr: tl.tensor, tokens: tl.tensor, columns: tl.tensor, epsilon: tl.tensor,
    prescale: tl.tensor,
    ADD: tl.constexpr, SCALED: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (token < tokens) & (column < columns)
    at = token.to(tl.int64) * columns + column
    value = tl.load(residual_ptr + at, mask=inside, other=0.0)
    if ADD:
        added = tl.load(added_ptr + at, mask=inside, other=0.0)
        if SCALED:
            added *= tl.load(scale_ptr + token, mask=token < tokens, other=0.0)
        value += added
        tl.store(residual_ptr + at, value, mask=inside)
    factor = tl.rsqrt(tl.sum(value * value, 1, keep_dims=True) / columns + epsilon)
    weight = tl.load(norm_ptr + column, mask=column < columns, other=0.0) * prescale
    tl.store(out_ptr + at, (value * factor * weight).to(tl.float16), mask=inside)


def prompt_norm(
    residual: Tensor, added: Tensor | None, scale: Tensor | None, norm: Tensor, out: Tensor,
    epsilon: float, prescale: float, capability: ComputeCapability,
) -> Launch:  # fmt: skip
    """Return a launch that adds `added` · `scale` to `residual` and fills `out`.

    Args:
        residual: float32 [tokens, hidden].
        added: float32 [tokens, hidden], or None to add nothing.
        scale: float32 [tokens] that multiplies the rows of `added`, or None.
        norm: float32 [hidden], the norm's weight divided by `prescale`.
        out: float16 [tokens, hidden], RMSNorm of the sum, rounded once.
    """
    tokens, columns = residual.shape
    block = INTERPRETED_TOKENS if capability == INTERPRETER else 1
    width = next_power_of_2(columns)
    return Launch(
        prompt_norm_kernel,
        (triton.cdiv(tokens, block),),
        {
            "residual_ptr": residual, "added_ptr": residual if added is None else added,
            "scale_ptr": residual if scale is None else scale, "norm_ptr": norm, "out_ptr": out,
            "tokens": tokens, "columns": columns, "epsilon": epsilon, "prescale": prescale,
        },
        {
            "ADD": added is not None, "SCALED": scale is not None, "TOKENS": block,
            "COLUMNS": width,
        },
        # No two warps have the same elements, which one of them would write before the other reads.
        max(1, min(8, width // 32)),
    )  # fmt: skip


def prompt_norm_reference(
    residual: Tensor, added: Tensor | None, scale: Tensor | None, norm: Tensor, epsilon: float,
    prescale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the new residual and its RMSNorm [tokens, hidden], in float32."""
    if added is not None:
        residual = residual + (added if scale is None else added * scale[:, None])
    factor = torch.rsqrt(residual.square().mean(1, keepdim=True) + epsilon)
    return residual, residual * factor * (norm * prescale)
