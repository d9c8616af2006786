"""Rotary embedding of q and k, and k and v into their place in the cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vila_deploy.kernels.kv_int8 import levels_of, scale_of
from vila_deploy.kernels.launch import Launch, next_power_of_2
from vila_deploy.kernels.pdl import wait
from vila_deploy.kernels.tile_config import TOKENS

BLOCK_TOKENS = 32  # of a prompt, a program
Scales = tuple[Tensor, Tensor]


@triton.jit
def rope_kv_kernel(
    qkv, cos, sin, position, q, keys, values, key_scales, value_scales,
    tokens, heads, kv_heads, slots,
    INT8: tl.constexpr, TOKENS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        wait()
    head = tl.program_id(1)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None].to(tl.int64)
    where = tl.load(position) + token
    lane = tl.arange(0, HALF_BLOCK)[None, :]
    inside = (lane < HALF) & (token < tokens)
    source = qkv + (token * (heads + 2 * kv_heads) + head) * DIM + lane
    low = tl.load(source, mask=inside, other=0.0)
    high = tl.load(source + HALF, mask=inside, other=0.0)
    if head < heads + kv_heads:
        c = tl.load(cos + where * HALF + lane, mask=inside, other=0.0)
        s = tl.load(sin + where * HALF + lane, mask=inside, other=0.0)
        first, second = low.to(tl.float32), high.to(tl.float32)
        low = (first * c - second * s).to(tl.float16)
        high = (second * c + first * s).to(tl.float16)
    if head < heads:
        target = q + (token * heads + head) * DIM + lane
        tl.store(target, low, mask=inside)
        tl.store(target + HALF, high, mask=inside)
    elif head < heads + kv_heads:
        slot = (head - heads) * slots + where
        keep(keys, key_scales, slot, lane, low, high, inside, INT8, DIM, HALF)
    else:
        slot = (head - heads - kv_heads) * slots + where
        keep(values, value_scales, slot, lane, low, high, inside, INT8, DIM, HALF)


@triton.jit
def keep(
    cache, scales, slot, lane, low, high, inside,
    INT8: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Both halves of vectors into their slots [TOKENS, 1], in 8 bits with a scale if INT8."""
    target = cache + slot * DIM + lane
    if INT8:
        largest = tl.maximum(tl.abs(low.to(tl.float32)), tl.abs(high.to(tl.float32)))
        scale = scale_of(tl.max(largest, 1, keep_dims=True))
        tl.store(target, levels_of(low, scale), mask=inside)
        tl.store(target + HALF, levels_of(high, scale), mask=inside)
        tl.store(scales + slot + lane * 0, scale, mask=inside & (lane == 0))
    else:
        tl.store(target, low, mask=inside)
        tl.store(target + HALF, high, mask=inside)


def rope_kv(
    qkv: Tensor, cos: Tensor, sin: Tensor, position: Tensor, q: Tensor, keys: Tensor,
    values: Tensor, scales: Scales | None = None,
) -> Launch:  # fmt: skip
    """A launch that fills `q` and the slots of `keys` and `values` from `position` on.

    Args:
        qkv: float16 [tokens, (heads + 2 · kv_heads) · dim].
        cos, sin: float32 [slots, dim / 2].
        position: int32 [1], of the first token; positions + tokens must not exceed slots.
        q: float16 [tokens, heads, dim].
        keys, values: float16 [kv_heads, slots, dim], or int8 with `scales`.
        scales: of keys and of values, float16 [kv_heads, slots], filled too.
    """
    tokens, heads, dim = q.shape
    kv_heads, slots, _ = keys.shape
    assert (keys.dtype == torch.int8) == (scales is not None)
    key_scales, value_scales = scales or (q, q)
    block = 1 if tokens <= TOKENS else BLOCK_TOKENS
    return Launch(
        rope_kv_kernel,
        (triton.cdiv(tokens, block), heads + 2 * kv_heads),
        {
            "qkv": qkv, "cos": cos, "sin": sin, "position": position, "q": q, "keys": keys,
            "values": values, "key_scales": key_scales, "value_scales": value_scales,
            "tokens": tokens, "heads": heads, "kv_heads": kv_heads,
            "slots": slots,
        },
        {
            "INT8": scales is not None, "TOKENS": block, "DIM": dim, "HALF": dim // 2,
            "HALF_BLOCK": next_power_of_2(dim // 2), "PDL": False,
        },
        1,
    )  # fmt: skip


def rope_kv_reference(
    qkv: Tensor, cos: Tensor, sin: Tensor, position: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q [tokens, heads, dim], keys and values [kv_heads, tokens, dim], in float32."""
    parts = qkv.float().unflatten(1, (heads + 2 * kv_heads, -1))
    where = int(position) + torch.arange(len(qkv), device=qkv.device)
    c, s = cos[where][:, None], sin[where][:, None]
    low, high = parts.chunk(2, 2)
    turned = torch.cat([low * c - high * s, high * c + low * s], 2)
    q, keys, _ = turned.split([heads, kv_heads, kv_heads], 1)
    return q, keys.transpose(0, 1), parts[:, heads + kv_heads :].transpose(0, 1)
