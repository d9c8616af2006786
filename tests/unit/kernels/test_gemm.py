"""The product of many tokens with a packed weight, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from tests.support.kernel_cases import (
    CAPABILITY,
    assert_exact_as_half,
    generator,
    halves,
    plain,
    random_packed,
    unwritten,
)
from vila_deploy.kernels.gemm import gemm, gemm_reference


def check(rows: int, columns: int, tokens: int, bits: int, group: int = 128) -> None:
    random = generator(rows + tokens)
    weight, x = random_packed(rows, columns, bits, random, group), halves(tokens, columns, random)
    bias = torch.randn(rows, generator=random)
    y = unwritten(tokens, rows)
    gemm(x, weight, bias, y, CAPABILITY)()
    assert_exact_as_half(y, gemm_reference(x, weight, bias), plain(x, weight) + bias.half())


@pytest.mark.parametrize(
    ("rows", "columns", "group", "tokens"),
    [
        (64, 128, 128, 9),
        (40, 192, 64, 17),
        (100, 320, 32, 33),
        (33, 80, 16, 70),
        (96, 768, 256, 31),
    ],
)
def test_odd_shapes_and_every_group_size(rows: int, columns: int, group: int, tokens: int) -> None:
    """Tokens and channels that are no multiples of a tile, the last tile behind the padding too."""
    check(rows, columns, tokens, 4, group)


@pytest.mark.parametrize("bits", [8, 16])
def test_other_bits(bits: int) -> None:
    check(72, 300, 20, bits)
