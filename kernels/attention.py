"""Attention of one or a few new tokens over the cache, split along it, query heads in groups.

Each program takes the query heads that share a key head and one split of the cache. Splits are
merged in their order, so results repeat bit for bit: by a second kernel, or by the last program of
a key head to finish.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from vila_deploy.kernels.cached_vectors import append_token, load_vectors, rotate
from vila_deploy.kernels.capability import ComputeCapability
from vila_deploy.kernels.launch import Launch, next_power_of_2
from vila_deploy.kernels.next_weights import NO_NEXT, NO_NEXT_CONSTANTS, prefetch_next
from vila_deploy.kernels.pdl import prefetch, wait
from vila_deploy.kernels.tile_config import attention_block, device

QUERIES = 16  # rows of the narrowest tensor core product
LOG2_E = 1.4426950408889634
CACHE_LINES = tl.constexpr(128)  # of 128 bytes, of keys and of values, prefetched
Scales = tuple[Tensor, Tensor]


@triton.jit
def attention_split_kernel(
    q_ptr: tl.tensor, keys_ptr: tl.tensor, values_ptr: tl.tensor, key_scales_ptr: tl.tensor,
    value_scales_ptr: tl.tensor, position_ptr: tl.tensor, slot_ptr: tl.tensor, cos_ptr: tl.tensor,
    sin_ptr: tl.tensor, sums_ptr: tl.tensor, maxima_ptr: tl.tensor, weights_ptr: tl.tensor,
    heads: tl.tensor, kv_heads: tl.tensor, cache_len: tl.tensor, splits: tl.tensor,
    scale: tl.tensor, next_weights: tl.tuple,
    ROPE: tl.constexpr, INT8: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr, QUERIES: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    SLOTS: tl.constexpr, NEXT_TILES: tl.constexpr, NEXT_LINES: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    token, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin(
        token, kv_head, split, keys_ptr, values_ptr, position_ptr, slot_ptr, kv_heads, cache_len,
        splits, next_weights, DIM, BLOCK, SLOTS, NEXT_TILES, NEXT_LINES, PDL,
    )  # fmt: skip
    if SLOTS and tl.load(slot_ptr + token) < 0:
        return
    newest, cache_row, of_row = locate(
        token, kv_head, position_ptr, slot_ptr, heads, kv_heads, DIM, SLOTS
    )  # fmt: skip
    attend_split(
        token, kv_head, split, newest, cache_row, q_ptr + of_row, keys_ptr, values_ptr,
        key_scales_ptr, value_scales_ptr, cos_ptr, sin_ptr, sums_ptr, maxima_ptr, weights_ptr,
        heads, kv_heads, cache_len, splits, scale,
        ROPE, INT8, GROUP, DIM, DIM_BLOCK, QUERIES, BLOCK, STAGES,
    )  # fmt: skip


@triton.jit
def begin(
    token: tl.tensor, kv_head: tl.tensor, split: tl.tensor, keys_ptr: tl.tensor,
    values_ptr: tl.tensor, position_ptr: tl.tensor, slot_ptr: tl.tensor, kv_heads: tl.tensor,
    cache_len: tl.tensor, splits: tl.tensor, next_weights: tl.tuple,
    DIM: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr, NEXT_TILES: tl.constexpr,
    NEXT_LINES: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """Prefetch what no kernel writes meanwhile; with PDL also wait for the kernel before."""
    if PDL:
        prefetch_cache(
            token, kv_head, split, keys_ptr, values_ptr, position_ptr, slot_ptr, kv_heads,
            cache_len, splits, DIM, BLOCK, SLOTS,
        )  # fmt: skip
        wait()
    # Attention waits more than it reads: the memory has time for the product behind it.
    program = (token * kv_heads + kv_head) * splits + split
    programs = tl.num_programs(0) * kv_heads * splits
    prefetch_next(next_weights, program, programs, NEXT_TILES, NEXT_LINES)


@triton.jit
def locate(
    token: tl.tensor, kv_head: tl.tensor, position_ptr: tl.tensor, slot_ptr: tl.tensor,
    heads: tl.tensor, kv_heads: tl.tensor, DIM: tl.constexpr, SLOTS: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """Return a token's position, the row of its key head in the cache, and where its q begins.

    With SLOTS each token is the newest of a sequence of its own, whose cache is that of its slot.
    """
    if SLOTS:
        cache_row = tl.load(slot_ptr + token) * kv_heads + kv_head
        return tl.load(position_ptr + token), cache_row, token * (heads + 2 * kv_heads) * DIM
    else:
        return tl.load(position_ptr) + token, kv_head, 0


@triton.jit
def split_range(
    newest: tl.tensor, split: tl.tensor, splits: tl.tensor, BLOCK: tl.constexpr
) -> tl.tuple:
    """Return the positions [start, end) that `split` sees; none if start ≥ end."""
    chunk = tl.cdiv(tl.cdiv(newest + 1, splits), BLOCK) * BLOCK
    start = split * chunk
    return start, tl.minimum(start + chunk, newest + 1)


@triton.jit
def prefetch_cache(
    token: tl.tensor, kv_head: tl.tensor, split: tl.tensor, keys_ptr: tl.tensor,
    values_ptr: tl.tensor, position_ptr: tl.tensor, slot_ptr: tl.tensor, kv_heads: tl.tensor,
    cache_len: tl.tensor, splits: tl.tensor,
    DIM: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr,
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
    start, end = split_range(newest, split, splits, BLOCK)
    if SLOTS:
        end = tl.where(slot >= 0, end, start)
    if start < end:
        first = (cache_row.to(tl.int64) * cache_len + start) * DIM
        prefetch(keys_ptr + first, (end - start) * DIM, CACHE_LINES)
        prefetch(values_ptr + first, (end - start) * DIM, CACHE_LINES)


@triton.jit
def attend_split(
    token: tl.tensor, kv_head: tl.tensor, split: tl.tensor, newest: tl.tensor,
    cache_row: tl.tensor, q_ptr: tl.tensor, keys_ptr: tl.tensor, values_ptr: tl.tensor,
    key_scales_ptr: tl.tensor, value_scales_ptr: tl.tensor, cos_ptr: tl.tensor, sin_ptr: tl.tensor,
    sums_ptr: tl.tensor, maxima_ptr: tl.tensor, weights_ptr: tl.tensor, heads: tl.tensor,
    kv_heads: tl.tensor, cache_len: tl.tensor, splits: tl.tensor, scale: tl.tensor,
    ROPE: tl.constexpr, INT8: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr, QUERIES: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """Write sums, maxima and weights of the query heads of `kv_head` over one split."""
    start, end = split_range(newest, split, splits, BLOCK)
    query, offset, dim = tl.arange(0, QUERIES), tl.arange(0, BLOCK), tl.arange(0, DIM_BLOCK)
    head = kv_head * GROUP + query
    in_group, in_dim = query < GROUP, dim < DIM
    rows = (token * heads + head)[:, None]
    inside = in_group[:, None] & in_dim[None, :]
    keys_ptr += cache_row.to(tl.int64) * cache_len * DIM
    values_ptr += cache_row.to(tl.int64) * cache_len * DIM
    key_scales_ptr += cache_row * cache_len
    value_scales_ptr += cache_row * cache_len
    if ROPE:
        # One token, straight from the product: q, k and v of all heads in a row.
        vectors = rotate(
            q_ptr + head[:, None] * DIM, dim[None, :], cos_ptr, sin_ptr, newest, inside, DIM
        )  # fmt: skip
        new_key, new_value = append_token(
            q_ptr + (heads + kv_head) * DIM, keys_ptr, values_ptr, key_scales_ptr, value_scales_ptr,
            cos_ptr, sin_ptr, newest, start, end, kv_heads, dim, in_dim, INT8, DIM,
        )  # fmt: skip
    else:
        vectors = tl.load(q_ptr + rows * DIM + dim[None, :], mask=inside, other=0.0)
    top = tl.full((QUERIES,), -1e30, tl.float32)
    mass, total = tl.zeros((QUERIES,), tl.float32), tl.zeros((QUERIES, DIM_BLOCK), tl.float32)
    stored = newest if ROPE else newest + 1  # the position being written is not read
    for first in tl.range(start, end, BLOCK, num_stages=STAGES):
        at = first + offset
        k = load_vectors(
            keys_ptr + at[None, :] * DIM + dim[:, None], key_scales_ptr + at[None, :],
            at[None, :] < stored, in_dim[:, None], INT8,
        )  # fmt: skip
        v = load_vectors(
            values_ptr + at[:, None] * DIM + dim[None, :], value_scales_ptr + at[:, None],
            at[:, None] < stored, in_dim[None, :], INT8,
        )  # fmt: skip
        if ROPE:
            k = tl.where(at[None, :] == newest, new_key[:, None], k)
            v = tl.where(at[:, None] == newest, new_value[None, :], v)
        scores = tl.where(at[None, :] < end, tl.dot(vectors, k) * scale, -1e30)
        new_top = tl.maximum(top, tl.max(scores, 1))
        shares = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        mass = mass * shrink + tl.sum(shares, 1)
        total = tl.dot(shares.to(tl.float16), v, total * shrink[:, None])
        top = new_top
    row_split = rows * splits + split
    tl.store(sums_ptr + row_split * DIM + dim[None, :], total, mask=inside)
    flat = (token * heads + head) * splits + split
    tl.store(maxima_ptr + flat, top, mask=in_group)
    tl.store(weights_ptr + flat, mass, mask=in_group)


@triton.jit
def attention_kernel(
    q_ptr: tl.tensor, keys_ptr: tl.tensor, values_ptr: tl.tensor, key_scales_ptr: tl.tensor,
    value_scales_ptr: tl.tensor, position_ptr: tl.tensor, slot_ptr: tl.tensor, cos_ptr: tl.tensor,
    sin_ptr: tl.tensor, sums_ptr: tl.tensor, maxima_ptr: tl.tensor, weights_ptr: tl.tensor,
    done_ptr: tl.tensor, out_ptr: tl.tensor,
    heads: tl.tensor, kv_heads: tl.tensor, cache_len: tl.tensor, splits: tl.tensor,
    scale: tl.tensor, next_weights: tl.tuple,
    ROPE: tl.constexpr, INT8: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr, QUERIES: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    SPLITS: tl.constexpr, SLOTS: tl.constexpr, NEXT_TILES: tl.constexpr,
    NEXT_LINES: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """Attend to one split; the last program of a key head to finish merges them all."""
    token, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin(
        token, kv_head, split, keys_ptr, values_ptr, position_ptr, slot_ptr, kv_heads, cache_len,
        splits, next_weights, DIM, BLOCK, SLOTS, NEXT_TILES, NEXT_LINES, PDL,
    )  # fmt: skip
    if SLOTS and tl.load(slot_ptr + token) < 0:
        return
    newest, cache_row, of_row = locate(
        token, kv_head, position_ptr, slot_ptr, heads, kv_heads, DIM, SLOTS
    )  # fmt: skip
    attend_split(
        token, kv_head, split, newest, cache_row, q_ptr + of_row, keys_ptr, values_ptr,
        key_scales_ptr, value_scales_ptr, cos_ptr, sin_ptr, sums_ptr, maxima_ptr, weights_ptr,
        heads, kv_heads, cache_len, splits, scale,
        ROPE, INT8, GROUP, DIM, DIM_BLOCK, QUERIES, BLOCK, STAGES,
    )  # fmt: skip
    count_ptr = done_ptr + token * kv_heads + kv_head
    tl.debug_barrier()
    if tl.atomic_add(count_ptr, 1, sem="acq_rel", scope="gpu") == SPLITS - 1:
        tl.store(count_ptr, 0)
        query = tl.arange(0, QUERIES)
        row = token * heads + kv_head * GROUP + query
        merge_splits(
            row, query < GROUP, sums_ptr, maxima_ptr, weights_ptr, out_ptr, SPLITS, DIM, DIM_BLOCK
        )  # fmt: skip


@triton.jit
def attention_merge_kernel(
    sums_ptr: tl.tensor, maxima_ptr: tl.tensor, weights_ptr: tl.tensor, out_ptr: tl.tensor,
    slot_ptr: tl.tensor, heads: tl.tensor,
    SPLITS: tl.constexpr, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, SLOTS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:  # fmt: skip
    if PDL:
        wait()
    if SLOTS and tl.load(slot_ptr + tl.program_id(0) // heads) < 0:
        return
    row = tl.program_id(0) + tl.arange(0, 1)
    merge_splits(row, row >= 0, sums_ptr, maxima_ptr, weights_ptr, out_ptr, SPLITS, DIM, DIM_BLOCK)


@triton.jit
def merge_splits(
    row: tl.tensor, in_group: tl.tensor, sums_ptr: tl.tensor, maxima_ptr: tl.tensor,
    weights_ptr: tl.tensor, out_ptr: tl.tensor,
    SPLITS: tl.constexpr, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Write the rows of out that are `in_group`, splits added up in their order."""
    dim = tl.arange(0, DIM_BLOCK)[None, :]
    inside = in_group[:, None] & (dim < DIM)
    first = row * SPLITS
    top = tl.load(maxima_ptr + first, mask=in_group, other=0.0)
    for split in tl.static_range(1, SPLITS):
        top = tl.maximum(top, tl.load(maxima_ptr + first + split, mask=in_group, other=0.0))
    mass = tl.zeros(row.shape, tl.float32)
    total = tl.zeros(inside.shape, tl.float32)
    for split in tl.static_range(SPLITS):
        share = tl.exp2(tl.load(maxima_ptr + first + split, mask=in_group, other=0.0) - top)
        mass += share * tl.load(weights_ptr + first + split, mask=in_group, other=1.0)
        split_ptr = sums_ptr + (first + split)[:, None] * DIM + dim
        total += share[:, None] * tl.load(split_ptr, mask=inside, other=0.0)
    total /= mass[:, None]
    tl.store(out_ptr + row[:, None] * DIM + dim, total.to(tl.float16), mask=inside)


def attention(
    q: Tensor, keys: Tensor, values: Tensor, position: Tensor, out: Tensor,
    scratch: SplitScratch, capability: ComputeCapability, scales: Scales | None = None,
) -> tuple[Launch, ...]:  # fmt: skip
    """Return two launches that fill `out`.

    Args:
        q: float16 [tokens, heads, dim]; token i sees the positions up to position + i.
        keys, values: float16 [kv_heads, positions, dim], or int8 with `scales`.
        position: int32 [1], of the first token.
        out: float16 [tokens, heads · dim].
        scratch: for at least as many tokens.
        scales: of keys and of values, float16 [kv_heads, positions].
    """
    return _launches(
        q, None, keys, values, position, out, scratch, capability, scales, merged=False
    )  # fmt: skip


def rope_attention(
    qkv: Tensor, angles: tuple[Tensor, Tensor], keys: Tensor, values: Tensor, position: Tensor,
    out: Tensor, scratch: SplitScratch, capability: ComputeCapability,
    scales: Scales | None = None, *, merged: bool = False, slot: Tensor | None = None,
) -> tuple[Launch, ...]:  # fmt: skip
    """Return `rope_kv` and `attention` of one token in a launch less, with the same bits.

    Args:
        qkv: float16 [1, (heads + 2 · kv_heads) · dim], as the product left it.
        angles: cos and sin, float32 [positions, dim / 2].
        keys, values, scales: also written, at `position`.
        merged: the last program of a key head merges its splits: one launch instead of two.
        slot: int32 [rows]: rows of `qkv`, `position` and `out` belong to different sequences, and
            keys, values and scales have a first dimension of slots. A row of slot -1 is left out.
    """
    return _launches(
        qkv, angles, keys, values, position, out, scratch, capability, scales, merged=merged,
        slot=slot,
    )  # fmt: skip


def _launches(
    q: Tensor, angles: tuple[Tensor, Tensor] | None, keys: Tensor, values: Tensor,
    position: Tensor, out: Tensor, scratch: SplitScratch, capability: ComputeCapability,
    scales: Scales | None, *, merged: bool, slot: Tensor | None = None,
) -> tuple[Launch, ...]:  # fmt: skip
    kv_heads, cache_len, dim = keys.shape[-3:]
    tokens, heads = out.shape[0], out.shape[1] // dim
    assert heads // kv_heads <= QUERIES
    assert angles is None or len(position) == tokens
    assert slot is None or (angles is not None and keys.ndim == 4 and len(slot) == tokens)
    block = max(16, next_power_of_2(dim))
    cos, sin = angles or (scratch.maxima, scratch.maxima)
    assert (keys.dtype == torch.int8) == (scales is not None)
    key_scales, value_scales = scales or (out, out)
    splits = Launch(
        attention_split_kernel,
        (tokens, kv_heads, scratch.splits),
        {
            "q_ptr": q, "keys_ptr": keys, "values_ptr": values, "key_scales_ptr": key_scales,
            "value_scales_ptr": value_scales, "position_ptr": position,
            "slot_ptr": position if slot is None else slot, "cos_ptr": cos, "sin_ptr": sin,
            "sums_ptr": scratch.sums, "maxima_ptr": scratch.maxima,
            "weights_ptr": scratch.weights, "heads": heads, "kv_heads": kv_heads,
            "cache_len": cache_len, "splits": scratch.splits, "scale": dim**-0.5 * LOG2_E,
            **NO_NEXT,
        },
        {
            "ROPE": angles is not None, "INT8": scales is not None, "GROUP": heads // kv_heads,
            "DIM": dim, "DIM_BLOCK": block, "QUERIES": QUERIES,
            "BLOCK": attention_block(capability), "STAGES": device(capability).attention_stages,
            "SLOTS": slot is not None, **NO_NEXT_CONSTANTS, "PDL": False,
        },
        4,
    )  # fmt: skip
    return _with_merging(splits, out, scratch, merged)


def _with_merging(
    splits: Launch, out: Tensor, scratch: SplitScratch, merged: bool
) -> tuple[Launch, ...]:
    """Return the launch of all splits with their merging in it, or in a second one."""
    if merged:
        args = splits.args | {"done_ptr": scratch.done, "out_ptr": out}
        constants = splits.constants | {"SPLITS": scratch.splits}
        return (replace(splits, kernel=attention_kernel, args=args, constants=constants),)
    shared = ("sums_ptr", "maxima_ptr", "weights_ptr", "slot_ptr", "heads")
    args = {name: splits.args[name] for name in shared} | {"out_ptr": out}
    constants = {name: splits.constants[name] for name in ("DIM", "DIM_BLOCK", "SLOTS", "PDL")}
    merge = Launch(
        attention_merge_kernel, (len(out) * scratch.sums.shape[1],), args,
        constants | {"SPLITS": scratch.splits}, 1,
    )  # fmt: skip
    return splits, merge


class SplitScratch:
    """Results of each split: float32 sums [tokens, heads, splits, dim], maxima and weights.

    Args:
        splits: a power of two.
    """

    def __init__(self, tokens: int, heads: int, dim: int, splits: int, device: str):
        self.splits = splits
        shape = (tokens, heads, splits)
        self.sums = torch.empty((*shape, dim), dtype=torch.float32, device=device)
        self.maxima = torch.empty(shape, dtype=torch.float32, device=device)
        self.weights = torch.empty(shape, dtype=torch.float32, device=device)
        # Splits of each key head that are done, at most one a head; every launch leaves 0.
        self.done = torch.zeros((tokens, heads), dtype=torch.int32, device=device)


def attention_reference(q: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> Tensor:
    """Return what `attention` computes, in float32 [tokens, heads · dim]."""
    tokens, heads, dim = q.shape
    group = heads // keys.shape[0]
    outputs = []
    for token in range(tokens):
        length = int(position) + token + 1
        k, v = (x[:, :length].float().repeat_interleave(group, 0) for x in (keys, values))
        scores = torch.einsum("hd,hsd->hs", q[token].float(), k) * dim**-0.5
        outputs.append(torch.einsum("hs,hsd->hd", scores.softmax(1), v).flatten())
    return torch.stack(outputs)
