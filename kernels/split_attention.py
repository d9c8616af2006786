"""Device functions of attention: one split of the cache for the heads of a key head, and merging.

Splits without positions have nothing to do and leave nothing; which ones have some follows from the
newest position alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vila_deploy.kernels.cached_vectors import append_token, load_vectors, rotate
from vila_deploy.kernels.next_weights import prefetch_next
from vila_deploy.kernels.pdl import prefetch, wait

CACHE_LINES = tl.constexpr(128)  # of 128 bytes, of keys and of values, prefetched


@triton.jit
def begin(
    token: tl.tensor, kv_head: tl.tensor, split: tl.tensor, keys_ptr: tl.tensor,
    values_ptr: tl.tensor, position_ptr: tl.tensor, slot_ptr: tl.tensor, kv_heads: tl.tensor,
    cache_len: tl.tensor, next_weights: tl.tuple,
    DIM: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, SLOTS: tl.constexpr,
    NEXT_TILES: tl.constexpr, NEXT_LINES: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """Prefetch what no kernel writes meanwhile; with PDL also wait for the kernel before."""
    if PDL:
        prefetch_cache(
            token, kv_head, split, keys_ptr, values_ptr, position_ptr, slot_ptr, kv_heads,
            cache_len, DIM, BLOCK, SPLITS, SLOTS,
        )  # fmt: skip
        wait()
    # Attention waits more than it reads: the memory has time for the product behind it.
    program = (token * kv_heads + kv_head) * SPLITS + split
    programs = tl.num_programs(0) * kv_heads * SPLITS
    prefetch_next(next_weights, program, programs, NEXT_TILES, NEXT_LINES)


@triton.jit
def newest_position(
    token: tl.tensor, position_ptr: tl.tensor, SLOTS: tl.constexpr
) -> tl.tensor:  # fmt: skip
    """Return a token's position; with SLOTS each is the newest of a sequence of its own."""
    if SLOTS:
        return tl.load(position_ptr + token)
    else:
        return tl.load(position_ptr) + token


@triton.jit
def split_blocks(
    newest: tl.tensor, SPLITS: tl.constexpr, BLOCK: tl.constexpr
) -> tl.tensor:  # fmt: skip
    """Return of how many blocks of positions each split but the last consists."""
    return tl.cdiv(newest + 1, SPLITS * BLOCK)


@triton.jit
def filled_splits(
    token: tl.tensor, newest: tl.tensor, slot_ptr: tl.tensor,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return how many splits have positions, 0 in a row without a slot; the others do nothing."""
    filled = tl.cdiv(newest + 1, split_blocks(newest, SPLITS, BLOCK) * BLOCK)
    if SLOTS:
        filled = tl.where(tl.load(slot_ptr + token) < 0, 0, filled)
    return filled


@triton.jit
def split_range(
    newest: tl.tensor, split: tl.tensor, SPLITS: tl.constexpr, BLOCK: tl.constexpr
) -> tl.tuple:
    """Return the positions [start, end) that `split` sees; none if start ≥ end."""
    chunk = split_blocks(newest, SPLITS, BLOCK) * BLOCK
    start = split * chunk
    return start, tl.minimum(start + chunk, newest + 1)


@triton.jit
def prefetch_cache(
    token: tl.tensor, kv_head: tl.tensor, split: tl.tensor, keys_ptr: tl.tensor,
    values_ptr: tl.tensor, position_ptr: tl.tensor, slot_ptr: tl.tensor, kv_heads: tl.tensor,
    cache_len: tl.tensor,
    DIM: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, SLOTS: tl.constexpr,
) -> None:  # fmt: skip
    """Prefetch the first keys and values of a split."""
    # Past the L1, which could give the kernel's own load this value again: a step too old.
    if SLOTS:
        newest = tl.load(position_ptr + token, cache_modifier=".cg")
        slot = tl.load(slot_ptr + token, cache_modifier=".cg")
        cache_row = slot * kv_heads + kv_head
    else:
        newest = tl.load(position_ptr, cache_modifier=".cg") + token
        cache_row = kv_head
    start, end = split_range(newest, split, SPLITS, BLOCK)
    if SLOTS:
        end = tl.where(slot >= 0, end, start)
    if start < end:
        first = (cache_row.to(tl.int64) * cache_len + start) * DIM
        prefetch(keys_ptr + first, (end - start) * DIM, CACHE_LINES)
        prefetch(values_ptr + first, (end - start) * DIM, CACHE_LINES)


@triton.jit
def attend_split(
    token: tl.tensor, kv_head: tl.tensor, split: tl.tensor, newest: tl.tensor, q_ptr: tl.tensor,
    keys_ptr: tl.tensor, values_ptr: tl.tensor, key_scales_ptr: tl.tensor,
    value_scales_ptr: tl.tensor, slot_ptr: tl.tensor, cos_ptr: tl.tensor, sin_ptr: tl.tensor,
    sums_ptr: tl.tensor, maxima_ptr: tl.tensor, weights_ptr: tl.tensor, heads: tl.tensor,
    kv_heads: tl.tensor, cache_len: tl.tensor, scale: tl.tensor,
    ROPE: tl.constexpr, INT8: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr, QUERIES: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    SPLITS: tl.constexpr, SLOTS: tl.constexpr,
) -> None:  # fmt: skip
    """Write sums, maxima and weights of the query heads of `kv_head` over one split.

    With ROPE the split of the newest position also writes its key and value.
    """
    cache_row = kv_head
    if SLOTS:
        cache_row += tl.load(slot_ptr + token) * kv_heads
        q_ptr += token * (heads + 2 * kv_heads) * DIM
    keys_ptr += cache_row.to(tl.int64) * cache_len * DIM
    values_ptr += cache_row.to(tl.int64) * cache_len * DIM
    key_scales_ptr += cache_row * cache_len
    value_scales_ptr += cache_row * cache_len
    start, end = split_range(newest, split, SPLITS, BLOCK)
    query, dim = tl.arange(0, QUERIES), tl.arange(0, DIM_BLOCK)
    head = kv_head * GROUP + query
    in_group, in_dim = query < GROUP, dim < DIM
    rows = (token * heads + head)[:, None]
    inside = in_group[:, None] & in_dim[None, :]
    if ROPE:
        # One token, straight from the product: q, k and v of all heads in a row.
        if newest < end:
            append_token(
                q_ptr + (heads + kv_head) * DIM, keys_ptr, values_ptr, key_scales_ptr,
                value_scales_ptr, cos_ptr, sin_ptr, newest, kv_heads, dim, in_dim, INT8, DIM,
            )  # fmt: skip
            # Other threads read it below.
            tl.debug_barrier()
        vectors = rotate(
            q_ptr + head[:, None] * DIM, dim[None, :], cos_ptr, sin_ptr, newest, inside, DIM
        )  # fmt: skip
    else:
        vectors = tl.load(q_ptr + rows * DIM + dim[None, :], mask=inside, other=0.0)
    top, mass, total = attend_range(
        vectors, keys_ptr, values_ptr, key_scales_ptr, value_scales_ptr, start, end, scale,
        INT8, DIM, DIM_BLOCK, QUERIES, BLOCK, STAGES,
    )  # fmt: skip
    row_split = rows * SPLITS + split
    tl.store(sums_ptr + row_split * DIM + dim[None, :], total, mask=inside)
    flat = (token * heads + head) * SPLITS + split
    tl.store(maxima_ptr + flat, top, mask=in_group)
    tl.store(weights_ptr + flat, mass, mask=in_group)


@triton.jit
def attend_range(
    vectors: tl.tensor, keys_ptr: tl.tensor, values_ptr: tl.tensor, key_scales_ptr: tl.tensor,
    value_scales_ptr: tl.tensor, start: tl.tensor, end: tl.tensor, scale: tl.tensor,
    INT8: tl.constexpr, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, QUERIES: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """Return the largest score of each query, the sum of its shares, and that of values by them."""
    offset, dim = tl.arange(0, BLOCK), tl.arange(0, DIM_BLOCK)
    in_dim = dim < DIM
    top = tl.full((QUERIES,), -1e30, tl.float32)
    mass, total = tl.zeros((QUERIES,), tl.float32), tl.zeros((QUERIES, DIM_BLOCK), tl.float32)
    for first in tl.range(start, end, BLOCK, num_stages=STAGES):
        at = first + offset
        k = load_vectors(
            keys_ptr + at[None, :] * DIM + dim[:, None], key_scales_ptr + at[None, :],
            at[None, :] < end, in_dim[:, None], INT8,
        )  # fmt: skip
        v = load_vectors(
            values_ptr + at[:, None] * DIM + dim[None, :], value_scales_ptr + at[:, None],
            at[:, None] < end, in_dim[None, :], INT8,
        )  # fmt: skip
        scores = tl.where(at[None, :] < end, tl.dot(vectors, k) * scale, -1e30)
        new_top = tl.maximum(top, tl.max(scores, 1))
        shares = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        mass = mass * shrink + tl.sum(shares, 1)
        total = tl.dot(shares.to(tl.float16), v, total * shrink[:, None])
        top = new_top
    return top, mass, total


@triton.jit
def merge_splits(
    row: tl.tensor, in_group: tl.tensor, filled: tl.tensor, sums_ptr: tl.tensor,
    maxima_ptr: tl.tensor, weights_ptr: tl.tensor, out_ptr: tl.tensor,
    SPLITS: tl.constexpr, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Write the rows of out that are `in_group`, the `filled` splits added up in their order."""
    dim = tl.arange(0, DIM_BLOCK)[None, :]
    inside = in_group[:, None] & (dim < DIM)
    first = row * SPLITS
    top = tl.full(row.shape, -1e30, tl.float32)
    for split in tl.static_range(SPLITS):
        there = in_group & (split < filled)
        top = tl.maximum(top, tl.load(maxima_ptr + first + split, mask=there, other=-1e30))
    mass = tl.zeros(row.shape, tl.float32)
    total = tl.zeros(inside.shape, tl.float32)
    for split in tl.static_range(SPLITS):
        there = in_group & (split < filled)
        share = tl.exp2(tl.load(maxima_ptr + first + split, mask=there, other=-1e30) - top)
        mass += share * tl.load(weights_ptr + first + split, mask=there, other=1.0)
        split_ptr = sums_ptr + (first + split)[:, None] * DIM + dim
        total += share[:, None] * tl.load(split_ptr, mask=inside & there[:, None], other=0.0)
    total /= mass[:, None]
    tl.store(out_ptr + row[:, None] * DIM + dim, total.to(tl.float16), mask=inside)
