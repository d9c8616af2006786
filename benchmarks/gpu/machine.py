"""What the machine is, and what its GPU is doing; needs no torch."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.gpu.environment import Run

STATE = (
    "clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "memory.used",
    "clocks_event_reasons.active", "utilization.gpu",
)  # fmt: skip
TOOLS = ("nvcc", "ninja", "g++", "gcc", "cmake", "compute-sanitizer", "ncu", "git")
PACKAGES = ("torch", "triton", "transformers", "numpy", "setuptools", "pytest", "safetensors")


def gpu_state() -> dict[str, str] | None:
    """Return clocks (MHz), power (W), temperature, memory and throttle reasons; None without."""
    command = ["nvidia-smi", f"--query-gpu={','.join(STATE)}", "--format=csv,noheader,nounits"]
    said = output(command)
    if said is None:
        return None
    return dict(
        zip(STATE, (word.strip() for word in said.splitlines()[0].split(",")), strict=False)
    )


def measure_machine(run: Run) -> None:
    """Add a row with versions and tools, and write nvidia-smi's whole report to machine.txt."""
    report = output(["nvidia-smi", "-q"])
    (run.out.parent / "machine.txt").write_text(report or "nvidia-smi is missing\n", "utf-8")
    run.add(
        "machine", platform.node() or "machine", python=sys.version.split()[0],
        tools={tool: shutil.which(tool) for tool in TOOLS},
        packages={name: _version(name) for name in PACKAGES}, gpu=gpu_state(),
        processes=(output(["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader"])
                   or "").split(),
    )  # fmt: skip


def probe_device(run: Run) -> None:
    """Copy 100 MB on the device and wait: fails where it doesn't answer."""
    import torch

    source = torch.ones(25 << 20, device=run.device)
    assert int(source.clone().sum()) == 25 << 20


def output(command: list[str]) -> str | None:
    """Return what a command prints, None if it fails or isn't there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout or None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
