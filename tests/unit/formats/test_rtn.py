"""Round to nearest against a plain-Python computation of one group at a time."""

import numpy as np
import pytest
import torch

from vila_deploy.formats.base import QuantScheme
from vila_deploy.formats.rtn import fake_quantize, round_to_nearest
from vila_deploy.utils.errors import VilaDeployError


def reference_group(weights, symmetric):
    """Quantized values, scale and zero of one group, in Python floats."""
    if symmetric:
        scale = float(np.float16(max(max(abs(w) for w in weights), 1e-5) / 7))
        zero = 8
    else:
        low, high = min(0.0, *weights), max(0.0, *weights)
        scale = float(np.float16(max(high - low, 1e-5) / 15))
        zero = min(15, max(0, round(-low / scale)))
    return [min(15, max(0, round(w / scale) + zero)) for w in weights], scale, zero


@pytest.mark.parametrize("symmetric", [False, True])
def test_levels_are_llm_awqs(symmetric):
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    weight[0, :32] = weight[0, :32].abs() + 1  # a group of one sign
    weight[1, 32:] = 0
    linear = round_to_nearest(weight, QuantScheme(32, symmetric))
    for row in range(6):
        for group in range(2):
            values = weight[row, 32 * group : 32 * group + 32].tolist()
            q, scale, zero = reference_group(values, symmetric)
            assert linear.q[row, 32 * group : 32 * group + 32].tolist() == q
            assert float(linear.scale[row, group]) == scale
            assert int(linear.zero[row, group]) == zero


@pytest.mark.parametrize("symmetric", [False, True])
def test_error_is_at_most_half_a_step(symmetric):
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(2))
    linear = round_to_nearest(weight, QuantScheme(64, symmetric))
    error = (linear.dequantize() - weight).abs().unflatten(1, (4, 64)).amax(-1)
    # Half a step; the ends of the range may lose a little more to the rounded scale and zero.
    assert (error <= linear.scale.float() * 1.02).all()
    assert (error.mean() / linear.scale.float().mean()) < 0.55
    assert linear.symmetric is symmetric


def test_what_the_search_optimises_is_what_is_stored():
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(3))
    for scheme in (QuantScheme(32), QuantScheme(64, symmetric=True)):
        assert torch.equal(
            fake_quantize(weight, scheme), round_to_nearest(weight, scheme).dequantize()
        )


def test_one_sign_groups_keep_their_values():
    weight = torch.linspace(1.0, 1.1, 32).repeat(8, 1)
    back = round_to_nearest(weight, QuantScheme(32)).dequantize()
    assert (back - weight).abs().max() < 0.05


def test_refuses_weights_beyond_float16():
    weight = torch.zeros(8, 32)
    weight[3, 5] = 1e30
    with pytest.raises(VilaDeployError, match=r"model.layers.0.mlp.up_proj: .*beyond float16"):
        round_to_nearest(weight, QuantScheme(32), "model.layers.0.mlp.up_proj")
