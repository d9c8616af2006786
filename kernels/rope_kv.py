"""Rotary embedding of q and k, and k and v into their positions of the cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vila_deploy.kernels.kv_int8 import int8_scale, quantize_int8
from vila_deploy.kernels.launch import Launch, next_power_of_2
from vila_deploy.kernels.pdl import wait
from vila_deploy.kernels.tile_config import TOKENS

BLOCK_TOKENS = 32  # of a prompt, a program
Scales = tuple[Tensor, Tensor]


# Prompts of every length share one compiled kernel.
@triton.jit(do_not_specialize=["tokens"])
def rope_kv_kernel(
    qkv_ptr: tl.tensor, cos_ptr: tl.tensor, sin_ptr: tl.tensor, position_ptr: tl.tensor,
    q_ptr: tl.tensor, keys_ptr: tl.tensor, values_ptr: tl.tensor, key_scales_ptr: tl.tensor,
    value_scales_ptr: tl.tensor, tokens: tl.tensor, heads: tl.tensor, kv_heads: tl.tensor,
    cache_len: tl.tensor,
    INT8: tl.constexpr, TOKENS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr, SPAN: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    if PDL:
        wait()
    head = tl.program_id(1)
    cache_row = 0
    if SPAN:
        tokens = tl.minimum(tokens, tl.load(position_ptr + 1) - tl.load(position_ptr))
        cache_row = tl.load(position_ptr + 2) * kv_heads
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None].to(tl.int64)
    position = tl.load(position_ptr) + token
    lane = tl.arange(0, HALF_BLOCK)[None, :]
    inside = (lane < HALF) & (token < tokens)
    source_ptr = qkv_ptr + (token * (heads + 2 * kv_heads) + head) * DIM + lane
    low = tl.load(source_ptr, mask=inside, other=0.0)
    high = tl.load(source_ptr + HALF, mask=inside, other=0.0)
    if head < heads + kv_heads:
        c = tl.load(cos_ptr + position * HALF + lane, mask=inside, other=0.0)
        s = tl.load(sin_ptr + position * HALF + lane, mask=inside, other=0.0)
        first, second = low.to(tl.float32), high.to(tl.float32)
        low = (first * c - second * s).to(tl.float16)
        high = (second * c + first * s).to(tl.float16)
    if head < heads:
        target_ptr = q_ptr + (token * heads + head) * DIM + lane
        tl.store(target_ptr, low, mask=inside)
        tl.store(target_ptr + HALF, high, mask=inside)
    elif head < heads + kv_heads:
        index = (cache_row + head - heads) * cache_len + position
        store_halves(keys_ptr, key_scales_ptr, index, lane, low, high, inside, INT8, DIM, HALF)
    else:
        index = (cache_row + head - heads - kv_heads) * cache_len + position
        store_halves(values_ptr, value_scales_ptr, index, lane, low, high, inside, INT8, DIM, HALF)


@triton.jit
def store_halves(
    cache_ptr: tl.tensor, scales_ptr: tl.tensor, index: tl.tensor, lane: tl.tensor, low: tl.tensor,
    high: tl.tensor, inside: tl.tensor,
    INT8: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr,
) -> None:  # fmt: skip
    """Write both halves of vectors at `index` [TOKENS, 1] of the cache, with scales if INT8."""
    target_ptr = cache_ptr + index * DIM + lane
    if INT8:
        max_abs = tl.maximum(tl.abs(low.to(tl.float32)), tl.abs(high.to(tl.float32)))
        scale = int8_scale(tl.max(max_abs, 1, keep_dims=True))
        tl.store(target_ptr, quantize_int8(low, scale), mask=inside)
        tl.store(target_ptr + HALF, quantize_int8(high, scale), mask=inside)
        tl.store(scales_ptr + index + lane * 0, scale, mask=inside & (lane == 0))
    else:
        tl.store(target_ptr, low, mask=inside)
        tl.store(target_ptr + HALF, high, mask=inside)


def rope_kv(
    qkv: Tensor, cos: Tensor, sin: Tensor, position: Tensor, q: Tensor, keys: Tensor,
    values: Tensor, scales: Scales | None = None,
) -> Launch:  # fmt: skip
    """Return a launch that fills `q`, and `keys` and `values` from `position` on.

    Args:
        qkv: float16 [tokens, (heads + 2 · kv_heads) · dim].
        cos, sin: float32 [positions, dim / 2].
        position: int32 [1], of the first token; position + tokens must not exceed positions. Or
            int32 [3], a span: the slot comes last, and what lies from its second number on is left.
        q: float16 [tokens, heads, dim].
        keys, values: float16 [kv_heads, positions, dim], or int8 with `scales`; of a span
            [slots, kv_heads, positions, dim].
        scales: of keys and of values, float16 [kv_heads, positions], filled too.
    """
    tokens, heads, dim = q.shape
    *_, kv_heads, cache_len, _ = keys.shape
    assert (keys.dtype == torch.int8) == (scales is not None)
    key_scales, value_scales = scales or (q, q)
    block = 1 if tokens <= TOKENS else BLOCK_TOKENS
    return Launch(
        rope_kv_kernel,
        (triton.cdiv(tokens, block), heads + 2 * kv_heads),
        {
            "qkv_ptr": qkv, "cos_ptr": cos, "sin_ptr": sin, "position_ptr": position, "q_ptr": q,
            "keys_ptr": keys, "values_ptr": values, "key_scales_ptr": key_scales,
            "value_scales_ptr": value_scales, "tokens": tokens, "heads": heads,
            "kv_heads": kv_heads, "cache_len": cache_len,
        },
        {
            "INT8": scales is not None, "TOKENS": block, "DIM": dim, "HALF": dim // 2,
            "HALF_BLOCK": next_power_of_2(dim // 2), "SPAN": len(position) > 1, "PDL": False,
        },
        1,
    )  # fmt: skip


def rope_kv_reference(
    qkv: Tensor, cos: Tensor, sin: Tensor, position: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q [tokens, heads, dim], keys and values [kv_heads, tokens, dim], in float32."""
    vectors = qkv.float().unflatten(1, (heads + 2 * kv_heads, -1))
    positions = int(position) + torch.arange(len(qkv), device=qkv.device)
    c, s = cos[positions][:, None], sin[positions][:, None]
    low, high = vectors.chunk(2, 2)
    rotated = torch.cat([low * c - high * s, high * c + low * s], 2)
    q, keys, _ = rotated.split([heads, kv_heads, kv_heads], 1)
    return q, keys.transpose(0, 1), vectors[:, heads + kv_heads :].transpose(0, 1)
