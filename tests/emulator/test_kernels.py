"""Every kernel, compiled by Triton and executed, against its float32 reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.gpu.checks import CASES, LIMIT, relative_error
from benchmarks.gpu.environment import Run
from benchmarks.gpu.inputs import config
from tests.support.emulator.capabilities import emulated_capabilities
from tests.support.emulator.device import EmulatedDevice

# A group of heads shares a key head in 8B; 3B has none that do.
MODELS = ("3B", "8B")


@pytest.fixture(params=emulated_capabilities(), ids=str)
def device(request: pytest.FixtureRequest, emulated_device: EmulatedDevice) -> EmulatedDevice:
    emulated_device.capability = request.param
    return emulated_device


@pytest.mark.parametrize("stem", CASES)
def test_a_compiled_kernel_equals_its_reference(
    stem: str, device: EmulatedDevice, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    run = Run("cpu", device.capability, 600.0, tmp_path / "rows.jsonl")
    sizes = config("3B", "int4", small=True)
    for found, reference in CASES[stem](run, sizes):
        assert relative_error(found, reference) < LIMIT
    assert device.records
