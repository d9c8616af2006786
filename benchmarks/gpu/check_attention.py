"""The attention of every step, rotation included, in all its forms against float32."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from benchmarks.gpu.environment import Run
from vila_deploy.checkpoint.llm_config import LlmConfig
from vila_deploy.kernels.attention import SplitScratch, attention_reference, rope_attention
from vila_deploy.kernels.capability import ComputeCapability
from vila_deploy.kernels.launch_mode import PDL_CAPABILITY
from vila_deploy.kernels.rope_kv import rope_kv_reference
from vila_deploy.kernels.tile_config import attention_splits
from vila_deploy.onnx_export.rotary import rotary_tables

MAX_SEQ_LEN = 1024
# Of 3B on an H100, no power of two; small shapes would have as many as there are at most.
SMALL_SPLITS = 6
# Whose splits a rehearsal takes, since the interpreter has none to check.
H100 = ComputeCapability(9, 0)


def check_rope_attention(run: Run, sizes: LlmConfig) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield outputs and stored vectors with their references: merged or not, begun early or not."""
    heads, kv_heads, dim = sizes.num_heads, sizes.num_kv_heads, sizes.head_dim
    cos, sin = (table.to(run.device) for table in rotary_tables(sizes, MAX_SEQ_LEN))
    splits = _splits(run, kv_heads)
    scratch = SplitScratch(1, heads, dim, splits, run.device)
    early = (False, True) if run.capability >= PDL_CAPABILITY else (False,)
    for at in (0, 100 if run.small else 777):
        position = torch.tensor([at], dtype=torch.int32, device=run.device)
        qkv = torch.randn(1, (heads + 2 * kv_heads) * dim, device=run.device).half()
        old = torch.randn(2, kv_heads, MAX_SEQ_LEN, dim, device=run.device).half()
        q, key, value = rope_kv_reference(qkv, cos, sin, position, heads, kv_heads)
        keys, values = old.clone()
        keys[:, at : at + 1], values[:, at : at + 1] = key.half(), value.half()
        expected = attention_reference(q.half(), keys, values, position)
        for merged, pdl in product((False, True), early):
            keys, values = old.clone()
            out = torch.full((1, heads * dim), torch.nan, device=run.device).half()
            for launch in rope_attention(
                qkv, (cos, sin), keys, values, position, out, scratch, run.capability,
                merged=merged,
            ):  # fmt: skip
                (launch.with_pdl() if pdl else launch)()
            yield keys[:, at : at + 1], key
            yield values[:, at : at + 1], value
            yield out, expected
        # Merging leaves its counters as it found them.
        yield scratch.done, torch.zeros_like(scratch.done)


def check_slots_attention(run: Run, sizes: LlmConfig) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the same of rows of different sequences in one launch, and what it must not touch."""
    heads, kv_heads, dim = sizes.num_heads, sizes.num_kv_heads, sizes.head_dim
    device, tables = run.device, rotary_tables(sizes, MAX_SEQ_LEN)
    cos, sin = (table.to(device) for table in tables)
    splits = _splits(run, kv_heads)
    # The row in between has no sequence; slot 1 belongs to none of the rows.
    slots, lengths = [2, -1, 0], [100 if run.small else 777, 5, 0]
    slot, position = (
        torch.tensor(numbers, dtype=torch.int32, device=device) for numbers in (slots, lengths)
    )
    rows = len(slots)
    scratch = SplitScratch(rows, heads, dim, splits, device)
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * dim, device=device).half()
    old = torch.randn(2, 3, kv_heads, MAX_SEQ_LEN, dim, device=device).half()
    for merged, pdl in ((False, False), (True, run.capability >= PDL_CAPABILITY)):
        keys, values = old.clone()
        out = torch.full((rows, heads * dim), torch.nan, device=device).half()
        for launch in rope_attention(
            qkv, (cos, sin), keys, values, position, out, scratch, run.capability,
            merged=merged, slot=slot,
        ):  # fmt: skip
            (launch.with_pdl() if pdl else launch)()
        untouched = torch.ones(3, MAX_SEQ_LEN, dtype=torch.bool, device=device)
        for row, (index, at) in enumerate(zip(slots, lengths, strict=True)):
            if index < 0:
                yield out[row].isnan().int(), torch.ones_like(out[row]).int()
                continue
            untouched[index, at] = False
            one = position[row : row + 1]
            q, key, value = rope_kv_reference(qkv[row : row + 1], cos, sin, one, heads, kv_heads)
            yield keys[index, :, at : at + 1], key
            yield values[index, :, at : at + 1], value
            expected = attention_reference(q.half(), keys[index], values[index], one)
            yield out[row : row + 1], expected
        for new, before in zip((keys, values), old, strict=True):
            yield (new != before).any(3).any(1)[untouched].int(), untouched[untouched].int() * 0
    yield scratch.done, torch.zeros_like(scratch.done)


def _splits(run: Run, kv_heads: int) -> int:
    if run.small:
        return SMALL_SPLITS
    return attention_splits(H100 if run.rehearsed else run.capability, kv_heads, MAX_SEQ_LEN)
