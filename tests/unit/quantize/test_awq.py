"""The AWQ searches against numbers that llm-awq itself gave for the same layers and inputs.

golden/awq.json holds, for each case of awq_case.py, what llm-awq at d6e797a gave on a CPU in
float32 (its CUDA calls taken out, its saved weights really copied): per scale group the errors of
all 20 ratios, per clipped linear the number of 5% steps by which each group's range was reduced,
row by row as one digit a group, and the norms of the quantized weights at the end.
"""

import json
from functools import cache

import pytest
import torch

from tests.support.awq_case import CASES, llm_config, packed_states, random_layer
from tests.support.paths import GOLDEN
from vila_deploy.checkpoint.llm_config import LINEARS
from vila_deploy.formats.base import QuantScheme
from vila_deploy.formats.rtn import fake_quantize
from vila_deploy.model.llm import run_layer
from vila_deploy.quantize.algorithms.awq import quantize_layer, ratios, steps_per_layer
from vila_deploy.quantize.algorithms.awq_clip import apply_clip, search_clip
from vila_deploy.quantize.algorithms.awq_scales import fold_scales, weight_of
from vila_deploy.quantize.algorithms.awq_stats import CLIP_SAMPLE_TOKENS, InputStats

GOLDEN = json.loads((GOLDEN / "awq.json").read_text())


def float_scales(scheme):
    """llm-awq's arithmetic on float32 weights, where scales are not rounded to float16."""
    return lambda weight: fake_quantize(weight, scheme, torch.float32)


@cache
def quantized_once(name, exact_scales=False):
    """`quantized`, kept for all tests that only read the result."""
    case = CASES[name]
    scheme = QuantScheme(case.group_size)
    return quantized(case, float_scales(scheme) if exact_scales else None)


def quantized(case, quantizer=None, check=None):
    layer, inputs = random_layer(case)
    original = {name: weight_of(layer, name).clone() for name in LINEARS}
    states = packed_states(case, inputs)
    result = quantize_layer(
        layer,
        original.__getitem__,
        states,
        QuantScheme(case.group_size),
        "layer",
        lambda text: check(text, layer, original) if check else None,
        quantizer,
    )
    return result, states, original


@pytest.mark.parametrize("name", CASES)
def test_scale_search_is_llm_awqs(name):
    golden = GOLDEN[name]["groups"]
    result, _, _ = quantized_once(name, exact_scales=True)
    assert ratios(result.choices) == {group["previous"]: group["ratio"] for group in golden}
    for choice, group in zip(result.choices, golden, strict=True):
        assert list(choice.group.linears) == group["linears"]
        assert choice.errors == pytest.approx(group["errors"], rel=2e-4)
        assert float(choice.scales.sum()) == pytest.approx(group["scales_sum"], rel=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_clip_search_is_llm_awqs(name):
    case, golden = CASES[name], GOLDEN[name]
    quantizer = float_scales(QuantScheme(case.group_size))
    result, _, _ = quantized_once(name, exact_scales=True)
    layer, inputs = random_layer(case)
    seen = linear_inputs(layer, inputs, case)
    for choice in result.choices:  # llm-awq folds without rounding the norms
        previous = weight_of(layer, choice.group.previous)
        previous.div_(choice.scales if previous.ndim == 1 else choice.scales[:, None])
        for linear in choice.group.linears:
            weight_of(layer, linear).mul_(choice.scales)
            seen[linear] = seen[linear] / choice.scales
    for linear in LINEARS:
        weight = weight_of(layer, linear)
        if linear in golden["clip_steps"]:
            samples = seen[linear][:: max(1, len(seen[linear]) // CLIP_SAMPLE_TOKENS)]
            limit = search_clip(weight, samples, case.group_size, quantizer)
            full = weight.unflatten(1, (limit.shape[1], -1)).abs().amax(-1)
            steps = ((1 - limit / full) * 20).round().int().flatten().tolist()
            other = sum(
                str(a) != b for a, b in zip(steps, golden["clip_steps"][linear], strict=True)
            )
            # A scale that differs in its last bit turns a few quantized values and near ties.
            assert other <= 0.02 * len(steps), linear
            weight = apply_clip(weight, limit)
        norm = float(quantizer(weight).double().norm())
        assert norm == pytest.approx(golden["quantized_norm"][linear], rel=1e-3)


def linear_inputs(layer, inputs, case):
    """What enters each linear, all tokens in order, caught by hooks on the whole layer."""
    seen = {name: [] for name in LINEARS}
    for name in LINEARS:
        layer.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen[name].append(args[0][0].clone())
        )
    states = packed_states(case, inputs)
    for one in inputs:
        run_layer(layer, one[None], states.cos, states.sin)
    return {name: torch.cat(parts) for name, parts in seen.items()}


def test_next_inputs_come_from_the_unchanged_layer():
    case = CASES["plain"]
    layer, inputs = random_layer(case)
    _, states, _ = quantized_once("plain")
    expected = [run_layer(layer, x[None], states.cos, states.sin)[0] for x in inputs]
    torch.testing.assert_close(states.hidden, torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_searches_leave_the_layer_as_it_was():
    steps = []

    def check(text, layer, original):
        steps.append(text)
        if not text.startswith(("clip", "rounding")):
            for name in LINEARS:
                assert torch.equal(weight_of(layer, name), original[name]), (text, name)

    quantized(CASES["plain"], check=check)
    scales = [text for text in steps if text.startswith("scales")]
    assert [text for text in scales if text.endswith(" 1/20")] == [
        "scales of q, k, v, 1/20",
        "scales of o, 1/20",
        "scales of gate, up, 1/20",
        "scales of down, 1/20",
    ]
    assert len(scales) == 80
    assert len(steps) == steps_per_layer(llm_config(CASES["plain"]))


def test_folding_scales_keeps_the_layers_outputs():
    case = CASES["plain"]
    result, states, _ = quantized_once("plain")
    layer, inputs = random_layer(case)
    before = run_layer(layer, inputs[0][None], states.cos, states.sin)
    for choice in result.choices:
        fold_scales(layer, choice)
    after = run_layer(layer, inputs[0][None], states.cos, states.sin)
    assert (
        weight_of(layer, "input_layernorm")
        .half()
        .float()
        .equal(weight_of(layer, "input_layernorm"))
    )
    # Rounding the norms without correcting the linears would bring differences near 1e-3.
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_awq_beats_round_to_nearest(name):
    result, _, _ = quantized_once(name)
    for linear, (rtn, awq) in result.errors.items():
        assert 0 < awq < rtn, linear
    assert set(result.clipped) == {
        linear for linear in LINEARS if linear[10:12] not in ("q_", "k_")
    }


def test_reported_errors_are_those_of_the_stored_weights():
    case = CASES["grouped_query"]
    result, _, original = quantized_once("grouped_query")
    layer, inputs = random_layer(case)
    inputs_of = linear_inputs(layer, inputs, case)
    # o_proj isn't scaled under grouped-query attention, so its stored weight acts as it is.
    x, name = inputs_of["self_attn.o_proj"], "self_attn.o_proj"
    difference = x @ (result.linears[name].dequantize() - original[name]).T
    expected = difference.square().mean() / (x @ original[name].T).square().mean()
    assert result.errors[name][1] == pytest.approx(float(expected), rel=1e-4)


def test_statistics_are_those_of_all_tokens():
    x = torch.randn(1300, 8, generator=torch.Generator().manual_seed(5))
    stats = InputStats(len(x))
    for part in x.split([1, 700, 3, 596]):
        stats.add(part)
    assert torch.equal(stats.samples, x[::2])
    torch.testing.assert_close(stats.mean_abs, x.abs().mean(0))
    difference = torch.randn(5, 8, generator=torch.Generator().manual_seed(6))
    expected = float((x @ difference.T).square().mean())
    assert stats.output_error(difference) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("channels", [8, 64, 65, 200])
def test_output_error_with_fewer_and_with_more_tokens_than_channels(channels: int) -> None:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(64, channels, generator=generator)
    difference = torch.randn(5, channels, generator=generator)
    stats = InputStats(len(x))
    for part in x.split([1, 40, 23]):
        stats.add(part)
    expected = float((x.double() @ difference.double().T).square().mean())
    assert stats.output_error(difference) == pytest.approx(expected, rel=1e-5)


def test_two_runs_are_the_same_bit_for_bit():
    first, _, _ = quantized_once("strided")
    second, _, _ = quantized(CASES["strided"])
    for name in LINEARS:
        for part in ("q", "scale", "zero"):
            assert torch.equal(
                getattr(first.linears[name], part), getattr(second.linears[name], part)
            )
