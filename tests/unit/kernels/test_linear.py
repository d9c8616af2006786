"""Any number of tokens takes some kernel, and all of them agree."""

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
)
from vila_deploy.kernels.gemv import gemv_reference
from vila_deploy.kernels.linear import linear
from vila_deploy.kernels.tile_config import widest_gemm


@pytest.mark.parametrize("tokens", [*range(1, 34), widest_gemm(CAPABILITY) + 1])
def test_rows_on_both_sides_of_every_switch(tokens: int) -> None:
    """Neither channel count is a multiple of a tile."""
    random = generator(tokens)
    weight, x = random_packed(40, 192, 4, random, 64), halves(tokens, 192, random)
    bias = torch.randn(40, generator=random)
    half = plain(x, weight) + bias.half()
    assert_exact_as_half(linear(x, weight, bias, CAPABILITY), gemv_reference(x, weight, bias), half)
