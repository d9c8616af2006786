"""RMSNorm, gate, up and silu(gate) · up in one kernel."""

from __future__ import annotations

import pytest
import torch

from tests.support.kernel_cases import (
    EPSILON,
    SM,
    assert_exact_as_half,
    generator,
    plain,
    random_packed,
    squares_of,
    unwritten,
)
from vila_deploy.kernels.gate_up import gate_up, gate_up_reference
from vila_deploy.kernels.packed_linear import interleave, unpack


@pytest.mark.parametrize(
    ("inner", "columns", "bits", "tokens", "sm"),
    [(32, 3584, 4, 1, SM), (40, 192, 4, 8, SM), (64, 128, 4, 2, 0), (20, 128, 16, 3, SM)],
)
def test_equals_silu_of_gate_times_up(
    inner: int, columns: int, bits: int, tokens: int, sm: int
) -> None:
    random = generator(inner)
    gate, up = (random_packed(inner, columns, bits, random, 64) for _ in range(2))
    stream = torch.randn(tokens, columns, generator=random)
    norm, unit = torch.rand(columns, generator=random), 2.0
    x, squares = (stream * norm).half(), squares_of(stream, 4)
    y = unwritten(tokens, inner)
    both = interleave(gate, up)
    gate_up(x, squares, both, y, EPSILON, unit, sm)()

    whole = torch.nn.functional.rms_norm(stream, (columns,), norm * unit, EPSILON)
    expected = torch.nn.functional.silu(whole @ unpack(gate).T) * (whole @ unpack(up).T)
    half = torch.nn.functional.silu(plain(whole, gate)) * plain(whole, up)
    assert_exact_as_half(y, expected, half)
    again = gate_up_reference(x, squares, both, inner, EPSILON, unit)
    assert torch.allclose(again, expected, rtol=2e-2, atol=float(expected.abs().max()) / 500)
