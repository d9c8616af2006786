"""A product added to the residual stream, and what the next norm needs of it."""

from __future__ import annotations

import pytest
import torch

from tests.support.kernel_cases import (
    SM,
    assert_exact_as_half,
    error,
    generator,
    halves,
    plain,
    random_packed,
    unwritten,
)
from vila_deploy.kernels.add_residual import add_residual, add_residual_reference, parts


@pytest.mark.parametrize(
    ("rows", "columns", "bits", "tokens"), [(40, 6912, 4, 1), (64, 320, 4, 8), (33, 128, 16, 2)]
)
def test_equals_the_reference(rows: int, columns: int, bits: int, tokens: int) -> None:
    random = generator(rows)
    weight, x = random_packed(rows, columns, bits, random, 64), halves(tokens, columns, random)
    stream, norm = torch.randn(tokens, rows, generator=random), torch.rand(rows, generator=random)
    expected, normed, squares = add_residual_reference(x, weight, norm, stream)
    out = unwritten(tokens, rows)
    found = unwritten(parts(SM, rows), 8, dtype=torch.float32)
    new = stream.clone()
    add_residual(x, weight, norm, new, out, found, SM)()
    half = stream.half() + plain(x, weight)
    assert_exact_as_half(new, expected, half)
    assert_exact_as_half(out, normed, half * norm.half())
    assert error(found.sum(0)[:tokens], squares) < 1e-4
    assert not found[:, tokens:].any()
