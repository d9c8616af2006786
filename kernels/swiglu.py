"""silu(gate) · up of a prompt's tokens, divided by a power of two where it exceeds float16.

A few activations of trained models do ("massive activations", arXiv:2402.17762).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vila_deploy.kernels.capability import INTERPRETER, ComputeCapability
from vila_deploy.kernels.launch import Launch, next_power_of_2
from vila_deploy.kernels.packed_linear import ROWS

INVERSE_LARGEST = tl.constexpr(1 / 32752.0)  # of half of the largest float16
BLOCK = 1024  # channels at a time
INTERPRETED_TOKENS = 64  # of a program, where a program costs more than its tokens


@triton.jit(do_not_specialize=["tokens"])
def swiglu_kernel(
    pairs_ptr: tl.tensor, out_ptr: tl.tensor, scale_ptr: tl.tensor, tokens: tl.tensor,
    width: tl.tensor, inner: tl.tensor,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
    there = token < tokens
    pairs_ptr += token.to(tl.int64) * width
    out_ptr += token.to(tl.int64) * inner
    largest = tl.zeros((TOKENS, BLOCK), tl.float32)
    for first in range(0, inner, BLOCK):
        channel = first + tl.arange(0, BLOCK)[None, :]
        value = gated(pairs_ptr, channel, there & (channel < inner), ROWS)
        largest = tl.maximum(largest, tl.abs(value))
    exponent = ceil_log2(tl.max(largest, 1, keep_dims=True) * INVERSE_LARGEST)
    scale, inverse = power_of_2(exponent), power_of_2(-exponent)
    tl.store(scale_ptr + token, scale, mask=there)
    for first in range(0, inner, BLOCK):
        channel = first + tl.arange(0, BLOCK)[None, :]
        inside = there & (channel < inner)
        value = gated(pairs_ptr, channel, inside, ROWS)
        tl.store(out_ptr + channel, (value * inverse).to(tl.float16), mask=inside)


@triton.jit
def ceil_log2(ratio: tl.tensor) -> tl.tensor:
    """Return ⌈log₂⌉ of float32 numbers, exactly, from 0 up to the largest that has an inverse."""
    MANTISSA: tl.constexpr = 23
    BIAS: tl.constexpr = 127
    bits = ratio.to(tl.int32, bitcast=True)
    exponent = (bits >> MANTISSA) - BIAS + ((bits & 0x7FFFFF) != 0).to(tl.int32)
    return tl.minimum(tl.maximum(exponent, 0), BIAS - 1)


@triton.jit
def power_of_2(exponent: tl.tensor) -> tl.tensor:
    """Return float32 2 ** `exponent`, of int32 numbers from -126 to 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def gated(
    pairs_ptr: tl.tensor, channel: tl.tensor, inside: tl.tensor, ROWS: tl.constexpr
) -> tl.tensor:
    """Return silu(gate) · up of channels; of both ROWS channels lie in turn."""
    at = channel // ROWS * (2 * ROWS) + channel % ROWS
    gate = tl.load(pairs_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(pairs_ptr + at + ROWS, mask=inside, other=0.0).to(tl.float32)
    return gate / (1.0 + tl.exp(-gate)) * up


def swiglu(pairs: Tensor, out: Tensor, scale: Tensor, capability: ComputeCapability) -> Launch:
    """Return a launch that fills `out` and `scale`.

    Args:
        pairs: float16 [tokens, at least 2 · inner], products with weights of
            `packed_linear.interleave`.
        out: float16 [tokens, inner], silu(gate) · up / scale.
        scale: float32 [tokens], powers of two of at least 1.
    """
    tokens, inner = out.shape
    assert pairs.shape[1] >= 2 * inner
    interpreted = capability == INTERPRETER
    block = INTERPRETED_TOKENS if interpreted else 1
    return Launch(
        swiglu_kernel,
        (triton.cdiv(tokens, block),),
        {
            "pairs_ptr": pairs, "out_ptr": out, "scale_ptr": scale, "tokens": tokens,
            "width": pairs.shape[1], "inner": inner,
        },
        {
            "ROWS": ROWS, "TOKENS": block,
            "BLOCK": next_power_of_2(inner) if interpreted else BLOCK,
        },
        4,
    )  # fmt: skip


def swiglu_reference(pairs: Tensor, inner: int) -> Tensor:
    """Return silu(gate) · up, float32 [tokens, inner]."""
    gate, up = pairs.float().unflatten(1, (-1, 2, ROWS)).unbind(2)
    return (torch.nn.functional.silu(gate) * up).flatten(1)[:, :inner]
