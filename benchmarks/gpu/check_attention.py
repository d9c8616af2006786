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
# Whose splits a rehearsal takes, since the interpreter has none to check.
H100 = ComputeCapability(9, 0)


def check_rope_attention(run: Run, sizes: LlmConfig) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield outputs and stored vectors with their references: merged or not, begun early or not."""
    heads, kv_heads, dim = sizes.num_heads, sizes.num_kv_heads, sizes.head_dim
    cos, sin = (table.to(run.device) for table in rotary_tables(sizes, MAX_SEQ_LEN))
    splits = attention_splits(H100 if run.rehearsed else run.capability, kv_heads, MAX_SEQ_LEN)
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
