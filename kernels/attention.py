"""Attention of one or a few new tokens over the cache, split along it, query heads in groups.

Each program takes the query heads that share a key head and a part of the cache. Parts are added up
in their order, so results repeat bit for bit: by a second kernel, or by the last program of a key
head to finish.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from vila_deploy.kernels.kv_int8 import levels_of, scale_of, widened
from vila_deploy.kernels.launch import Launch, next_power_of_2
from vila_deploy.kernels.pdl import prefetch, wait
from vila_deploy.kernels.tile_config import attention_slots, device

QUERIES = 16  # rows of the narrowest tensor core product
LOG2_E = 1.4426950408889634
CACHE_LINES = tl.constexpr(128)  # of 128 bytes, of keys and of values, asked for ahead
Scales = tuple[Tensor, Tensor]


@triton.jit
def attention_part_kernel(
    q, keys, values, key_scales, value_scales, position, cos, sin, sums, maxima, weights,
    heads, kv_heads, slots, splits, scale,
    TURN: tl.constexpr, INT8: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr, QUERIES: tl.constexpr, SLOTS: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    token, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if PDL:
        prefetch_cache(token, kv_head, split, keys, values, position, slots, splits, DIM, SLOTS)
        wait()
    attention_part(
        token, kv_head, split, q, keys, values, key_scales, value_scales, position, cos, sin,
        sums, maxima, weights, heads, kv_heads, slots, splits, scale,
        TURN, INT8, GROUP, DIM, DIM_BLOCK, QUERIES, SLOTS, STAGES,
    )  # fmt: skip


@triton.jit
def part_of_cache(newest, split, splits, SLOTS: tl.constexpr):
    """The slots [start, end) that part `split` sees; none if start ≥ end."""
    chunk = tl.cdiv(tl.cdiv(newest + 1, splits), SLOTS) * SLOTS
    start = split * chunk
    return start, tl.minimum(start + chunk, newest + 1)


@triton.jit
def prefetch_cache(
    token, kv_head, split, keys, values, position, slots, splits,
    DIM: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    # Past the L1, which could give the kernel's own load this value again: a step too old.
    newest = tl.load(position, cache_modifier=".cg") + token
    start, end = part_of_cache(newest, split, splits, SLOTS)
    if start < end:
        first = (kv_head.to(tl.int64) * slots + start) * DIM
        prefetch(keys + first, (end - start) * DIM, CACHE_LINES)
        prefetch(values + first, (end - start) * DIM, CACHE_LINES)


@triton.jit
def attention_part(
    token, kv_head, split, q, keys, values, key_scales, value_scales, position, cos, sin,
    sums, maxima, weights, heads, kv_heads, slots, splits, scale,
    TURN: tl.constexpr, INT8: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr, QUERIES: tl.constexpr, SLOTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sums, maxima and weights of the query heads of `kv_head` over one part of the cache."""
    newest = tl.load(position) + token
    start, end = part_of_cache(newest, split, splits, SLOTS)
    query, slot, dim = tl.arange(0, QUERIES), tl.arange(0, SLOTS), tl.arange(0, DIM_BLOCK)
    head = kv_head * GROUP + query
    mine, whole = query < GROUP, dim < DIM
    rows = (token * heads + head)[:, None]
    inside = mine[:, None] & whole[None, :]
    keys += kv_head.to(tl.int64) * slots * DIM
    values += kv_head.to(tl.int64) * slots * DIM
    key_scales += kv_head * slots
    value_scales += kv_head * slots
    if TURN:
        # One token, straight from the product: q, k and v of all heads in a row.
        vectors = turned(q + head[:, None] * DIM, dim[None, :], cos, sin, newest, inside, DIM)
        source = q + (heads + kv_head) * DIM
        new_key = turned(source, dim, cos, sin, newest, whole, DIM)
        new_value = tl.load(source + kv_heads * DIM + dim, mask=whole, other=0.0)
        here = (start <= newest) & (newest < end)
        new_key = entered(new_key, keys, key_scales, newest, dim, whole, here, INT8, DIM)
        new_value = entered(new_value, values, value_scales, newest, dim, whole, here, INT8, DIM)
    else:
        vectors = tl.load(q + rows * DIM + dim[None, :], mask=inside, other=0.0)
    top = tl.full((QUERIES,), -1e30, tl.float32)
    mass = tl.zeros((QUERIES,), tl.float32)
    total = tl.zeros((QUERIES, DIM_BLOCK), tl.float32)
    last = newest if TURN else newest + 1  # the slot being written is not read
    for first in tl.range(start, end, SLOTS, num_stages=STAGES):
        at = first + slot
        k = read(
            keys + at[None, :] * DIM + dim[:, None], key_scales + at[None, :],
            at[None, :] < last, whole[:, None], INT8,
        )  # fmt: skip
        v = read(
            values + at[:, None] * DIM + dim[None, :], value_scales + at[:, None],
            at[:, None] < last, whole[None, :], INT8,
        )  # fmt: skip
        if TURN:
            k = tl.where(at[None, :] == newest, new_key[:, None], k)
            v = tl.where(at[:, None] == newest, new_value[None, :], v)
        scores = tl.where(at[None, :] < end, tl.dot(vectors, k) * scale, -1e30)
        new_top = tl.maximum(top, tl.max(scores, 1))
        shares = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        mass = mass * shrink + tl.sum(shares, 1)
        total = tl.dot(shares.to(tl.float16), v, total * shrink[:, None])
        top = new_top
    place = rows * splits + split
    tl.store(sums + place * DIM + dim[None, :], total, mask=inside)
    flat = (token * heads + head) * splits + split
    tl.store(maxima + flat, top, mask=mine)
    tl.store(weights + flat, mass, mask=mine)


@triton.jit
def entered(
    vector, cache, scales, newest, dim, whole, here, INT8: tl.constexpr, DIM: tl.constexpr
):  # fmt: skip
    """The new token's vector as it will be read later, and into its slot if that is `here`."""
    if INT8:
        scale = scale_of(tl.max(tl.abs(vector.to(tl.float32)), 0))
        levels = levels_of(vector, scale)
        if here:
            tl.store(cache + newest * DIM + dim, levels, mask=whole)
            tl.store(scales + newest, scale)
        return widened(levels, scale)
    else:
        if here:
            tl.store(cache + newest * DIM + dim, vector, mask=whole)
        return vector


@triton.jit
def read(cells, scales, filled, whole, INT8: tl.constexpr):
    """float16 vectors of slots; zeros where a slot isn't `filled`."""
    found = tl.load(cells, mask=filled & whole, other=0)
    if INT8:
        found = widened(found, tl.load(scales, mask=filled, other=0.0))
    return found


@triton.jit
def turned(source, dim, cos, sin, position, inside, DIM: tl.constexpr):
    """float16 vectors at `source` after rotary embedding at `position`."""
    HALF: tl.constexpr = DIM // 2
    partner = tl.where(dim < HALF, dim + HALF, dim - HALF)
    own = tl.load(source + dim, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(source + partner, mask=inside, other=0.0).to(tl.float32)
    angle = position * HALF + dim % HALF
    c = tl.load(cos + angle, mask=dim < DIM, other=0.0)
    s = tl.load(sin + angle, mask=dim < DIM, other=0.0)
    return (own * c + tl.where(dim < HALF, -other, other) * s).to(tl.float16)


@triton.jit
def attention_kernel(
    q, keys, values, key_scales, value_scales, position, cos, sin, sums, maxima, weights, done, out,
    heads, kv_heads, slots, splits, scale,
    TURN: tl.constexpr, INT8: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr, QUERIES: tl.constexpr, SLOTS: tl.constexpr, STAGES: tl.constexpr,
    SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if PDL:
        prefetch_cache(token, kv_head, split, keys, values, position, slots, splits, DIM, SLOTS)
        wait()
    attention_whole(
        token, kv_head, split, q, keys, values, key_scales, value_scales, position, cos, sin,
        sums, maxima, weights, done, out, heads, kv_heads, slots, splits, scale,
        TURN, INT8, GROUP, DIM, DIM_BLOCK, QUERIES, SLOTS, STAGES, SPLITS,
    )  # fmt: skip


@triton.jit
def attention_whole(
    token, kv_head, split, q, keys, values, key_scales, value_scales, position, cos, sin,
    sums, maxima, weights, done, out, heads, kv_heads, slots, splits, scale,
    TURN: tl.constexpr, INT8: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr, QUERIES: tl.constexpr, SLOTS: tl.constexpr, STAGES: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """One part; the last part of a key head to be ready also writes what its heads attended to."""
    attention_part(
        token, kv_head, split, q, keys, values, key_scales, value_scales, position, cos, sin,
        sums, maxima, weights, heads, kv_heads, slots, splits, scale,
        TURN, INT8, GROUP, DIM, DIM_BLOCK, QUERIES, SLOTS, STAGES,
    )  # fmt: skip
    count = done + token * kv_heads + kv_head
    tl.debug_barrier()
    if tl.atomic_add(count, 1, sem="acq_rel", scope="gpu") == SPLITS - 1:
        tl.store(count, 0)
        query = tl.arange(0, QUERIES)
        row = token * heads + kv_head * GROUP + query
        merge_parts(row, query < GROUP, sums, maxima, weights, out, SPLITS, DIM, DIM_BLOCK)


@triton.jit
def attention_merge_kernel(
    sums, maxima, weights, out,
    SPLITS: tl.constexpr, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        wait()
    row = tl.program_id(0) + tl.arange(0, 1)
    merge_parts(row, row >= 0, sums, maxima, weights, out, SPLITS, DIM, DIM_BLOCK)


@triton.jit
def merge_parts(
    row, mine, sums, maxima, weights, out,
    SPLITS: tl.constexpr, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of `out` where `mine`, parts added up in their order whoever does it."""
    dim = tl.arange(0, DIM_BLOCK)[None, :]
    inside = mine[:, None] & (dim < DIM)
    first = row * SPLITS
    top = tl.load(maxima + first, mask=mine, other=0.0)
    for split in tl.static_range(1, SPLITS):
        top = tl.maximum(top, tl.load(maxima + first + split, mask=mine, other=0.0))
    mass = tl.zeros(row.shape, tl.float32)
    total = tl.zeros(inside.shape, tl.float32)
    for split in tl.static_range(SPLITS):
        share = tl.exp2(tl.load(maxima + first + split, mask=mine, other=0.0) - top)
        mass += share * tl.load(weights + first + split, mask=mine, other=1.0)
        part = sums + (first + split)[:, None] * DIM + dim
        total += share[:, None] * tl.load(part, mask=inside, other=0.0)
    total /= mass[:, None]
    tl.store(out + row[:, None] * DIM + dim, total.to(tl.float16), mask=inside)


def attention(
    q: Tensor, keys: Tensor, values: Tensor, position: Tensor, out: Tensor, parts: Parts, sm: int,
    scales: Scales | None = None,
) -> tuple[Launch, ...]:  # fmt: skip
    """Two launches that fill `out`.

    Args:
        q: float16 [tokens, heads, dim]; token i sees the slots up to position + i.
        keys, values: float16 [kv_heads, slots, dim], or int8 with `scales`.
        position: int32 [1], of the first token.
        out: float16 [tokens, heads · dim].
        parts: scratch for at least as many tokens.
        scales: of keys and of values, float16 [kv_heads, slots].
    """
    return _launches(q, None, keys, values, position, out, parts, sm, scales, merged=False)


def rope_attention(
    qkv: Tensor, angles: tuple[Tensor, Tensor], keys: Tensor, values: Tensor, position: Tensor,
    out: Tensor, parts: Parts, sm: int, scales: Scales | None = None, *, merged: bool = False,
) -> tuple[Launch, ...]:  # fmt: skip
    """`rope_kv` and `attention` of one token in one boundary less, with the same bits as result.

    Args:
        qkv: float16 [1, (heads + 2 · kv_heads) · dim], as the product left it.
        angles: cos and sin, float32 [slots, dim / 2].
        keys, values, scales: also written, at the slot `position`.
        merged: the last part of a key head adds its parts up: one launch instead of two.
    """
    return _launches(qkv, angles, keys, values, position, out, parts, sm, scales, merged=merged)


def _launches(
    q: Tensor, angles: tuple[Tensor, Tensor] | None, keys: Tensor, values: Tensor,
    position: Tensor, out: Tensor, parts: Parts, sm: int, scales: Scales | None, *, merged: bool,
) -> tuple[Launch, ...]:  # fmt: skip
    kv_heads, slots, dim = keys.shape
    tokens, heads = out.shape[0], out.shape[1] // dim
    assert heads // kv_heads <= QUERIES
    assert angles is None or tokens == 1
    block = max(16, next_power_of_2(dim))
    scratch = {"sums": parts.sums, "maxima": parts.maxima, "weights": parts.weights}
    cos, sin = angles or (parts.maxima, parts.maxima)
    assert (keys.dtype == torch.int8) == (scales is not None)
    key_scales, value_scales = scales or (out, out)
    part = Launch(
        attention_part_kernel,
        (tokens, kv_heads, parts.splits),
        {
            "q": q, "keys": keys, "values": values, "key_scales": key_scales,
            "value_scales": value_scales, "position": position, "cos": cos, "sin": sin,
            **scratch, "heads": heads, "kv_heads": kv_heads, "slots": slots,
            "splits": parts.splits, "scale": dim**-0.5 * LOG2_E,
        },
        {
            "TURN": angles is not None, "INT8": scales is not None, "GROUP": heads // kv_heads,
            "DIM": dim, "DIM_BLOCK": block, "QUERIES": QUERIES, "SLOTS": attention_slots(sm),
            "STAGES": device(sm).attention_stages, "PDL": False,
        },
        4,
    )  # fmt: skip
    if merged:
        args = part.args | {"done": parts.done, "out": out}
        constants = part.constants | {"SPLITS": parts.splits}
        return (replace(part, kernel=attention_kernel, args=args, constants=constants),)
    constants = {"SPLITS": parts.splits, "DIM": dim, "DIM_BLOCK": block, "PDL": False}
    merge = Launch(attention_merge_kernel, (tokens * heads,), {**scratch, "out": out}, constants, 1)
    return part, merge


class Parts:
    """Scratch between the two kernels: float32 sums [tokens, heads, splits, dim] and their weights.

    Args:
        splits: a power of two.
    """

    def __init__(self, tokens: int, heads: int, dim: int, splits: int, device: str):
        self.splits = splits
        shape = (tokens, heads, splits)
        self.sums = torch.empty((*shape, dim), dtype=torch.float32, device=device)
        self.maxima = torch.empty(shape, dtype=torch.float32, device=device)
        self.weights = torch.empty(shape, dtype=torch.float32, device=device)
        # Parts of each key head that are ready, at most one for each head; every launch leaves 0.
        self.done = torch.zeros((tokens, heads), dtype=torch.int32, device=device)


def attention_reference(q: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> Tensor:
    """The same in float32, [tokens, heads · dim]."""
    tokens, heads, dim = q.shape
    group = heads // keys.shape[0]
    outputs = []
    for token in range(tokens):
        length = int(position) + token + 1
        k, v = (x[:, :length].float().repeat_interleave(group, 0) for x in (keys, values))
        scores = torch.einsum("hd,hsd->hs", q[token].float(), k) * dim**-0.5
        outputs.append(torch.einsum("hs,hsd->hd", scores.softmax(1), v).flatten())
    return torch.stack(outputs)
