"""Any number of tokens takes some kernel, and all of them agree."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import (
    SM,
    assert_exact_as_half,
    generator,
    halves,
    plain,
    random_packed,
)
from vila_deploy.kernels.gemv import gemv_reference
from vila_deploy.kernels.linear import linear
from vila_deploy.kernels.tiles import widest_gemm


@pytest.mark.parametrize("tokens", [1, 8, 9, 32, 33, widest_gemm(SM) + 1])
def test_rows_on_both_sides_of_every_switch(tokens: int) -> None:
    random = generator(tokens)
    weight, x = random_packed(32, 128, 4, random), halves(tokens, 128, random)
    bias = torch.randn(32, generator=random)
    half = plain(x, weight) + bias.half()
    assert_exact_as_half(linear(x, weight, bias, SM), gemv_reference(x, weight, bias), half)
