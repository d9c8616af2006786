"""The residual of a prompt's tokens and its norm, against PyTorch's."""

from __future__ import annotations

import pytest
import torch

from tests.support.kernel_cases import EPSILON, assert_exact_as_half, generator, unwritten
from vila_deploy.kernels.capability import INTERPRETER, ComputeCapability
from vila_deploy.kernels.prompt_norm import prompt_norm


@pytest.mark.parametrize("capability", [INTERPRETER, ComputeCapability(9, 0)], ids=str)
@pytest.mark.parametrize("scaled", [False, True])
def test_equals_pytorch(capability: ComputeCapability, scaled: bool) -> None:
    random = generator(3)
    residual, added = torch.randn(2, 5, 200, generator=random)
    scale = torch.tensor([1.0, 4.0, 1.0, 2.0, 1.0]) if scaled else None
    norm, out = torch.rand(200, generator=random), unwritten(5, 200)
    total = residual + (added if scale is None else added * scale[:, None])
    prompt_norm(residual, added, scale, norm, out, EPSILON, 2.0, capability)()
    assert torch.equal(residual, total)
    expected = torch.nn.functional.rms_norm(total, (200,), 2 * norm, EPSILON)
    assert_exact_as_half(out, expected, expected.half())


def test_nothing_is_added_to_embeddings() -> None:
    residual, norm = torch.randn(3, 64, generator=generator()), torch.ones(64)
    before, out = residual.clone(), unwritten(3, 64)
    prompt_norm(residual, None, None, norm, out, EPSILON, 1.0, INTERPRETER)()
    assert torch.equal(residual, before)
    expected = torch.nn.functional.rms_norm(residual, (64,), norm, EPSILON)
    assert_exact_as_half(out, expected, expected.half())
