"""RMSNorm and a product in one kernel against RMSNorm, then the product."""

from __future__ import annotations

import pytest
import torch

from tests.support.kernel_cases import (
    CAPABILITY,
    EPSILON,
    assert_exact_as_half,
    generator,
    halves,
    plain,
    random_packed,
    squares_of,
    unwritten,
)
from vila_deploy.kernels.norm_qkv import norm_qkv, norm_qkv_reference
from vila_deploy.kernels.packed_linear import unpack


@pytest.mark.parametrize(
    ("rows", "columns", "bits", "tokens", "programs", "with_bias"),
    [
        (48, 2560, 4, 1, 160, True),
        (33, 192, 4, 3, 1, False),
        (20, 300, 16, 8, 10, True),
        (20, 256, 8, 1, 2, False),
    ],
)
def test_equals_norm_then_product(
    rows: int, columns: int, bits: int, tokens: int, programs: int, with_bias: bool
) -> None:
    random = generator(rows)
    residual = torch.randn(tokens, columns, generator=random) * 3
    norm, prescale = torch.rand(columns, generator=random), 4.0
    weight = random_packed(rows, columns, bits, random, 64)
    bias = torch.randn(rows, generator=random) if with_bias else None
    x, squares = (residual * norm).half(), squares_of(residual, programs)
    y = unwritten(tokens, rows)
    norm_qkv(x, squares, weight, bias, y, EPSILON, prescale, CAPABILITY)()

    normed = torch.nn.functional.rms_norm(residual, (columns,), norm * prescale, EPSILON)
    added = 0 if bias is None else bias
    expected = torch.nn.functional.linear(normed, unpack(weight)) + added
    assert_exact_as_half(y, expected, (plain(normed, weight) + added).half())
    again = norm_qkv_reference(x, squares, weight, bias, EPSILON, prescale)
    assert_exact_as_half(y, again, y)


def test_rows_behind_the_count_do_not_count() -> None:
    """`squares` has room for a power of two; what lies behind it in memory belongs to others."""
    random = generator()
    weight, x = random_packed(16, 128, 4, random), halves(1, 128, random)
    room = torch.full((4, 8), 1e9)
    room[:3] = squares_of(x, 3)
    y, alone = unwritten(1, 16), unwritten(1, 16)
    norm_qkv(x, room[:3], weight, None, y, EPSILON, 1.0, CAPABILITY)()
    norm_qkv(x, squares_of(x, 1), weight, None, alone, EPSILON, 1.0, CAPABILITY)()
    assert torch.allclose(y, alone, rtol=2e-3)
