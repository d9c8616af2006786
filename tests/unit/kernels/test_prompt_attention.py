"""Attention of a piece of a prompt in its slot, against PyTorch's."""

from __future__ import annotations

import pytest
import torch

from tests.support.kernel_cases import CAPABILITY, assert_exact_as_half, generator, unwritten
from vila_deploy.kernels.attention import attention_reference
from vila_deploy.kernels.prompt_attention import prompt_attention


@pytest.mark.parametrize(
    ("tokens", "rows", "heads", "kv_heads", "dim", "start"),
    [(1, 8, 2, 1, 48, 70), (64, 64, 2, 2, 32, 0), (70, 96, 3, 1, 128, 30)],
)
def test_equals_pytorch(
    tokens: int, rows: int, heads: int, kv_heads: int, dim: int, start: int
) -> None:
    """What lies behind the piece is left over from others and must not be seen."""
    random, positions, slot = generator(tokens), 130, 1
    q = torch.randn(rows, heads, dim, generator=random).half()
    keys, values = torch.randn(2, 2, kv_heads, positions, dim, generator=random).half()
    end = start + tokens
    keys[:, :, end:], values[:, :, end:] = 1e4, torch.inf
    span = torch.tensor([start, end, slot], dtype=torch.int32)
    out = unwritten(rows, heads * dim)
    prompt_attention(q, keys, values, span, out, CAPABILITY)()
    assert out[tokens:].isnan().all()
    seen = torch.ones(tokens, end, dtype=torch.bool).tril(start)
    half = torch.nn.functional.scaled_dot_product_attention(
        q[:tokens].transpose(0, 1)[None], keys[slot, None, :, :end], values[slot, None, :, :end],
        seen, enable_gqa=True,
    )  # fmt: skip
    expected = attention_reference(q[:tokens], keys[slot], values[slot], span[:1])
    assert_exact_as_half(out[:tokens], expected, half[0].transpose(0, 1).flatten(1))
