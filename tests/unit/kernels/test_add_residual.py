"""A product added to the residual residual, and what the next norm needs of it."""

from __future__ import annotations

import pytest
import torch

from tests.support.kernel_cases import (
    CAPABILITY,
    assert_exact_as_half,
    error,
    generator,
    halves,
    plain,
    random_packed,
    unwritten,
)
from vila_deploy.kernels.add_residual import add_residual, add_residual_reference
from vila_deploy.kernels.tile_config import gemv_programs


@pytest.mark.parametrize(
    ("rows", "columns", "bits", "tokens"), [(40, 6912, 4, 1), (64, 320, 4, 8), (33, 128, 16, 2)]
)
def test_equals_the_reference(rows: int, columns: int, bits: int, tokens: int) -> None:
    random = generator(rows)
    weight, x = random_packed(rows, columns, bits, random, 64), halves(tokens, columns, random)
    residual, norm = torch.randn(tokens, rows, generator=random), torch.rand(rows, generator=random)
    expected, normed, squares = add_residual_reference(x, weight, norm, residual)
    out = unwritten(tokens, rows)
    found = unwritten(gemv_programs(CAPABILITY, rows), 8, dtype=torch.float32)
    new = residual.clone()
    add_residual(x, weight, norm, new, out, found, CAPABILITY)()
    half = residual.half() + plain(x, weight)
    assert_exact_as_half(new, expected, half)
    assert_exact_as_half(out, normed, half * norm.half())
    assert error(found.sum(0)[:tokens], squares) < 1e-4
    assert not found[:, tokens:].any()
