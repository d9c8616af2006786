"""Keys and values in 8 bits: written, read back and attended to."""

from __future__ import annotations

import pytest
import torch

from tests.support.kernel_cases import (
    CAPABILITY,
    assert_exact_as_half,
    generator,
    halves,
    unwritten,
)
from vila_deploy.kernels.attention import (
    SplitScratch,
    attention,
    attention_reference,
    rope_attention,
)
from vila_deploy.kernels.kv_int8 import dequantize_vectors, quantize_vectors
from vila_deploy.kernels.rope_kv import rope_kv, rope_kv_reference

POSITIONS = 200


def random_cache(kv_heads: int, dim: int, random: torch.Generator) -> tuple[torch.Tensor, ...]:
    """int8 [2, kv_heads, positions, dim] and scales [2, kv_heads, positions] of random vectors."""
    return quantize_vectors(torch.randn(2, kv_heads, POSITIONS, dim, generator=random).half())


def test_rounding_is_to_the_nearest_value_of_each_vector() -> None:
    vectors = torch.randn(5, 7, 64, generator=generator()).half()
    vectors[2, 3], vectors[4, 4, 0] = 0, 3e4
    quantized, scale = quantize_vectors(vectors)
    found = dequantize_vectors(quantized, scale).float()
    # Half a step, and the rounding of scale and product to float16.
    most = vectors.float().abs().amax(-1, keepdim=True)
    assert ((found - vectors).abs() <= most * (0.5 / 127 + 2**-10)).all()
    assert not found[2, 3].any()
    assert int(quantized.abs().max()) == 127


@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "dim", "start"),
    [(1, 4, 2, 64, 5), (3, 2, 2, 48, 0), (40, 3, 1, 128, 9)],
)
def test_rotated_keys_and_values_are_rounded(
    tokens: int, heads: int, kv_heads: int, dim: int, start: int
) -> None:
    random = generator(tokens)
    qkv = halves(tokens, (heads + 2 * kv_heads) * dim, random)
    angles = torch.rand(POSITIONS, dim // 2, generator=random) * 6
    position, q = torch.tensor([start], dtype=torch.int32), unwritten(tokens, heads, dim)
    keys, values = torch.zeros(2, kv_heads, POSITIONS, dim, dtype=torch.int8)
    scales = torch.zeros(2, kv_heads, POSITIONS).half()
    launch = rope_kv(qkv, angles.cos(), angles.sin(), position, q, keys, values, (*scales,))
    launch()
    expected = rope_kv_reference(qkv, angles.cos(), angles.sin(), position, heads, kv_heads)
    assert_exact_as_half(q, expected[0], expected[0].half())
    where = slice(start, start + tokens)
    for quantized, scale, vectors in zip((keys, values), scales, expected[1:], strict=True):
        right, right_scale = quantize_vectors(vectors.half())
        # PyTorch's rotation may differ in the last bit of float16, hence by one.
        assert (quantized[:, where].int() - right.int()).abs().max() <= 1
        assert torch.allclose(scale[:, where], right_scale, rtol=2e-3)
        for written in (quantized, scale):
            assert not written[:, :start].any()
            assert not written[:, start + tokens :].any()


@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "dim", "position", "splits"),
    [(1, 8, 2, 128, 0, 4), (1, 4, 4, 64, 130, 2), (1, 7, 1, 128, 63, 1), (3, 2, 1, 48, 190, 4)],
)
def test_attention_equals_the_reference(
    tokens: int, heads: int, kv_heads: int, dim: int, position: int, splits: int
) -> None:
    random = generator(position)
    q = torch.randn(tokens, heads, dim, generator=random).half()
    quantized, scales = random_cache(kv_heads, dim, random)
    # What lies behind the position is left over from a longer conversation and must not be seen.
    quantized[:, :, position + tokens :], scales[:, :, position + tokens :] = 127, torch.inf
    cache_position, out = (
        torch.tensor([position], dtype=torch.int32),
        unwritten(tokens, heads * dim),
    )
    scratch = SplitScratch(tokens, heads, dim, splits, "cpu")
    for launch in attention(q, *quantized, cache_position, out, scratch, CAPABILITY, (*scales,)):
        launch()
    keys, values = dequantize_vectors(quantized, scales)
    expected = attention_reference(q, keys, values, cache_position)
    half = torch.cat(
        [
            torch.nn.functional.scaled_dot_product_attention(
                q[i, None, :, None], *(x[None, :, : position + i + 1] for x in (keys, values)),
                enable_gqa=True,
            ).flatten(1)
            for i in range(tokens)
        ]
    )  # fmt: skip
    assert_exact_as_half(out, expected, half.view(tokens, -1))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "position", "splits"),
    [(4, 2, 64, 0, 2), (3, 1, 128, 64, 2), (2, 1, 48, 199, 4)],
)
def test_with_rotation_inside_it_gives_the_same_bits(
    heads: int, kv_heads: int, dim: int, position: int, splits: int
) -> None:
    """A token sees itself as later tokens will see it."""
    random = generator(position)
    qkv = halves(1, (heads + 2 * kv_heads) * dim, random)
    angles = torch.rand(POSITIONS, dim // 2, generator=random) * 6
    tables = angles.cos(), angles.sin()
    cache_position = torch.tensor([position], dtype=torch.int32)
    scratch = SplitScratch(1, heads, dim, splits, "cpu")
    apart = random_cache(kv_heads, dim, random)
    inside = tuple(tensor.clone() for tensor in apart)
    expected, out = unwritten(1, heads * dim), unwritten(1, heads * dim)
    q = unwritten(1, heads, dim)
    rope_kv(qkv, *tables, cache_position, q, *apart[0], (*apart[1],))()
    for launch in (
        *attention(q, *apart[0], cache_position, expected, scratch, CAPABILITY, (*apart[1],)),
        *rope_attention(
            qkv, tables, *inside[0], cache_position, out, scratch, CAPABILITY, (*inside[1],)
        ),
    ):
        launch()
    assert torch.equal(out, expected)
    for found, right in zip(inside, apart, strict=True):
        assert torch.equal(found, right)
