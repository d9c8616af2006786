"""Rounding q_proj and k_proj by what changes attention's output."""

import pytest
import torch

from tests.support.awq_case import CASES, packed_states, random_layer
from vila_deploy.formats.base import QuantScheme
from vila_deploy.quantize.algorithms import gptq, output_hessian
from vila_deploy.quantize.algorithms.awq_scales import weight_of
from vila_deploy.quantize.algorithms.gptq import gptq_quantize
from vila_deploy.quantize.algorithms.hessian import HessianAccumulator
from vila_deploy.quantize.algorithms.output_hessian import (
    DAMPING,
    KEY,
    QUERY,
    SHRINK,
    OutputFactor,
    output_factors,
)

HEADS, HEAD_DIM, CHANNELS, GROUP = 3, 16, 32, 16
SCHEME = QuantScheme(GROUP)


@pytest.fixture
def hessians():
    """A few directions count in each head, the others hardly."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(HEADS, HEAD_DIM, 3, generator=generator)
    return directions @ directions.mT + 0.02 * torch.eye(HEAD_DIM)


@pytest.fixture
def factor():
    generator = torch.Generator().manual_seed(1)
    mixed = torch.randn(CHANNELS, CHANNELS, generator=generator)
    accumulator = HessianAccumulator(CHANNELS)
    accumulator.add(torch.randn(400, CHANNELS, generator=generator) @ mixed)
    return accumulator.factor()


@pytest.fixture
def weight():
    return torch.randn(HEADS * HEAD_DIM, CHANNELS, generator=torch.Generator().manual_seed(2))


def shrunk(hessian):
    """The expected output Hessian of one head, in float64."""
    diagonal = hessian.double().diagonal()
    return (1 - SHRINK) * hessian.double() + torch.diag(
        SHRINK * diagonal + DAMPING * diagonal.mean()
    )


def error_under(hessians, factor, difference):
    """tr(G D H Dᵀ), head by head in float64."""
    inputs = factor.hessian.double()
    parts = difference.double().split(HEAD_DIM)
    return sum(
        float(torch.trace(shrunk(g) @ part @ inputs @ part.T))
        for g, part in zip(hessians, parts, strict=True)
    )


def test_factor_gives_back_each_heads_hessian(hessians):
    outputs = OutputFactor.of(hessians)
    for head, hessian in enumerate(hessians):
        within = outputs.order[head] - head * HEAD_DIM
        expected, u = shrunk(hessian)[within][:, within], outputs.u[head].double()
        torch.testing.assert_close(
            u * outputs.d[head].double() @ u.T, expected, rtol=1e-4, atol=1e-4
        )
        assert u.equal(u.triu())
        assert hessian.diagonal()[within].diff().le(0).all()


def test_weighed_weights_have_the_error_under_the_output_hessian(hessians, factor, weight):
    weighed = OutputFactor.of(hessians).weigh(weight).double()
    plain = torch.trace(weighed @ factor.hessian.double() @ weighed.T)
    assert float(plain) == pytest.approx(error_under(hessians, factor, weight), rel=1e-4)


@pytest.mark.parametrize("rows", [1, 4])
def test_rows_make_up_for_the_rows_before_them(hessians, factor, weight, rows, monkeypatch):
    """The best real-valued rest of a head, given the rows before it: by normal equations."""
    monkeypatch.setattr(gptq, "HEAD_ROWS", rows)
    outputs = OutputFactor.of(hessians)
    quantized = gptq_quantize(weight, factor, SCHEME, "it", outputs=outputs)
    stored = quantized.dequantize()
    for head, order in enumerate(outputs.order):
        within = order - head * HEAD_DIM
        g = shrunk(hessians[head])[within][:, within]
        for begin in range(0, HEAD_DIM, rows):
            here, rest = order[begin : begin + rows], slice(begin, None)
            lost = (stored - weight)[order[:begin]].double()
            best = -torch.linalg.solve(g[rest, rest], g[rest, :begin] @ lost)
            target = (weight[here].double() + best[:rows]).float()
            again = gptq_quantize(target, factor, SCHEME, "it")
            # A value on the border of two may fall to either side.
            assert (again.q != quantized.q[here]).float().mean() < 0.02
            torch.testing.assert_close(again.scale, quantized.scale[here], rtol=2e-2, atol=0)


@pytest.mark.parametrize("symmetric", [False, True])
def test_error_under_the_output_hessian_falls(hessians, factor, weight, symmetric):
    scheme = QuantScheme(GROUP, symmetric)

    def error(outputs):
        stored = gptq_quantize(weight, factor, scheme, "it", outputs=outputs).dequantize()
        return error_under(hessians, factor, stored - weight)

    assert error(OutputFactor.of(hessians)) < 0.6 * error(None)


def test_a_head_that_changes_nothing_is_rounded_as_any_linear(hessians, factor, weight):
    hessians[1] = 0
    outputs = OutputFactor.of(hessians)
    here = slice(HEAD_DIM, 2 * HEAD_DIM)
    linear = gptq_quantize(weight, factor, SCHEME, "it", outputs=outputs)
    alone = gptq_quantize(weight[here], factor, SCHEME, "it")
    assert (linear.q[here] != alone.q).float().mean() < 0.01


@pytest.mark.parametrize("name", ["plain", "grouped_query"])
def test_gradients_against_finite_differences(name, monkeypatch):
    """How a random direction of attention's output changes with the weights of q and k."""
    case = CASES[name]
    layer, inputs = random_layer(case)
    states = packed_states(case, inputs)
    attention, chunk = layer.get_submodule("self_attn"), states.chunks[0]
    hidden = states.load(chunk)
    normed = layer.get_submodule("input_layernorm")(hidden)

    def along_direction():
        result = states.attention(attention, normed, chunk.lengths)
        direction = torch.randn(result.shape, generator=torch.Generator().manual_seed(3))
        return float((result.double() * direction).sum())

    gradients = output_hessian._output_gradients(
        layer, attention, states, hidden, chunk.lengths, torch.Generator().manual_seed(3)
    )
    for part in (QUERY, KEY):
        weight = weight_of(layer, part)
        change = gradients[part].T @ normed
        change *= 1e-3 * weight.norm() / change.norm()
        expected = 2 * float((gradients[part].double() * (normed @ change.T)).sum())
        weight.add_(change)
        above = along_direction()
        weight.sub_(2 * change)
        assert above - along_direction() == pytest.approx(expected, rel=0.02)
        weight.add_(change)


@pytest.mark.parametrize("name", ["plain", "grouped_query"])
def test_attentions_output_is_nearer_to_the_original(name):
    case = CASES[name]
    scheme = QuantScheme(case.group_size)
    layer, inputs = random_layer(case)
    states = packed_states(case, inputs)
    attention, chunk = layer.get_submodule("self_attn"), states.chunks[0]
    normed = layer.get_submodule("input_layernorm")(states.load(chunk))
    exact = states.attention(attention, normed, chunk.lengths)
    original = {part: weight_of(layer, part).clone() for part in (QUERY, KEY)}
    accumulator = HessianAccumulator(case.hidden)
    accumulator.add(normed)
    factor, outputs = accumulator.factor(), output_factors(layer, states)

    def error(outputs):
        for part, weight in original.items():
            linear = gptq_quantize(weight, factor, scheme, part, outputs=outputs.get(part))
            weight_of(layer, part).copy_(linear.dequantize())
        result = states.attention(attention, normed, chunk.lengths)
        return float((result - exact).square().sum())

    assert error(outputs) < 0.9 * error({})
