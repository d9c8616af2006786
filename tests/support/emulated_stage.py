"""A stage of the GPU benchmark on the emulated GPU, made to hang, to crash or to disagree.

FAULTS in the environment says which: "hang=prefill,crash=tinygemm,disagree=gate_up".
"""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Iterator
from typing import Any

HANG_S = 10_000.0
# A stage that wants more fails by itself, before the computer runs out of memory.
MEMORY_LIMIT_BYTES = 3 << 30
# Of a fused layer; with any number it computes the same.
FUSED_PROGRAMS = 8


def faults() -> dict[str, str]:
    """Return what FAULTS says: kind → stage, or kernel of the checks."""
    given = os.environ.get("FAULTS", "")
    return dict(word.split("=") for word in given.split(",") if word)


def prepare(stage: str) -> None:
    """Install the emulated GPU in this process, and what is to go wrong."""
    limit_memory()
    from tests.support.emulator.device import EmulatedDevice
    from tests.support.emulator.torch_cuda import PROPERTIES, install_torch_cuda
    from tests.support.emulator.triton_driver import install
    from vila_deploy.kernels.capability import ComputeCapability

    device = EmulatedDevice(ComputeCapability(9, 0), races=False)
    install(device)
    install_torch_cuda(device)
    _be_brief(PROPERTIES)
    wrong = faults()
    if stage == wrong.get("hang"):
        _replace_stage(lambda run: time.sleep(HANG_S))
    elif stage == wrong.get("crash"):
        _replace_stage(lambda run: os.kill(os.getpid(), signal.SIGSEGV))
    elif stage == "checks" and "disagree" in wrong:
        _disagree(wrong["disagree"])


def limit_memory() -> None:
    """Refuse this process, and each that it begins, more than MEMORY_LIMIT_BYTES of its own."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))


def _be_brief(properties: Any) -> None:
    """Leave out repetitions: each launch takes a second here."""
    from benchmarks.gpu import kernel_times, steps, timing
    from vila_deploy.kernels import fused_layer

    properties.L2_cache_size = 1
    timing.REPLAYS = timing.DISCARDED = 1
    steps.STEPS, steps.ROUNDS = 2, 3
    kernel_times.EMPTY_LAUNCHES = 2
    fused_layer.programs = lambda capability, arrivals: FUSED_PROGRAMS


def _replace_stage(function: Any) -> None:
    from benchmarks.gpu import registry

    registry.load_stage = lambda name: function


def _disagree(stem: str) -> None:
    from benchmarks.gpu import checks

    case = checks.CASES[stem]

    def wrong(*arguments: Any) -> Iterator[Any]:
        for found, reference in case(*arguments):
            yield found, reference * 1.01 + 1

    checks.CASES[stem] = wrong
