"""RMSNorm, gate, up and silu(gate) · up in one kernel."""

from __future__ import annotations

import pytest
import torch

from tests.support.kernel_cases import (
    CAPABILITY,
    EPSILON,
    assert_exact_as_half,
    generator,
    plain,
    random_packed,
    squares_of,
    unwritten,
)
from vila_deploy.kernels.capability import INTERPRETER, ComputeCapability
from vila_deploy.kernels.gate_up import gate_up, gate_up_reference
from vila_deploy.kernels.packed_linear import interleave, unpack


@pytest.mark.parametrize(
    ("inner", "columns", "bits", "tokens", "capability"),
    [
        (32, 3584, 4, 1, CAPABILITY),
        (40, 192, 4, 8, CAPABILITY),
        (64, 128, 4, 2, INTERPRETER),
        (20, 128, 16, 3, CAPABILITY),
    ],
)
def test_equals_silu_of_gate_times_up(
    inner: int, columns: int, bits: int, tokens: int, capability: ComputeCapability
) -> None:
    random = generator(inner)
    gate, up = (random_packed(inner, columns, bits, random, 64) for _ in range(2))
    residual = torch.randn(tokens, columns, generator=random)
    norm, prescale = torch.rand(columns, generator=random), 2.0
    x, squares = (residual * norm).half(), squares_of(residual, 4)
    y = unwritten(tokens, inner)
    pair = interleave(gate, up)
    gate_up(x, squares, pair, y, EPSILON, prescale, capability)()

    normed = torch.nn.functional.rms_norm(residual, (columns,), norm * prescale, EPSILON)
    expected = torch.nn.functional.silu(normed @ unpack(gate).T) * (normed @ unpack(up).T)
    half = torch.nn.functional.silu(plain(normed, gate)) * plain(normed, up)
    assert_exact_as_half(y, expected, half)
    again = gate_up_reference(x, squares, pair, inner, EPSILON, prescale)
    assert torch.allclose(again, expected, rtol=2e-2, atol=float(expected.abs().max()) / 500)
