"""The default algorithm: each step against float64 or a written-out one; all of it on a layer."""

import copy

import pytest
import torch

from tests.support.awq_case import CASES, llm_config, packed_states, random_layer
from vila_deploy.checkpoint.llm_config import LINEARS, NORMS
from vila_deploy.formats.base import QuantScheme
from vila_deploy.formats.rtn import fake_quantize
from vila_deploy.model import layerwise
from vila_deploy.model.layerwise import PackedHiddenStates
from vila_deploy.model.llm import run_layer
from vila_deploy.quantize.algorithms import awq, awq_gptq, gptq, learned_scales
from vila_deploy.quantize.algorithms.awq_gptq import STEPS_PER_LAYER, quantize_layer
from vila_deploy.quantize.algorithms.awq_scales import candidate_scales, weight_of
from vila_deploy.quantize.algorithms.gptq import gptq_quantize
from vila_deploy.quantize.algorithms.hessian import DAMPING, SHRINK, HessianAccumulator
from vila_deploy.quantize.algorithms.learned_scales import learn_scales
from vila_deploy.utils.device import CPU
from vila_deploy.utils.limits import CHUNK_TOKENS

CHANNELS, ROWS, TOKENS, GROUP = 64, 24, 500, 16
SCHEMES = [QuantScheme(GROUP), QuantScheme(GROUP, symmetric=True)]


@pytest.fixture
def inputs():
    """Correlated channels of very different sizes."""
    torch.manual_seed(0)
    mixed = torch.randn(TOKENS, CHANNELS) @ torch.randn(CHANNELS, CHANNELS) / CHANNELS**0.5
    return (mixed + torch.randn(TOKENS, CHANNELS)) * torch.randn(CHANNELS).exp()


@pytest.fixture
def weight():
    return torch.randn(ROWS, CHANNELS, generator=torch.Generator().manual_seed(1))


def factor_of(inputs, targets=None):
    hessian = HessianAccumulator(CHANNELS, 0 if targets is None else targets.shape[1])
    for begin in range(0, TOKENS, 170):
        here = slice(begin, begin + 170)
        hessian.add(inputs[here], None if targets is None else targets[here])
    return hessian.factor()


def damped_hessian(inputs):
    """The expected Hessian, in float64."""
    hessian = inputs.double().T @ inputs.double() / TOKENS
    power = hessian.diagonal()
    return (1 - SHRINK) * hessian + torch.diag(SHRINK * power + DAMPING * power.mean())


def test_hessian_is_shrunk_and_damped_and_its_factor_gives_it_back(inputs):
    factor, expected = factor_of(inputs), damped_hessian(inputs)
    torch.testing.assert_close(factor.hessian.double(), expected, rtol=1e-4, atol=1e-5)
    ordered = factor.d[factor.order]
    assert factor.u.equal(factor.u.triu())
    again = factor.u * ordered @ factor.u.T
    torch.testing.assert_close(
        again, factor.hessian[factor.order][:, factor.order], rtol=1e-4, atol=1e-3
    )
    power = expected.diagonal()[factor.order]
    assert power.equal(power.sort(descending=True).values)


def test_d_is_the_error_that_later_channels_cannot_correct(inputs):
    """The Schur complement of everything that comes later in the order, in float64."""
    factor, hessian = factor_of(inputs), damped_hessian(inputs)
    for place in (0, 7, CHANNELS - 2, CHANNELS - 1):
        channel, later = factor.order[place], factor.order[place + 1 :]
        cross = hessian[channel, later]
        left = hessian[channel, channel] - cross @ torch.linalg.solve(
            hessian[later][:, later], cross
        )
        assert float(factor.d[channel]) == pytest.approx(float(left), rel=1e-3)


def test_factor_of_rescaled_inputs(inputs):
    scales = torch.rand(CHANNELS, generator=torch.Generator().manual_seed(2)) + 0.5
    factor = factor_of(inputs)
    factor.rescale(scales)
    torch.testing.assert_close(
        factor.hessian.double(), damped_hessian(inputs) / scales.outer(scales), rtol=1e-4, atol=1e-5
    )
    again = factor.u * factor.d[factor.order] @ factor.u.T
    torch.testing.assert_close(
        again, factor.hessian[factor.order][:, factor.order], rtol=1e-3, atol=1e-3
    )


def test_output_error_and_update_against_the_tokens_themselves(inputs, weight):
    difference = 0.1 * weight
    exact = (inputs @ difference.T).square().mean()
    assert factor_of(inputs).output_error(difference) == pytest.approx(float(exact), rel=1e-3)
    targets = inputs @ weight.T + torch.randn(TOKENS, ROWS)
    factor = factor_of(inputs, targets)
    other = weight + difference
    residual = (targets - inputs @ other.T).T @ inputs / TOKENS
    expected = torch.linalg.solve(damped_hessian(inputs), residual.T.double()).T
    update = factor.least_squares_update(other).double()
    torch.testing.assert_close(update, expected, rtol=1e-2, atol=1e-3)


def textbook_gptq(weight, hessian, scale, zero, order):
    """GPTQ as its paper writes it, with the inverse, in float64; quantized values."""
    work, qweight = weight.double().clone(), torch.zeros_like(weight)
    for place, channel in enumerate(order.tolist()):
        later = order[place:]
        inverse = torch.linalg.inv(hessian[later][:, later])
        group = channel // GROUP
        q = (work[:, channel] / scale[:, group]).round() + zero[:, group]
        qweight[:, channel] = q.clamp(0, QuantScheme().max_value)
        stored = (qweight[:, channel] - zero[:, group]) * scale[:, group]
        lost = (work[:, channel] - stored) / inverse[0, 0]
        work[:, later] -= torch.outer(lost, inverse[0])
    return qweight


def in_small_parts(monkeypatch, steps):
    """Blocks of so many steps of 8 channels, and tiles that don't fit evenly."""
    sizes = {"STEP": 8, "BLOCK_STEPS": steps, "BLOCK_FROM": 0, "TILE_CHANNELS": 40, "TILE_ROWS": 7}
    for name, size in (sizes | {"ROWS_AT_A_TIME": 10, "SEARCHED_NUMBERS": 3 * CHANNELS}).items():
        monkeypatch.setattr(gptq, name, size)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_rounds_as_textbook_gptq_does(inputs, weight, scheme, steps, monkeypatch):
    monkeypatch.setattr(gptq, "REFINEMENTS", 0)
    in_small_parts(monkeypatch, steps)
    monkeypatch.setattr(gptq, "_refit_scales", lambda rows, *rest: rows.scale)
    factor = factor_of(inputs)
    found = gptq_quantize(weight, factor, scheme, "it")
    scale, zero = found.scale.double(), found.zero.double()
    expected = textbook_gptq(weight, damped_hessian(inputs), scale, zero, factor.order)
    # A tie in float64 may fall the other way in float32, and the rest of its row follows.
    same = (found.q == expected).all(1).float().mean()
    assert same >= 0.9
    assert found.symmetric == scheme.symmetric


@pytest.mark.parametrize("steps", [1, 3])
def test_what_is_done_at_a_time_changes_nothing(inputs, weight, steps, monkeypatch):
    whole = gptq_quantize(weight, factor_of(inputs), QuantScheme(GROUP), "it")
    in_small_parts(monkeypatch, steps)
    parts = gptq_quantize(weight, factor_of(inputs), QuantScheme(GROUP), "it")
    # A tie may fall the other way when sums are made in another order.
    assert (parts.q == whole.q).all(1).float().mean() >= 0.9
    assert (parts.scale == whole.scale).float().mean() >= 0.9


def test_normal_equations_of_scales(inputs, weight, monkeypatch):
    monkeypatch.setattr(gptq, "TILE_CHANNELS", 40)
    centred, hessian = weight.T.contiguous(), factor_of(inputs).hessian
    found = gptq._normal_equations(centred, hessian, GROUP)
    parts = centred.double().unflatten(0, (-1, GROUP))
    pairs = hessian.double().unflatten(0, (-1, GROUP)).unflatten(2, (-1, GROUP))
    expected = torch.einsum("gar,gahb,hbr->rgh", parts, pairs, parts)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_step_lowers_the_error(inputs, weight, scheme, monkeypatch):
    def error(rounded):
        return factor_of(inputs).output_error(rounded - weight)

    def with_refinements(count):
        monkeypatch.setattr(gptq, "REFINEMENTS", count)
        return error(gptq_quantize(weight, factor_of(inputs), scheme, "it").dequantize())

    nearest, refined = error(fake_quantize(weight, scheme)), with_refinements(2)
    monkeypatch.setattr(gptq, "_refit_scales", lambda rows, *rest: rows.scale)
    plain = with_refinements(0)
    assert plain < 0.6 * nearest
    assert refined < 0.97 * plain


def test_learned_scales_beat_the_grid(inputs, weight):
    scheme = QuantScheme(GROUP)

    def error(scales):
        factor = factor_of(inputs)
        factor.rescale(scales)
        stored = gptq_quantize(weight * scales, factor, scheme, "it").dequantize() / scales
        return factor_of(inputs).output_error(stored - weight)

    grid = [error(candidate_scales(inputs.abs().mean(0), step / 10)) for step in range(10)]
    assert error(learn_scales(weight, factor_of(inputs), scheme)) < min(grid)


def test_tied_scales_are_tied_and_bounded(inputs, weight):
    tie = torch.arange(CHANNELS) % 16
    scales = learn_scales(weight, factor_of(inputs * 1e4), QuantScheme(GROUP), tie)
    for number in range(16):
        assert len(scales[tie == number].unique()) == 1
    assert len(scales.unique()) > 8
    assert float(scales.log().abs().max()) <= learned_scales.MAX_LOG_SCALE


def quantized(case, tmp_path, **changed):
    layer, given = random_layer(case)
    fp, after = fp_and_quantized(case, given, tmp_path)
    steps, scheme = [], QuantScheme(case.group_size)
    result = quantize_layer(layer, fp, after, scheme, "layer", steps.append)
    assert len(steps) == STEPS_PER_LAYER
    return result, fp, after, layer


def fp_and_quantized(case, given, tmp_path):
    """Hidden states that enter the first layer, for both."""
    embeds = [x.clone() for x in given]
    fp = PackedHiddenStates.on_host(llm_config(case), embeds, tmp_path, CPU, CHUNK_TOKENS)
    after = fp.copy()
    assert after.hidden.equal(fp.hidden)
    assert after.hidden.data_ptr() != fp.hidden.data_ptr()
    return fp, after


@pytest.mark.parametrize("name", CASES)
def test_layer_is_what_is_stored_and_fp_is_the_original(name, tmp_path):
    case = CASES[name]
    result, fp, after, layer = quantized(case, tmp_path)
    original, given = random_layer(case)
    begin = 0
    for sequence in given:
        here = slice(begin, begin + len(sequence))
        begin += len(sequence)
        cos, sin = fp.cos[:, : len(sequence)], fp.sin[:, : len(sequence)]
        exact = run_layer(original, sequence[None], cos, sin)[0]
        torch.testing.assert_close(fp.hidden[here], exact, rtol=1e-4, atol=1e-4)
        stored = copy.deepcopy(layer)
        for part in LINEARS:
            weight_of(stored, part).copy_(result.linears[part].dequantize())
        for part in NORMS:
            assert result.norms[part].equal(result.norms[part].half().float())
            weight_of(stored, part).copy_(result.norms[part])
        again = run_layer(stored, sequence[None], cos, sin)[0]
        torch.testing.assert_close(after.hidden[here], again, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_layer_is_nearer_to_the_original_than_awqs(name, tmp_path):
    case = CASES[name]
    result = quantized(case, tmp_path)[0]
    layer, given = random_layer(case)
    original = {part: weight_of(layer, part).clone() for part in LINEARS}
    scheme = QuantScheme(case.group_size)
    awq.quantize_layer(layer, original.__getitem__, packed_states(case, given), scheme, "it")
    assert result.relative_error < 0.9 * relative_error_of(case, layer)
    for part, (nearest, left) in result.errors.items():
        assert 0 < left < nearest, part


def relative_error_of(case, layer):
    """Mean over tokens, of a case's layer as it is quantized."""
    original, given = random_layer(case)
    exact, states = packed_states(case, given), packed_states(case, given)
    exact.advance(original)
    states.advance(layer)
    error = (states.hidden - exact.hidden).square().sum(-1)
    return float((error / exact.hidden.square().sum(-1)).mean())


def test_later_layers_correct_the_error_of_earlier_ones(tmp_path, monkeypatch):
    case = next(iter(CASES.values()))

    def error_behind_two():
        states = fp_and_quantized(case, random_layer(case)[1], tmp_path)
        for _ in range(2):
            layer = random_layer(case)[0]
            last = quantize_layer(layer, *states, QuantScheme(case.group_size), "layer")
        return last.relative_error

    corrected = error_behind_two()
    monkeypatch.setattr(awq_gptq, "ERROR_CORRECTION", 0.0)
    assert corrected < 0.95 * error_behind_two()


def test_activations_in_a_file_change_nothing(tmp_path, monkeypatch):
    case = next(iter(CASES.values()))
    in_memory = quantized(case, tmp_path)[0]
    monkeypatch.setattr(layerwise, "SPILL_BYTES", 0)
    spilled, fp, _, _ = quantized(case, tmp_path)
    for part in LINEARS:
        assert spilled.linears[part].q.equal(in_memory.linears[part].q)
    assert spilled.relative_error == in_memory.relative_error
    assert not fp.hidden.untyped_storage().resizable()
    assert not list(tmp_path.iterdir())


def test_full_disk_is_an_error_before_anything_is_written(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(layerwise, "SPILL_BYTES", 0)
    monkeypatch.setattr(layerwise.os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        layerwise.activation_matrix(10, 10, tmp_path)
    assert not list(tmp_path.iterdir())
