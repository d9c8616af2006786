"""pytest plugin: every test of the process finds an emulated GPU.

EMULATED_CAPABILITY says which, by default 9.0; EMULATED_RACES=0 leaves out the checks for races,
which halves the time. How much was executed stands below the results.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import pytest

os.environ.pop("TRITON_INTERPRET", None)
os.environ |= {"OMP_NUM_THREADS": "1", "VILA_DEPLOY_EMULATED": "1"}

from tests.support.emulator.device import EmulatedDevice
from tests.support.emulator.torch_cuda import install_torch_cuda
from tests.support.emulator.triton_driver import install
from vila_deploy.kernels.capability import ComputeCapability

EXECUTED = pytest.StashKey[Counter[str]]()
DEVICE = EmulatedDevice(
    ComputeCapability.parse(os.environ.get("EMULATED_CAPABILITY", "9.0")),
    races=os.environ.get("EMULATED_RACES", "1") != "0",
)
install(DEVICE)
install_torch_cuda(DEVICE)


@pytest.fixture
def emulated_device() -> EmulatedDevice:
    """The device, without records of earlier tests."""
    DEVICE.records.clear()
    return DEVICE


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Any:
    """Drop the records of a test, which hold its tensors."""
    result = yield
    DEVICE.records.clear()
    return result


def pytest_sessionfinish(session: pytest.Session) -> None:
    counts = dict(DEVICE.counts)
    worker = getattr(session.config, "workeroutput", None)
    if worker is not None:
        worker["emulated"] = counts
    else:
        _add(session.config, counts)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: Any) -> None:
    """Take what a worker of pytest-xdist counted."""
    _add(node.config, getattr(node, "workeroutput", {}).get("emulated", {}))


def _add(config: pytest.Config, counts: dict[str, int]) -> None:
    config.stash.setdefault(EXECUTED, Counter()).update(counts)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    executed = config.stash.get(EXECUTED, Counter())
    for capability in sorted({name.split()[0] for name in executed}):
        mine = {n: c for n, c in executed.items() if n.split()[0] == capability}
        kernels = sorted({name.split()[1] for name in mine})
        terminalreporter.write_line(
            f"emulated {capability}: {sum(mine.values())} launches of {len(kernels)} kernels "
            f"({', '.join(name.removesuffix('_kernel') for name in kernels)})"
        )
