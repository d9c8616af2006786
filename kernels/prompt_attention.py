"""Causal attention of a prompt's tokens over the cache of their slot, which holds them already.

A program takes the tokens of a block and one query head, and goes through the keys from the
sequence's first position on, so a token's bits depend neither on how the prompt was cut nor on
tokens behind it. Where the prompt lies is read from memory: one CUDA graph serves every position.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vila_deploy.kernels.cached_vectors import load_vectors
from vila_deploy.kernels.capability import INTERPRETER, ComputeCapability
from vila_deploy.kernels.launch import Launch, next_power_of_2
from vila_deploy.kernels.rope_kv import Scales
from vila_deploy.kernels.tile_config import attention_block

QUERIES = 64  # tokens of a program
WIDE_DIM = 128  # up to which shared memory has room for a second stage of loads
LOG2_E = 1.4426950408889634


# Prompts of every length share one compiled kernel.
@triton.jit(do_not_specialize=["tokens"])
def prompt_attention_kernel(
    q_ptr: tl.tensor, keys_ptr: tl.tensor, values_ptr: tl.tensor, key_scales_ptr: tl.tensor,
    value_scales_ptr: tl.tensor, span_ptr: tl.tensor, out_ptr: tl.tensor, tokens: tl.tensor,
    heads: tl.tensor, kv_heads: tl.tensor, cache_len: tl.tensor, scale: tl.tensor,
    INT8: tl.constexpr, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, QUERIES: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
) -> None:  # fmt: skip
    start, slot = tl.load(span_ptr), tl.load(span_ptr + 2)
    tokens = tl.minimum(tokens, tl.load(span_ptr + 1) - start)
    first, head = tl.program_id(0) * QUERIES, tl.program_id(1)
    if first >= tokens:
        return
    token, dim = first + tl.arange(0, QUERIES), tl.arange(0, DIM_BLOCK)
    in_dim, offset = dim < DIM, tl.arange(0, BLOCK)
    inside = (token < tokens)[:, None] & in_dim[None, :]
    at_q = (token * heads + head)[:, None].to(tl.int64) * DIM + dim[None, :]
    q = tl.load(q_ptr + at_q, mask=inside, other=0.0)
    cache_row = (slot * kv_heads + head // (heads // kv_heads)).to(tl.int64) * cache_len
    keys_ptr += cache_row * DIM
    values_ptr += cache_row * DIM
    key_scales_ptr += cache_row
    value_scales_ptr += cache_row
    end = start + tl.minimum(first + QUERIES, tokens)
    top = tl.full((QUERIES,), -1e30, tl.float32)
    mass, total = tl.zeros((QUERIES,), tl.float32), tl.zeros((QUERIES, DIM_BLOCK), tl.float32)
    for begin in tl.range(0, end, BLOCK, num_stages=STAGES):
        at = begin + offset
        k = load_vectors(
            keys_ptr + at[None, :] * DIM + dim[:, None], key_scales_ptr + at[None, :],
            at[None, :] < end, in_dim[:, None], INT8,
        )  # fmt: skip
        v = load_vectors(
            values_ptr + at[:, None] * DIM + dim[None, :], value_scales_ptr + at[:, None],
            at[:, None] < end, in_dim[None, :], INT8,
        )  # fmt: skip
        seen = at[None, :] <= (start + token)[:, None]
        scores = tl.where(seen, tl.dot(q, k) * scale, -1e30)
        new_top = tl.maximum(top, tl.max(scores, 1))
        shares = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        mass = mass * shrink + tl.sum(shares, 1)
        total = tl.dot(shares.to(tl.float16), v, total * shrink[:, None])
        top = new_top
    tl.store(out_ptr + at_q, (total / mass[:, None]).to(tl.float16), mask=inside)


def prompt_attention(
    q: Tensor, keys: Tensor, values: Tensor, span: Tensor, out: Tensor,
    capability: ComputeCapability, scales: Scales | None = None,
) -> Launch:  # fmt: skip
    """Return a launch that fills the rows of `out` that `span` has tokens for.

    They are what `attention_reference` computes.

    Args:
        q: float16 [tokens, heads, dim], rotated.
        keys, values: float16 [slots, kv_heads, positions, dim], or int8 with `scales`; slots may be
            left out where there is one.
        span: int32 [3]: position of the first token, that behind the last one, and the slot; at
            most `tokens` tokens.
        out: float16 [tokens, heads · dim].
        scales: of keys and of values, float16 [slots, kv_heads, positions].
    """
    tokens, heads, dim = q.shape
    *_, kv_heads, cache_len, _ = keys.shape
    assert (keys.dtype == torch.int8) == (scales is not None)
    key_scales, value_scales = scales or (q, q)
    block = attention_block(capability)
    queries = block if capability == INTERPRETER else QUERIES
    return Launch(
        prompt_attention_kernel,
        (triton.cdiv(tokens, queries), heads),
        {
            "q_ptr": q, "keys_ptr": keys, "values_ptr": values, "key_scales_ptr": key_scales,
            "value_scales_ptr": value_scales, "span_ptr": span, "out_ptr": out, "tokens": tokens,
            "heads": heads, "kv_heads": kv_heads, "cache_len": cache_len,
            "scale": dim**-0.5 * LOG2_E,
        },
        {
            "INT8": scales is not None, "DIM": dim, "DIM_BLOCK": max(16, next_power_of_2(dim)),
            "QUERIES": queries, "BLOCK": block, "STAGES": 2 if dim <= WIDE_DIM else 1,
        },
        8,
    )  # fmt: skip
