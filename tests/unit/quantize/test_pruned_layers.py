"""Linears that are all zero, as pruning and identity-initialised blocks leave them."""

import pytest
import torch

from tests.support.awq_case import CASES, llm_config, packed_states, random_layer
from vila_deploy.checkpoint.llm_config import LINEARS
from vila_deploy.formats.base import QuantScheme
from vila_deploy.formats.rtn import round_to_nearest
from vila_deploy.model.layerwise import PackedHiddenStates
from vila_deploy.quantize.algorithms import awq, awq_gptq
from vila_deploy.quantize.algorithms.awq_scales import weight_of
from vila_deploy.quantize.algorithms.hessian import HessianAccumulator
from vila_deploy.quantize.algorithms.learned_scales import learn_scales
from vila_deploy.utils.device import CPU
from vila_deploy.utils.limits import CHUNK_TOKENS

PRUNED = {
    "o_proj": ("self_attn.o_proj",),
    "down_proj": ("mlp.down_proj",),
    "identity block": ("self_attn.o_proj", "mlp.down_proj"),
    "v_proj": ("self_attn.v_proj",),
    "attention": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "gate_proj": ("mlp.gate_proj",),
    "up_proj": ("mlp.up_proj",),
    "feed-forward": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    "everything": LINEARS,
}


def quantize(algorithm, case, layer, inputs, scheme, tmp_path):
    """Return the linears of `layer` quantized, and the errors that the report states."""
    if algorithm == "rtn":
        return {name: round_to_nearest(weight_of(layer, name), scheme) for name in LINEARS}, {}
    if algorithm == "awq":
        original = {name: weight_of(layer, name).clone() for name in LINEARS}
        states = packed_states(case, inputs)
        result = awq.quantize_layer(layer, original.__getitem__, states, scheme, "layer")
        return result.linears, result.report_entry(0)
    embeds = [x.clone() for x in inputs]
    fp = PackedHiddenStates.on_host(llm_config(case), embeds, tmp_path, CPU, CHUNK_TOKENS)
    quantized = fp.copy()
    # An error of the layers before, which o_proj and down_proj would correct.
    quantized.hidden.mul_(1.01)
    result = awq_gptq.quantize_layer(layer, fp, quantized, scheme, "layer")
    assert bool(quantized.hidden.isfinite().all())
    return result.linears, result.report_entry(0)


def numbers(value):
    if isinstance(value, dict):
        return [n for item in value.values() for n in numbers(item)]
    return [value]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("pruned", PRUNED)
@pytest.mark.parametrize("algorithm", ["awq-gptq", "awq", "rtn"])
def test_pruned_linears_stay_zero_and_the_others_finite(algorithm, pruned, symmetric, tmp_path):
    case = CASES["grouped_query"]
    layer, inputs = random_layer(case)
    for name in PRUNED[pruned]:
        weight_of(layer, name).zero_()
    scheme = QuantScheme(case.group_size, symmetric)
    linears, entry = quantize(algorithm, case, layer, inputs, scheme, tmp_path)
    for name in LINEARS:
        stored = linears[name].dequantize()
        assert bool(stored.isfinite().all()), name
        assert bool(stored.any()) == (name not in PRUNED[pruned]), name
    assert all(0 <= number < 2 for number in numbers(entry))


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-20])
def test_weights_too_small_for_a_gradient_keep_their_scales(size):
    inputs = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    hessian = HessianAccumulator(64)
    hessian.add(inputs)
    scales = learn_scales(torch.full((24, 64), size), hessian.factor(), QuantScheme(16))
    assert scales.equal(torch.ones(64))


@pytest.mark.parametrize("size", [0.0, 1e-25])
def test_hessian_of_inputs_that_are_zero_is_the_identity(size):
    hessian = HessianAccumulator(64, 24)
    hessian.add(torch.full((200, 64), size), torch.ones(200, 24))
    factor = hessian.factor()
    assert factor.hessian.equal(torch.eye(64))
    assert factor.d.equal(torch.ones(64))
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(1))
    assert float(factor.least_squares_update(weight).abs().max()) < 1e-6
    assert factor.output_error(weight) == pytest.approx(0, abs=1e-6)
