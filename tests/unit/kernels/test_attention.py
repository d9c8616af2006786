"""Attention over a split cache against plain softmax attention."""

from __future__ import annotations

import pytest
import torch

from tests.support.kernel_cases import CAPABILITY, assert_exact_as_half, generator, unwritten
from vila_deploy.kernels.attention import (
    SplitScratch,
    attention,
    attention_reference,
    rope_attention,
)
from vila_deploy.kernels.kv_int8 import quantize_vectors
from vila_deploy.kernels.rope_kv import rope_kv


@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "dim", "position", "splits"),
    [
        (1, 8, 2, 128, 0, 4),
        (1, 4, 4, 64, 130, 2),
        (1, 7, 1, 128, 63, 1),
        (1, 7, 1, 128, 64, 2),
        (3, 2, 1, 48, 190, 4),
        (1, 16, 1, 32, 199, 8),
        (1, 4, 2, 64, 199, 3),
    ],
)
def test_equals_plain_attention(
    tokens: int, heads: int, kv_heads: int, dim: int, position: int, splits: int
) -> None:
    random, positions = generator(position), 200
    q = torch.randn(tokens, heads, dim, generator=random).half()
    # What lies behind the position is left over from a longer conversation and must not be seen.
    keys, values = torch.randn(2, kv_heads, positions, dim, generator=random).half()
    keys[:, position + tokens :] = 1e4
    values[:, position + tokens :] = torch.inf
    cache_position = torch.tensor([position], dtype=torch.int32)
    out = unwritten(tokens, heads * dim)
    for launch in attention(
        q,
        keys,
        values,
        cache_position,
        out,
        SplitScratch(tokens, heads, dim, splits, "cpu"),
        CAPABILITY,
    ):
        launch()
    expected = attention_reference(q, keys, values, cache_position)
    assert_exact_as_half(out, expected, _half(q, keys, values, position))


def _half(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, position: int) -> torch.Tensor:
    """PyTorch's own attention in float16."""
    rows = []
    for token, query in enumerate(q):
        k, v = (x[None, :, : position + token + 1] for x in (keys, values))
        rows.append(
            torch.nn.functional.scaled_dot_product_attention(
                query[None, :, None], k, v, enable_gqa=True
            ).flatten()
        )
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "position", "splits"),
    [(4, 2, 64, 0, 2), (3, 1, 128, 63, 1), (2, 2, 48, 64, 2), (2, 1, 32, 199, 4)],
)
def test_with_rotation_inside_it_gives_the_same_bits(
    heads: int, kv_heads: int, dim: int, position: int, splits: int
) -> None:
    random, positions = generator(position), 200
    qkv = torch.randn(1, (heads + 2 * kv_heads) * dim, generator=random).half()
    angles = torch.rand(positions, dim // 2, generator=random) * 6
    cache = torch.randn(2, kv_heads, positions, dim, generator=random).half()
    cache[:, :, position:] = torch.inf
    cache_position, scratch = (
        torch.tensor([position], dtype=torch.int32),
        SplitScratch(1, heads, dim, splits, "cpu"),
    )
    apart, inside = cache.clone(), cache.clone()
    expected, out = unwritten(1, heads * dim), unwritten(1, heads * dim)
    q = unwritten(1, heads, dim)
    rope_kv(qkv, angles.cos(), angles.sin(), cache_position, q, *apart)()
    for launch in (
        *attention(q, *apart, cache_position, expected, scratch, CAPABILITY),
        *rope_attention(
            qkv, (angles.cos(), angles.sin()), *inside, cache_position, out, scratch, CAPABILITY
        ),
    ):
        launch()
    assert torch.equal(out, expected)
    assert torch.equal(inside, apart)


@pytest.mark.parametrize(
    ("int8", "splits", "position"), [(False, 4, 190), (True, 2, 70), (False, 3, 5)]
)
def test_merged_by_its_last_program_gives_the_same_bits(
    int8: bool, splits: int, position: int
) -> None:
    """Twice: every launch leaves its counters as it found them."""
    heads, kv_heads, dim, positions = 6, 2, 48, 200
    random = generator(splits)
    qkv = torch.randn(1, (heads + 2 * kv_heads) * dim, generator=random).half()
    angles = torch.rand(positions, dim // 2, generator=random) * 6
    tables, cache_position = (
        (angles.cos(), angles.sin()),
        torch.tensor([position], dtype=torch.int32),
    )
    vectors, scales = torch.randn(2, kv_heads, positions, dim, generator=random).half(), None
    if int8:
        vectors, both_scales = quantize_vectors(vectors)
        scales = (both_scales[0], both_scales[1])
    outs = []
    for merged in (False, True):
        out, scratch = unwritten(1, heads * dim), SplitScratch(1, heads, dim, splits, "cpu")
        launches = rope_attention(
            qkv, tables, *vectors, cache_position, out, scratch, CAPABILITY, scales, merged=merged
        )
        assert len(launches) == 2 - merged
        for _ in range(1 + merged):
            out.fill_(torch.nan)
            for launch in launches:
                launch()
            assert not scratch.done.any()
            outs.append(out.clone())
    assert outs[0].isfinite().all()
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])
