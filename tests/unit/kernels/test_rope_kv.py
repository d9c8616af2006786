"""Rotary embedding and the cache, against transformers' own rotation."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tests.support.kernel_cases import assert_exact_as_half, generator, halves, unwritten
from vila_deploy.kernels.rope_kv import rope_kv, rope_kv_reference


@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "dim", "start"),
    [(1, 4, 2, 64, 5), (3, 2, 2, 48, 0), (40, 3, 1, 128, 9)],
)
def test_equals_transformers(tokens: int, heads: int, kv_heads: int, dim: int, start: int) -> None:
    random, positions = generator(tokens), 64
    qkv = halves(tokens, (heads + 2 * kv_heads) * dim, random)
    angles = torch.rand(positions, dim // 2, generator=random) * 6
    cos, sin = angles.cos(), angles.sin()
    position = torch.tensor([start], dtype=torch.int32)
    q = unwritten(tokens, heads, dim)
    keys, values = torch.zeros(2, kv_heads, positions, dim).half()
    rope_kv(qkv, cos, sin, position, q, keys, values)()

    where = slice(start, start + tokens)
    wide = [torch.cat([x[where], x[where]], 1)[None] for x in (cos, sin)]
    vectors = qkv.float().unflatten(1, (-1, dim)).transpose(0, 1)[None]
    rotated, rotated_keys = apply_rotary_pos_emb(
        vectors[:, :heads], vectors[:, heads:-kv_heads], *wide
    )
    assert_exact_as_half(q, rotated[0].transpose(0, 1), rotated[0].transpose(0, 1).half())
    assert_exact_as_half(keys[:, where], rotated_keys[0], rotated_keys[0].half())
    assert torch.equal(values[:, where], vectors[0, -kv_heads:].half())
    for cache in (keys, values):
        assert not cache[:, :start].any()
        assert not cache[:, start + tokens :].any()
    ours = rope_kv_reference(qkv, cos, sin, position, heads, kv_heads)
    for found, expected in zip(ours, (q, keys[:, where], values[:, where]), strict=True):
        assert torch.allclose(found, expected.float(), rtol=2e-3, atol=2e-3)
