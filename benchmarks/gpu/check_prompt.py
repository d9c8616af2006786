"""What a prompt launches besides products, against float32: padded, and in a slot of several."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.gpu.environment import Run
from vila_deploy.checkpoint.llm_config import LlmConfig
from vila_deploy.kernels.attention import attention_reference
from vila_deploy.kernels.kv_int8 import dequantize_vectors, quantize_vectors
from vila_deploy.kernels.prompt_attention import prompt_attention
from vila_deploy.kernels.prompt_norm import prompt_norm, prompt_norm_reference
from vila_deploy.kernels.rope_kv import rope_kv, rope_kv_reference
from vila_deploy.kernels.swiglu import swiglu, swiglu_reference
from vila_deploy.onnx_export.rotary import rotary_tables

MAX_SEQ_LEN, EPSILON = 1024, 1e-5
SLOTS, SLOT = 3, 1
Pair = tuple[Tensor, Tensor]


def check_prompt_attention(run: Run, sizes: LlmConfig) -> Iterator[Pair]:
    """Yield what a piece of a prompt writes and attends to with its references, in each cache.

    The piece has fewer tokens than its buffers have rows; whatever lies behind it is NaN.
    """
    heads, kv_heads, dim = sizes.num_heads, sizes.num_kv_heads, sizes.head_dim
    device, max_seq_len = run.device, 128 if run.small else MAX_SEQ_LEN
    cos, sin = (table.to(device) for table in rotary_tables(sizes, max_seq_len))
    tokens, rows = (80, 96) if run.small else (200, 256)
    for start, int8 in ((0, False), (max_seq_len - tokens, False), (37, True)):
        end = start + tokens
        span = torch.tensor([start, end, SLOT], dtype=torch.int32, device=device)
        qkv = torch.randn(rows, (heads + 2 * kv_heads) * dim, device=device).half()
        vectors = torch.randn(2, SLOTS, kv_heads, max_seq_len, dim, device=device).half()
        scales = None
        if int8:
            vectors, of_vectors = quantize_vectors(vectors)
            scales = of_vectors[0], of_vectors[1]
        else:
            vectors[:, SLOT, :, start:] = torch.nan
        before = vectors.clone()
        q, out = (torch.full((rows, *shape), torch.nan, device=device).half()
                  for shape in ((heads, dim), (heads * dim,)))  # fmt: skip
        keys, values = vectors
        rope_kv(qkv, cos, sin, span, q, keys, values, scales)()
        prompt_attention(q, keys, values, span, out, run.capability, scales)()
        expected, *written = rope_kv_reference(
            qkv[:tokens], cos, sin, span[:1], heads, kv_heads
        )  # fmt: skip
        yield q[:tokens], expected
        halves = vectors if scales is None else dequantize_vectors(vectors, torch.stack(scales))
        for found, vector in zip(halves[:, SLOT, :, start:end], written, strict=True):
            yield found, (dequantize_vectors(*quantize_vectors(vector.half())) if int8 else vector)
        yield out[:tokens], attention_reference(q[:tokens], *halves[:, SLOT], span[:1])
        # Neither other slots nor what lies in front of the piece or behind it.
        vectors[:, SLOT, :, start:end] = before[:, SLOT, :, start:end]
        yield vectors.view(torch.int8), before.view(torch.int8)


def check_prompt_norm(run: Run, sizes: LlmConfig) -> Iterator[Pair]:
    """Yield the residual and its norm, with and without what is added."""
    rows, columns = (5 if run.small else 256), sizes.hidden_size
    norm = torch.rand(columns, device=run.device)
    added = torch.randn(rows, columns, device=run.device)
    scale = torch.randint(0, 3, (rows,), device=run.device).float().exp2()
    for pair in ((None, None), (added, None), (added, scale)):
        before = torch.randn(rows, columns, device=run.device)
        expected, normed = prompt_norm_reference(before, *pair, norm, EPSILON, 2.0)
        out = torch.full_like(before, torch.nan).half()
        prompt_norm(before, *pair, norm, out, EPSILON, 2.0, run.capability)()
        yield before, expected
        yield out, normed


def check_swiglu(run: Run, sizes: LlmConfig) -> Iterator[Pair]:
    """Yield the activation times its scale; a token's may exceed float16."""
    rows, inner = (5 if run.small else 256), sizes.intermediate_size
    pairs = torch.randn(rows, 2 * inner, device=run.device).half()
    pairs[1] *= 3000
    out = torch.full((rows, inner), torch.nan, device=run.device).half()
    scale = torch.full((rows,), torch.nan, device=run.device)
    swiglu(pairs, out, scale, run.capability)()
    expected = swiglu_reference(pairs, inner)
    for row in (slice(0, 1), slice(1, 2), slice(2, None)):
        yield out[row].float() * scale[row, None], expected[row]
    yield scale[2:].int(), torch.ones_like(scale[2:]).int()
