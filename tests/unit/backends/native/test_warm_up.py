"""What a native engine compiles when it opens, so that no answer waits for a compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.support.paths import REPOSITORY
from vila_deploy.backends.native.compile_ahead import KernelSet
from vila_deploy.checkpoint.presets import preset
from vila_deploy.engine.precision import ModulePrecision
from vila_deploy.kernels.capability import ComputeCapability
from vila_deploy.kernels.launch_mode import LaunchMode


@pytest.fixture(scope="module")
def probed() -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.warm_up_probe"],
        capture_output=True, text=True, env=environment, cwd=REPOSITORY, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_no_prompt_or_step_launches_another_kernel(probed: dict[str, Any]) -> None:
    assert probed["missing"] == [[], [], [], []]


def test_what_is_in_the_cache_is_found_and_said_nothing_about(probed: dict[str, Any]) -> None:
    first, second, said = probed["counts"]
    kernels = first[0]
    assert kernels >= 3
    assert first == [kernels, kernels, 0]
    assert second == [kernels, 0, kernels]
    assert said == [kernels]


def test_helpers_are_told_what_to_compile() -> None:
    for model, precision in (("VILA1.5-3b", "int4"), ("NVILA-8B", "fp16")):
        kernels = KernelSet(
            preset(model, precision).llm, 512, ComputeCapability(8, 9),
            ModulePrecision(lm_head="int4"), LaunchMode(merge_attention=True),
            several=True,
        )  # fmt: skip
        assert KernelSet.from_json(json.loads(json.dumps(kernels.to_json()))) == kernels
