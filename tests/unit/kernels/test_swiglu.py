"""silu(gate) · up of a prompt's tokens, beyond float16 too."""

from __future__ import annotations

import pytest
import torch

from tests.support.kernel_cases import generator, unwritten
from vila_deploy.backends.native.float16_range import fit_into_float16
from vila_deploy.kernels.capability import INTERPRETER, ComputeCapability
from vila_deploy.kernels.packed_linear import ROWS
from vila_deploy.kernels.swiglu import swiglu


@pytest.mark.parametrize("capability", [INTERPRETER, ComputeCapability(9, 0)], ids=str)
def test_equals_pytorch(capability: ComputeCapability) -> None:
    """40 channels are padded to 48; rows beyond float16 are divided as everywhere else."""
    gate, up = torch.randn(2, 4, 3 * ROWS, generator=generator(1)) * 3
    gate[1], up[1] = gate[1].abs() * 200, up[1] * 300
    gate[2, 0], up[2, 0] = 6e4, 6e4
    pairs = torch.stack([gate.unflatten(1, (3, ROWS)), up.unflatten(1, (3, ROWS))], 2)
    pairs = pairs.flatten(1).half()
    gate, up = gate.half().float(), up.half().float()
    expected = (torch.nn.functional.silu(gate) * up)[:, :40]
    halves, scales = fit_into_float16(expected)
    out, scale = unwritten(4, 40), unwritten(4, dtype=torch.float32)
    swiglu(pairs, out, scale, capability)()
    assert torch.equal(scale, scales[:, 0])
    assert scale.tolist()[0] == 1 < scale[1] < scale[2]
    assert torch.allclose(out.float(), halves.float(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_what_is_no_number_stays_so(bad: float) -> None:
    pairs, out = torch.ones(2, 2 * ROWS).half(), unwritten(2, ROWS)
    pairs[0, 0] = bad
    swiglu(pairs, out, unwritten(2, dtype=torch.float32), INTERPRETER)()
    assert not out[0].isfinite().all()
    assert out[1].isfinite().all()
