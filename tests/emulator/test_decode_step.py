"""A decoding step of compiled kernels: its answers, and its bits in every launch mode."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.emulator.capabilities import NEWEST
from tests.support.emulator.device import EmulatedDevice
from tests.support.emulator.libcuda import COOPERATIVE, PROGRAMMATIC_STREAM_SERIALIZATION
from tests.support.emulator.steps import random_step
from vila_deploy.kernels.launch_mode import LAUNCH_MODES


@pytest.fixture
def device(emulated_device: EmulatedDevice) -> EmulatedDevice:
    emulated_device.capability = NEWEST
    return emulated_device


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "name",
    [
        "merged-attention",
        "pdl",
        "pdl-merged-attention-prefetch",
        pytest.param("pdl-merged-attention", marks=pytest.mark.slow),
        pytest.param("merged-attention-prefetch", marks=pytest.mark.slow),
    ],
)
def test_other_launch_modes_give_the_same_bits(name: str, device: EmulatedDevice) -> None:
    expected = random_step("separate").run()
    device.records.clear()
    assert expected[0].isfinite().all()
    assert same(random_step(name).run(), expected)
    for record in device.records:
        dependent = record.attributes.get(PROGRAMMATIC_STREAM_SERIALIZATION, 0)
        assert bool(dependent) == LAUNCH_MODES[name].pdl


def test_a_fused_launch_gives_the_bits_of_its_phases(device: EmulatedDevice) -> None:
    expected = random_step("separate").run(fused_warps=True)
    device.records.clear()
    assert same(random_step("fused").run(), expected)
    (fused,) = (record for record in device.records if record.name == "fused_layer_kernel")
    assert fused.attributes[COOPERATIVE] == 1


def test_several_tokens_see_each_other_as_in_several_steps(device: EmulatedDevice) -> None:
    """The first of eight tokens has the logits of a step of its own."""
    alone, together = random_step("separate").run(), random_step("separate", tokens=8).run()
    assert torch.equal(alone[0][0], together[0][0])
    assert together[0].isfinite().all()
