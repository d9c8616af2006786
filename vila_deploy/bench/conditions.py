"""State under which conditions a figure was measured: device, clocks, power, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from vila_deploy.utils.version import __version__

CPUINFO = Path("/proc/cpuinfo")
GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
GPU_STATE = ("driver_version", "clocks.sm", "clocks.mem", "power.limit", "persistence_mode")


def device_name() -> str:
    """Return processor, usable cores and current clock: `AMD EPYC (2 cores, 3100 MHz)`."""
    return f"{processor_name()} ({usable_cores()} cores, {clock_mhz()} MHz)"


def processor_name() -> str:
    """Return the processor's name without its clock, which changes from run to run."""
    return _cpuinfo("model name", platform.machine())


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))


def clock_mhz() -> str:
    """Return the present clock of the first core, or "?"."""
    return _cpuinfo("cpu MHz", "?").partition(".")[0]


def _cpuinfo(key: str, default: str) -> str:
    value = default
    if CPUINFO.exists():
        for line in CPUINFO.read_text().splitlines():
            name, _, text = line.partition(":")
            if name.strip() == key:
                value = text.strip()
    return value


def machine_state(gpu: bool) -> dict[str, str]:
    """Return what else decides the speed, as far as it can be read here.

    Keys: `system`, `cores`, `clock_mhz`, `governor`, `power_mode` (Jetson), and of a GPU
    `driver_version`, `clocks.sm`, `clocks.mem`, `power.limit`, `persistence_mode`.
    """
    state = {
        "system": f"{platform.system()} {platform.release()}",
        "cores": str(usable_cores()),
        "clock_mhz": clock_mhz(),
    }
    with suppress(OSError):
        state["governor"] = GOVERNOR.read_text("ascii").strip()
    if power_mode := _output(["nvpmodel", "-q"]):
        state["power_mode"] = " ".join(power_mode.split())
    if gpu:
        query = f"--query-gpu={','.join(GPU_STATE)}"
        line = _output(["nvidia-smi", query, "--format=csv,noheader"]).partition("\n")[0]
        state |= dict(zip(GPU_STATE, line.split(", "), strict=False)) if line else {}
    return state


def versions(built_with: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the versions installed here, and those of `built_with` that are not.

    Args:
        built_with: a manifest's versions, by package.
    """
    built_with = built_with or {}
    installed = {"vila-deploy": __version__, "python": platform.python_version()}
    for name in ("onnxruntime", "numpy", *built_with):
        # A board has no onnxruntime.
        with suppress(PackageNotFoundError):
            installed.setdefault(name, version(name))
    missing = {name: built_with[name] for name in built_with if name not in installed}
    return {**installed, **missing}


def commit() -> str | None:
    """Return the commit of this source tree; None if the package is installed without it."""
    here = str(Path(__file__).resolve().parent)
    return _output(["git", "-C", here, "rev-parse", "--short=12", "HEAD"]) or None


def _output(command: Sequence[str]) -> str:
    """Return what a program prints; empty if it is not here or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
