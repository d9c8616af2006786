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

from vila_deploy.kernels.capability import ComputeCapability
from vila_deploy.kernels.launch import Launch, next_power_of_2
from vila_deploy.kernels.next_weights import NO_NEXT, NO_NEXT_CONSTANTS
from vila_deploy.kernels.pdl import wait
from vila_deploy.kernels.split_attention import (
    attend_split,
    begin,
    filled_splits,
    merge_splits,
    newest_position,
)
from vila_deploy.kernels.tile_config import ATTENTION_WARPS, attention_block, device

QUERIES = 16  # rows of the narrowest tensor core product
LOG2_E = 1.4426950408889634
Scales = tuple[Tensor, Tensor]


@triton.jit
def attention_split_kernel(
    q_ptr: tl.tensor, keys_ptr: tl.tensor, values_ptr: tl.tensor, key_scales_ptr: tl.tensor,
    value_scales_ptr: tl.tensor, position_ptr: tl.tensor, slot_ptr: tl.tensor, cos_ptr: tl.tensor,
    sin_ptr: tl.tensor, sums_ptr: tl.tensor, maxima_ptr: tl.tensor, weights_ptr: tl.tensor,
    heads: tl.tensor, kv_heads: tl.tensor, cache_len: tl.tensor, scale: tl.tensor,
    next_weights: tl.tuple,
    ROPE: tl.constexpr, INT8: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr, QUERIES: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    SPLITS: tl.constexpr, SLOTS: tl.constexpr, NEXT_TILES: tl.constexpr,
    NEXT_LINES: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    token, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin(
        token, kv_head, split, keys_ptr, values_ptr, position_ptr, slot_ptr, kv_heads, cache_len,
        next_weights, DIM, BLOCK, SPLITS, SLOTS, NEXT_TILES, NEXT_LINES, PDL,
    )  # fmt: skip
    newest = newest_position(token, position_ptr, SLOTS)
    if split >= filled_splits(token, newest, slot_ptr, SPLITS, BLOCK, SLOTS):
        return
    attend_split(
        token, kv_head, split, newest, q_ptr, keys_ptr, values_ptr, key_scales_ptr,
        value_scales_ptr, slot_ptr, cos_ptr, sin_ptr, sums_ptr, maxima_ptr, weights_ptr,
        heads, kv_heads, cache_len, scale,
        ROPE, INT8, GROUP, DIM, DIM_BLOCK, QUERIES, BLOCK, STAGES, SPLITS, SLOTS,
    )  # fmt: skip


@triton.jit
def attention_kernel(
    q_ptr: tl.tensor, keys_ptr: tl.tensor, values_ptr: tl.tensor, key_scales_ptr: tl.tensor,
    value_scales_ptr: tl.tensor, position_ptr: tl.tensor, slot_ptr: tl.tensor, cos_ptr: tl.tensor,
    sin_ptr: tl.tensor, sums_ptr: tl.tensor, maxima_ptr: tl.tensor, weights_ptr: tl.tensor,
    done_ptr: tl.tensor, out_ptr: tl.tensor,
    heads: tl.tensor, kv_heads: tl.tensor, cache_len: tl.tensor, scale: tl.tensor,
    next_weights: tl.tuple,
    ROPE: tl.constexpr, INT8: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr, QUERIES: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    SPLITS: tl.constexpr, SLOTS: tl.constexpr, NEXT_TILES: tl.constexpr,
    NEXT_LINES: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """Attend to one split; the last program of a key head to finish merges them all."""
    token, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin(
        token, kv_head, split, keys_ptr, values_ptr, position_ptr, slot_ptr, kv_heads, cache_len,
        next_weights, DIM, BLOCK, SPLITS, SLOTS, NEXT_TILES, NEXT_LINES, PDL,
    )  # fmt: skip
    newest = newest_position(token, position_ptr, SLOTS)
    filled = filled_splits(token, newest, slot_ptr, SPLITS, BLOCK, SLOTS)
    if split >= filled:
        return
    attend_split(
        token, kv_head, split, newest, q_ptr, keys_ptr, values_ptr, key_scales_ptr,
        value_scales_ptr, slot_ptr, cos_ptr, sin_ptr, sums_ptr, maxima_ptr, weights_ptr,
        heads, kv_heads, cache_len, scale,
        ROPE, INT8, GROUP, DIM, DIM_BLOCK, QUERIES, BLOCK, STAGES, SPLITS, SLOTS,
    )  # fmt: skip
    count_ptr = done_ptr + token * kv_heads + kv_head
    tl.debug_barrier()
    if tl.atomic_add(count_ptr, 1, sem="acq_rel", scope="gpu") == filled - 1:
        tl.store(count_ptr, 0)
        query = tl.arange(0, QUERIES)
        row = token * heads + kv_head * GROUP + query
        merge_splits(
            row, query < GROUP, filled, sums_ptr, maxima_ptr, weights_ptr, out_ptr,
            SPLITS, DIM, DIM_BLOCK,
        )  # fmt: skip


@triton.jit
def attention_merge_kernel(
    sums_ptr: tl.tensor, maxima_ptr: tl.tensor, weights_ptr: tl.tensor, out_ptr: tl.tensor,
    position_ptr: tl.tensor, slot_ptr: tl.tensor, heads: tl.tensor,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
    SLOTS: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    if PDL:
        wait()
    token = tl.program_id(0) // heads
    newest = newest_position(token, position_ptr, SLOTS)
    filled = filled_splits(token, newest, slot_ptr, SPLITS, BLOCK, SLOTS)
    if SLOTS and filled == 0:
        return
    row = tl.program_id(0) + tl.arange(0, 1)
    merge_splits(
        row, row >= 0, filled, sums_ptr, maxima_ptr, weights_ptr, out_ptr, SPLITS, DIM, DIM_BLOCK
    )  # fmt: skip


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
            "cache_len": cache_len, "scale": dim**-0.5 * LOG2_E, **NO_NEXT,
        },
        {
            "ROPE": angles is not None, "INT8": scales is not None, "GROUP": heads // kv_heads,
            "DIM": dim, "DIM_BLOCK": block, "QUERIES": QUERIES,
            "BLOCK": attention_block(capability), "STAGES": device(capability).attention_stages,
            "SPLITS": scratch.splits, "SLOTS": slot is not None, **NO_NEXT_CONSTANTS,
            "PDL": False,
        },
        ATTENTION_WARPS,
    )  # fmt: skip
    return _with_merging(splits, out, scratch, merged)


def _with_merging(
    splits: Launch, out: Tensor, scratch: SplitScratch, merged: bool
) -> tuple[Launch, ...]:
    """Return the launch of all splits with their merging in it, or in a second one."""
    if merged:
        args = splits.args | {"done_ptr": scratch.done, "out_ptr": out}
        return (replace(splits, kernel=attention_kernel, args=args),)
    shared = ("sums_ptr", "maxima_ptr", "weights_ptr", "position_ptr", "slot_ptr", "heads")
    args = {name: splits.args[name] for name in shared} | {"out_ptr": out}
    shared = ("SPLITS", "BLOCK", "DIM", "DIM_BLOCK", "SLOTS", "PDL")
    constants = {name: splits.constants[name] for name in shared}
    grid = (len(out) * scratch.sums.shape[1],)
    merge = Launch(attention_merge_kernel, grid, args, constants, 1)
    return splits, merge


class SplitScratch:
    """Results of each split: float32 sums [tokens, heads, splits, dim], maxima and weights.

    What has no positions in a split is not written.
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
