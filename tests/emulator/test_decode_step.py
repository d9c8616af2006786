"""A decoding step of compiled kernels: its answers, and its bits in every launch mode."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.gpu.inputs import config, random_llm
from tests.support.emulator.capabilities import NEWEST
from tests.support.emulator.device import EmulatedDevice
from tests.support.emulator.libcuda import COOPERATIVE, PROGRAMMATIC_STREAM_SERIALIZATION
from vila_deploy.backends.native.decode_step import Cache, DecodeStep, StepConfig
from vila_deploy.kernels.fused_layer import with_fused_warps
from vila_deploy.kernels.launch_mode import LAUNCH_MODES

POSITIONS, AT = 256, 70
PRODUCTS = {"norm_qkv_kernel", "add_residual_kernel", "gate_up_kernel"}


@pytest.fixture
def device(emulated_device: EmulatedDevice) -> EmulatedDevice:
    emulated_device.capability = NEWEST
    return emulated_device


def after_a_step(name: str, *, fused_warps: bool = False, tokens: int = 1) -> list[Tensor]:
    """What a step of two small random layers leaves behind 70 tokens of noise."""
    torch.manual_seed(0)
    sizes = replace(config("8B", "int4", small=True), num_layers=2)
    llm = random_llm(sizes, POSITIONS, "cpu")
    step_config = StepConfig(sizes, POSITIONS, NEWEST, "cpu", LAUNCH_MODES[name])
    cache = Cache(sizes, POSITIONS, "cpu")
    step = DecodeStep(step_config, llm, cache, tokens)
    for vectors in (cache.keys, cache.values):
        # What isn't written yet must not be read.
        vectors.normal_()[:, :, AT:] = torch.nan
    cache.position.fill_(AT)
    step.token.fill_(30)
    for launch in step.launches:
        if fused_warps and launch.name in PRODUCTS:
            launch = with_fused_warps(launch)
        launch()
    end = AT + tokens
    kept = (step.logits, step.token, cache.keys[:, :, :end], cache.values[:, :, :end])
    return [*kept, cache.position]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["merged-attention", "pdl", "pdl-merged-attention"])
def test_other_launch_modes_give_the_same_bits(name: str, device: EmulatedDevice) -> None:
    expected = after_a_step("separate")
    device.records.clear()
    assert expected[0].isfinite().all()
    assert same(after_a_step(name), expected)
    for record in device.records:
        dependent = record.attributes.get(PROGRAMMATIC_STREAM_SERIALIZATION, 0)
        assert bool(dependent) == LAUNCH_MODES[name].pdl


def test_a_fused_launch_gives_the_bits_of_its_phases(device: EmulatedDevice) -> None:
    expected = after_a_step("separate", fused_warps=True)
    device.records.clear()
    assert same(after_a_step("fused", fused_warps=True), expected)
    (fused,) = (record for record in device.records if record.name == "fused_layer_kernel")
    assert fused.attributes[COOPERATIVE] == 1


def test_several_tokens_see_each_other_as_in_several_steps(device: EmulatedDevice) -> None:
    """The first of eight tokens has the logits of a step of its own."""
    alone, together = after_a_step("separate"), after_a_step("separate", tokens=8)
    assert torch.equal(alone[0][0], together[0][0])
    assert together[0].isfinite().all()
